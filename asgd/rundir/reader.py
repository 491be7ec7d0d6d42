"""The run directory: what is recorded for each update, how it is written, how it is read.

    config.json            the resolved configuration
    environment.json       versions, host, cores, start time
    trace/part-*.parquet   a row per applied update, columns `TRACE_COLUMNS`
    members/part-*.parquet a row per gradient of each update that is a mean of several workers',
                           columns `MEMBER_COLUMNS`; only where there are such updates
    loss.parquet/part-*.parquet
                           a row per evaluation, columns `LOSS_COLUMNS`
    events.jsonl           start, worker_lost, finish, ...: one JSON object per line
    checkpoints/           of real runs: what a run that was cut short goes on from

Files are written under a temporary name and renamed, so a torn write never hides what was already
there; events are appended line by line and a torn line is ignored.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from asgd.config import RunConfig, load_config
from asgd.errors import InputError
from asgd.rundir.defects import loss_defect, member_defect, trace_defect
from asgd.rundir.events import read_events
from asgd.rundir.files import check_no_links, make_directory, replace_file
from asgd.rundir.parts import (
    LOSS,
    MEMBERS,
    TRACE,
    damaged_name,
    first_update,
    missing_losses,
    most_rows,
    part_name,
    parts_of,
    told_losses,
)
from asgd.rundir.tables import Columns, DamagedTableError, Table, Types, read_table, write_table
from asgd.stored_json import read_json

if TYPE_CHECKING:
    import pandas as pd

SHARED = -1  # the worker of an update that is the mean of several workers' gradients

TRACE_COLUMNS = {
    "update": np.int64,  # number of this update: 0, 1, ..., each once
    "worker": np.int32,  # who computed the gradient, or SHARED
    "sequence": np.int64,  # the worker's own number of this gradient: 0, 1, ...
    "read_version": np.int64,  # updates applied before the snapshot was read
    "staleness": np.int64,  # update - read_version
    "batch_size": np.int32,  # samples in the gradient
    "compute_seconds": np.float64,  # from snapshot received to gradient ready
    "applied_seconds": np.float64,  # from the start of the run to the update
    "gradient_norm": np.float64,  # Euclidean norm of the gradient
}
MEMBER_COLUMNS = {
    "update": np.int64,  # the SHARED update the gradient went into
    "worker": np.int32,  # as in the trace, from here on
    "sequence": np.int64,
    "read_version": np.int64,
    "batch_size": np.int32,
    "compute_seconds": np.float64,
}
LOSS_COLUMNS = {"update": np.int64, "seconds": np.float64, "loss": np.float64}
TABLES: dict[str, Types] = {TRACE: TRACE_COLUMNS, MEMBERS: MEMBER_COLUMNS, LOSS: LOSS_COLUMNS}
_REPETITIVE = ("worker", "staleness", "batch_size")
# The state after each event that changes it.
_ENDS = {
    "finish": "finished",
    "interrupted": "interrupted",
    "failed": "failed",
    "server_restored": "unfinished",
}


class RunWriter:
    """Writes one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unsynced: set[Path] = set()

    @classmethod
    def create(cls, path: str | Path, config: RunConfig) -> RunWriter:
        """Create the directory with its configuration, environment and `start` event.

        Raises
        ------
        InputError
            The directory cannot be written, or holds something already.
        """
        path = Path(path)
        make_directory(path)
        try:
            (path / "trace").mkdir()
            writer = cls(path)
            files = {
                "config.json": config.to_json().encode(),
                "environment.json": f"{json.dumps(_environment(), indent=2)}\n".encode(),
            }
            for name, content in files.items():
                # On the disk: a checkpoint is worth nothing without them.
                replace_file(path / name, content, flush=True)
            digests = {name: sha256(content).hexdigest() for name, content in files.items()}
            writer.event("start", sha256=digests)
            writer.sync()
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
        return writer

    def trace(self, columns: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]) -> None:
        """Write one part of the trace: equally long `TRACE_COLUMNS`, in order of `update`."""
        self._part(TRACE, columns)

    def members(self, columns: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]) -> None:
        """Write one part of the members: equally long `MEMBER_COLUMNS`, in order of `update`."""
        self._part(MEMBERS, columns)

    def loss(self, columns: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]) -> None:
        """Write one part of the losses: equally long `LOSS_COLUMNS`, in order of `update`."""
        self._part(LOSS, columns)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event; `fields` must be JSON values."""
        line = json.dumps({"event": kind, "time": time.time(), **fields}) + "\n"
        with (self.path / "events.jsonl").open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # torn: it must not take this one with it
                    line = "\n" + line
            file.write(line.encode())

    def sync(self) -> None:
        """Flush what was written since the last call to the disk."""
        changed = self._unsynced | {self.path / "events.jsonl"}
        files = {path for path in changed if path.exists()}
        for path in files | {path.parent for path in changed}:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._unsynced.clear()

    def recorded_updates(self) -> int:
        """Return how many updates are on record, members included, without a gap from the first."""
        count, shared = 0, [np.empty(0, np.int64)]
        for part in parts_of(self.path / TRACE):
            try:
                trace = self._read(part, TRACE)
            except DamagedTableError:
                break
            if trace_defect(trace, count) is not None:
                break
            shared.append(trace["update"][trace["worker"] == SHARED])
            count += len(trace["update"])
        return min(count, self._first_without_members(np.concatenate(shared), count))

    def _first_without_members(self, shared: npt.NDArray[np.int64], count: int) -> int:
        """Return the first of the updates that are means whose members are not on record."""
        known = [np.empty(0, np.int64)]
        for part in parts_of(self.path / MEMBERS):
            try:
                members = self._read(part, MEMBERS)
            except DamagedTableError:
                continue
            if member_defect(members) is None:
                known.append(members["update"])
        missing = np.setdiff1d(shared, np.concatenate(known))
        return int(missing[0]) if len(missing) else count

    def recorded_losses(self) -> list[tuple[int, float, float]]:
        """Return the first and the last loss on record, none if there is none: `LOSS_COLUMNS`.

        A long run has too many to read them all for that.
        """
        parts = parts_of(self.path / LOSS)
        ends = [(parts[0], 0), (parts[-1], -1)] if parts else []
        found = []
        for part, row in ends:
            loss = self._read(part, LOSS)
            seconds, value = float(loss["seconds"][row]), float(loss["loss"][row])
            found.append((int(loss["update"][row]), seconds, value))
        return found

    def cut(self, updates: int) -> None:
        """Cut trace, members and loss back to what they were after so many updates.

        -1 leaves nothing, not even the loss of x_0. These updates must be on record, see
        `recorded_updates`. A cut that was interrupted is completed by repeating it. Losses that
        cannot be read are put aside, which the event `loss_damaged` tells, as it tells which are
        missing.
        """
        # Other temporary files may be of somebody who is at work on them.
        for pattern in ("trace/*.tmp", "members/*.tmp", f"{LOSS}/*.tmp", "checkpoints/*.tmp"):
            for torn in self.path.glob(pattern):
                torn.unlink(missing_ok=True)
        self._set_damaged_losses_aside()
        for name, end in ((TRACE, updates), (MEMBERS, updates), (LOSS, updates + 1)):
            parts = parts_of(self.path / name)
            kept = [part for part in parts if first_update(part) < end]
            for part in parts[len(kept) :]:
                part.unlink()
                self._unsynced.add(part)
            if kept:
                self._cut_table(kept[-1], end, name)

    def _set_damaged_losses_aside(self) -> None:
        known = [np.empty(0, np.int64)]
        for part in parts_of(self.path / LOSS):
            try:
                loss = self._read(part, LOSS)
            except DamagedTableError as error:
                aside = part.with_name(damaged_name(first_update(part)))
                os.replace(part, aside)
                self._unsynced.add(aside)
                self.event("loss_damaged", file=f"{LOSS}/{aside.name}", reason=str(error))
            else:
                known.append(loss["update"])
        told = told_losses(read_events(self.path / "events.jsonl"))
        for missing in missing_losses(np.concatenate(known), self._config):
            if missing not in told:
                name = f"{LOSS}/{damaged_name(missing)}"
                self.event("loss_damaged", file=name, reason="it is missing")

    def _cut_table(self, path: Path, end: int, table: str) -> None:
        """Keep the rows before update `end`."""
        columns = self._read(path, table)
        rows = int(np.searchsorted(columns["update"], end))
        if rows < len(columns["update"]):
            kept = {name: column[:rows] for name, column in columns.items()}
            self._write(path, kept, table, flush=True)  # on the disk, as they were under this name

    def _part(self, name: str, columns: Mapping[str, Any]) -> None:
        if len(columns["update"]):
            directory = self.path / name
            directory.mkdir(exist_ok=True)
            self._write(directory / part_name(int(columns["update"][0])), columns, name)

    def _write(
        self, path: Path, columns: Mapping[str, Any], table: str, *, flush: bool = False
    ) -> None:
        write_table(path, columns, TABLES[table], _REPETITIVE, flush=flush)
        self._unsynced.add(path)

    def _read(self, part: Path, table: str) -> Columns:
        return read_table(part, TABLES[table], most_rows(self._config, table))

    @cached_property
    def _config(self) -> RunConfig:
        return load_config(self.path / "config.json")


@dataclass(frozen=True, repr=False)
class Run:
    """A run directory, read.

    Tables are read when they are first asked for, and then kept.

    Attributes
    ----------
    path
        The directory.
    config
        The resolved configuration.
    """

    path: Path
    config: RunConfig

    @cached_property
    def trace(self) -> pd.DataFrame:
        """One row per applied update, in order.

        Columns: `update`, its number 0, 1, ..., each once; `worker`, who computed the gradient, or
        -1 for a mean of several; `sequence`, that worker's own number of the gradient;
        `read_version`, updates applied before its snapshot was read; `staleness` = `update` -
        `read_version`; `batch_size`, in samples; `compute_seconds`, from snapshot received to
        gradient ready; `applied_seconds`, since the start of the run; `gradient_norm`, Euclidean.
        """
        return self._table(TRACE)

    @cached_property
    def members(self) -> pd.DataFrame:
        """One row per gradient of the updates that are means; columns as in the trace."""
        members = self._table(MEMBERS)
        self._refuse(MEMBERS, member_defect(_columns_of(members)))
        return members

    @cached_property
    def loss(self) -> pd.DataFrame:
        """One row per loss evaluation.

        Columns: `update`, how many were applied; `seconds` since the start of the run, when they
        were; `loss`, f at the parameters of that moment. Losses may be missing that the event
        `loss_damaged` tells of; others are an error.
        """
        # First: of a run that finishes meanwhile, the losses would seem to end too early.
        reached = self.recorded_updates if self.state == "finished" else None
        loss = self._table(LOSS)
        self._refuse(LOSS, loss_defect(_columns_of(loss)))
        missing = missing_losses(loss["update"].to_numpy(), self.config, reached)
        for update in set(missing) - told_losses(self.events):
            self._refuse(LOSS, f"the loss after update {update} is missing; a part was lost")
        return loss

    @cached_property
    def recorded_updates(self) -> int:
        """How many updates are in the trace, which is not read for it."""
        count = 0
        for part in self.parts(TRACE):
            if first_update(part.path) != count:
                self._refuse(TRACE, f"update {count} is missing; a part was lost")
            count += part.rows
        return count

    def parts(self, table: str) -> Iterator[Table]:
        """Open the parts of a table one after another, for whoever needs few of its columns."""
        for path in parts_of(self.path / table):
            with Table(path, TABLES[table], most_rows(self.config, table)) as part:
                yield part

    def last_row(self, table: str) -> dict[str, Any] | None:
        """Return the last row of a table, None if there is none; no more is read for it."""
        paths = parts_of(self.path / table)
        if not paths:
            return None
        with Table(paths[-1], TABLES[table], most_rows(self.config, table)) as part:
            return {name: column[-1] for name, column in part.columns(*TABLES[table]).items()}

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The events in order; torn lines are left out."""
        return read_events(self.path / "events.jsonl")

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, host, cores and start time of the run."""
        return read_json(self.path / "environment.json")

    @property
    def state(self) -> str:
        """Return "finished", "interrupted", "failed" or, when none was recorded, "unfinished"."""
        return _ENDS.get(str(self._end.get("event")), "unfinished")

    @property
    def failure(self) -> str | None:
        """Return why the run failed; None where it did not, or did not say why."""
        reason = self._end.get("reason") if self.state == "failed" else None
        return None if reason is None else str(reason)

    @property
    def _end(self) -> dict[str, Any]:
        """The latest event that says how the run stands."""
        ends = (event for event in reversed(self.events) if event.get("event") in _ENDS)
        return next(ends, {})

    def __repr__(self) -> str:
        from asgd.rundir.summary import in_a_line

        return f"Run({in_a_line(self)})"

    def _repr_html_(self) -> str:
        """Return the headline numbers for a notebook."""
        import pandas as pd

        from asgd.rundir.summary import summary

        return str(pd.Series(summary(self), dtype=object).to_frame().to_html(header=False))

    def _table(self, table: str) -> pd.DataFrame:
        import pandas as pd

        types, most = TABLES[table], most_rows(self.config, table)
        rows = {part.path: part.rows for part in self.parts(table)}
        if sum(rows.values()) > most:
            self._refuse(table, f"{sum(rows.values())} rows, where there can be {most}")
        columns: Columns = {
            name: np.empty(sum(rows.values()), kind) for name, kind in types.items()
        }
        count = 0
        for path in rows:  # into its place: parts joined later would be there twice
            part = read_table(path, types, rows[path])
            if len(part["update"]) != rows[path]:
                self._refuse(table, f"{path.name} changed while it was read")
            if table == TRACE:  # of members and losses all together: there are fewer
                self._refuse(TRACE, trace_defect(part, count))
            for name, column in part.items():
                columns[name][count : count + rows[path]] = column
            count += rows[path]
        return pd.DataFrame(columns, copy=False)

    def _refuse(self, table: str, defect: str | None) -> None:
        if defect is not None:
            raise InputError(f"{self.path / table}: {defect}")


def default_path(config: RunConfig, name: str | None = None) -> Path:
    """Return a new directory under runs/, named after the problem, or as given, and the time."""
    name = name or config.problem.kind.replace(":", "-")
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def read_run(path: str | Path) -> Run:
    """Open a run directory.

    Raises
    ------
    InputError
        There is no run at `path`, or several: repeats of one, see `asgd.rundir.repeats`; or it
        leads out of its directory.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        inside = next(path.glob("*/config.json"), None)
        hint = f"name one in it, such as {inside.parent}" if inside else "`asgd run` makes one"
        raise InputError(f"{path}: not a run directory (no config.json); {hint}")
    check_no_links(path)
    config = load_config(path / "config.json")
    if config.run.repeats > 1:
        raise InputError(f"{path}: holds repeats of a run; name one, such as {path}/repeat-000")
    return Run(path, config)


def _columns_of(table: pd.DataFrame) -> Columns:
    return {str(name): column.to_numpy() for name, column in table.items()}


def _environment() -> dict[str, Any]:
    packages = ("asgd", "numpy", "scipy", "pandas", "pyarrow", "ray")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }
