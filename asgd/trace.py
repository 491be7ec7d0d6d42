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

import io
import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asgd.config import RunConfig, load_config
from asgd.errors import InputError
from asgd.files import check_no_links, make_directory, replace_file

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
_REPETITIVE = ["worker", "staleness", "batch_size"]  # for other columns a dictionary costs time
_LOSS = "loss.parquet"  # a single file in runs made before losses came in parts
_SINGLE_LOSS, _FIRST_LOSS = "loss-single.parquet", f"{_LOSS}/part-000000000000.parquet"
_PART = re.compile(r"part-.*\.parquet")
_TORN = (b"{", b"\0")  # how a line of the events begins that did not get to the disk as a whole
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
            replace_file(path / "config.json", config.to_json().encode())
            environment = json.dumps(_environment(), indent=2) + "\n"
            replace_file(path / "environment.json", environment.encode())
            writer.event("start")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
        return writer

    def trace(self, columns: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]) -> None:
        """Write one part of the trace: equally long `TRACE_COLUMNS`, in order of `update`."""
        self._part("trace", columns, TRACE_COLUMNS)

    def members(self, columns: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]) -> None:
        """Write one part of the members: equally long `MEMBER_COLUMNS`, in order of `update`."""
        self._part("members", columns, MEMBER_COLUMNS)

    def loss(self, columns: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]) -> None:
        """Write one part of the losses: equally long `LOSS_COLUMNS`, in order of `update`."""
        self._part(_LOSS, columns, LOSS_COLUMNS)

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
        import pyarrow as pa
        import pyarrow.parquet as pq

        count = 0
        for part in sorted(self.path.glob("trace/part-*.parquet")):
            try:
                update = pq.read_table(part)["update"].to_numpy()
            except (pa.ArrowException, OSError):
                break
            if not np.array_equal(update, np.arange(count, count + len(update))):
                break
            count += len(update)
        for part in sorted(self.path.glob("members/part-*.parquet")):
            try:
                pq.read_table(part)
            except (pa.ArrowException, OSError):
                return min(count, _first_update(part))
        return count

    def recorded_losses(self) -> list[tuple[int, float, float]]:
        """Return the first and the last loss on record, none if there is none: `LOSS_COLUMNS`.

        A long run has too many to read them all for that. Its losses must be in parts, see `cut`.
        """
        import pyarrow.parquet as pq

        parts = sorted(self.path.glob(f"{_LOSS}/part-*.parquet"))
        if not parts:
            return []
        ends = zip((parts[0], parts[-1]), (0, -1), strict=True)
        rows = [pq.read_table(part).to_pandas().iloc[row] for part, row in ends]
        return [(int(row["update"]), row["seconds"], row["loss"]) for row in rows]

    def cut(self, updates: int) -> None:
        """Cut trace, members and loss back to what they were after so many updates.

        -1 leaves nothing, not even the loss of x_0. These updates must be on record, see
        `recorded_updates`. A cut that was interrupted is completed by repeating it. Losses that
        cannot be read are put aside, which the event `loss_damaged` tells.
        """
        # Other temporary files may be of somebody who is at work on them.
        for pattern in ("trace/*.tmp", "members/*.tmp", f"{_LOSS}/*.tmp", "checkpoints/*.tmp"):
            for torn in self.path.glob(pattern):
                torn.unlink(missing_ok=True)
        self._split_losses()
        self._set_damaged_losses_aside()
        for name, types, end in (
            ("trace", TRACE_COLUMNS, updates),
            ("members", MEMBER_COLUMNS, updates),
            (_LOSS, LOSS_COLUMNS, updates + 1),
        ):
            parts = sorted(self.path.glob(f"{name}/part-*.parquet"))
            kept = [part for part in parts if _first_update(part) < end]
            for part in parts[len(kept) :]:
                part.unlink()
                self._unsynced.add(part)
            if kept:
                self._cut_table(f"{name}/{kept[-1].name}", end, types)

    def _split_losses(self) -> None:
        """Make the single file of an old run the first of the parts to come."""
        losses, single, part = (self.path / name for name in (_LOSS, _SINGLE_LOSS, _FIRST_LOSS))
        if losses.is_file():
            os.replace(losses, single)
        if single.exists():
            losses.mkdir(exist_ok=True)
            os.replace(single, part)
            self._unsynced |= {losses, part}

    def _set_damaged_losses_aside(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for part in sorted(self.path.glob(f"{_LOSS}/part-*.parquet")):
            try:
                pq.read_table(part)
            except (pa.ArrowException, OSError) as error:
                aside = part.with_name(part.name.replace("part", "_damaged"))
                os.replace(part, aside)
                self._unsynced.add(aside)
                reason = str(error).splitlines()[0]
                self.event("loss_damaged", file=f"{_LOSS}/{aside.name}", reason=reason)

    def _cut_table(self, name: str, end: int, types: Mapping[str, type]) -> None:
        """Keep the rows before update `end`."""
        import pyarrow.parquet as pq

        table = pq.read_table(self.path / name)
        rows = int(np.searchsorted(table["update"].to_numpy(), end))
        if rows < table.num_rows:
            kept = table.slice(0, rows)
            self._parquet(name, {key: kept[key].to_numpy() for key in types}, types)

    def _part(self, name: str, columns: Mapping[str, Any], types: Mapping[str, type]) -> None:
        if len(columns["update"]):
            (self.path / name).mkdir(exist_ok=True)
            first = int(columns["update"][0])
            self._parquet(f"{name}/part-{first:012d}.parquet", columns, types)

    def _parquet(self, name: str, columns: Mapping[str, Any], types: Mapping[str, type]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({key: np.asarray(columns[key], dtype) for key, dtype in types.items()})
        content = pa.BufferOutputStream()
        pq.write_table(table, content, use_dictionary=_REPETITIVE)
        replace_file(self.path / name, content.getvalue().to_pybytes())
        self._unsynced.add(self.path / name)


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
        trace = self._parts("trace", TRACE_COLUMNS)
        wrong = np.flatnonzero(trace["update"].to_numpy() != np.arange(len(trace)))
        if len(wrong):
            raise InputError(f"{self.path}/trace: update {wrong[0]} is missing; a part was lost")
        return trace

    @cached_property
    def members(self) -> pd.DataFrame:
        """One row per gradient of the updates that are means; columns as in the trace."""
        return self._parts("members", MEMBER_COLUMNS)

    @cached_property
    def loss(self) -> pd.DataFrame:
        """One row per loss evaluation.

        Columns: `update`, how many were applied; `seconds` since the start of the run, when they
        were; `loss`, f at the parameters of that moment.
        """
        for name in (_LOSS, _SINGLE_LOSS):
            if (self.path / name).is_file():
                return self._read(self.path / name, list(LOSS_COLUMNS))
        return self._parts(_LOSS, LOSS_COLUMNS)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The events in order; torn lines are left out."""
        path = self.path / "events.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        events = []
        for number, line in enumerate(lines, start=1):
            try:
                event = json.loads(line)
            except ValueError:
                if line.startswith(_TORN) or not line:
                    continue
                event = None
            if not isinstance(event, dict):
                raise InputError(f"{path}: line {number} is not an event")
            events.append(event)
        return events

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, host, cores and start time of the run."""
        path = self.path / "environment.json"
        try:
            environment: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
        return environment

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
        from asgd.listing import in_a_line

        return f"Run({in_a_line(self)})"

    def _repr_html_(self) -> str:
        """Return the headline numbers for a notebook."""
        import pandas as pd

        from asgd.listing import summary

        return str(pd.Series(summary(self), dtype=object).to_frame().to_html(header=False))

    def _parts(self, name: str, types: Mapping[str, type]) -> pd.DataFrame:
        import pandas as pd

        directory = self.path / name
        try:
            parts = sorted(part for part in os.listdir(directory) if _PART.fullmatch(part))
        except FileNotFoundError:
            parts = []
        except OSError as error:  # a glob would find nothing there
            raise InputError(f"{directory}: cannot be read ({error.strerror})") from None
        frames = [self._read(directory / part, list(types)) for part in parts]
        if not frames:
            return pd.DataFrame({key: np.empty(0, dtype) for key, dtype in types.items()})
        return pd.concat(frames, ignore_index=True)

    def _read(self, path: Path, columns: list[str]) -> pd.DataFrame:
        import pandas as pd
        import pyarrow as pa

        try:
            # From memory: pyarrow opens no path that is not UTF-8.
            return pd.read_parquet(io.BytesIO(path.read_bytes()), columns=columns)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: cannot be read as part of a run ({reason})") from None


def default_path(config: RunConfig, name: str | None = None) -> Path:
    """Return a new directory under runs/, named after the problem, or as given, and the time."""
    name = name or config.problem.kind.replace(":", "-")
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def read_run(path: str | Path) -> Run:
    """Open a run directory.

    Raises
    ------
    InputError
        There is no run at `path`, or several: repeats of one, see `asgd.experiment`; or it leads
        out of its directory.
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


def _first_update(part: Path) -> int:
    return int(part.stem.removeprefix("part-"))


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
