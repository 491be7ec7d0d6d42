"""Reads a run directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asgd.arrays import Array, Columns
from asgd.config.make import load_config
from asgd.errors import AsgdError, InputError, NoRowsError
from asgd.rundir.alive import read_heartbeat
from asgd.rundir.columns import (
    COUNTS,
    DISCARDED,
    LOSS,
    MEMBERS,
    METRICS,
    POSITIONS,
    SKIPPED,
    TABLES,
    TRACE,
)
from asgd.rundir.counts import StalenessCounts
from asgd.rundir.defects import (
    discarded_defect,
    loss_defect,
    member_defect,
    position_defect,
    skipped_defect,
    trace_defect,
)
from asgd.rundir.files import check_no_links
from asgd.rundir.outline import Outline, outline
from asgd.rundir.parameters import Reached
from asgd.rundir.parts import (
    missing_losses,
    reported_losses,
    undisturbed,
)
from asgd.rundir.run_files import RunFiles
from asgd.rundir.tables import read_pieces
from asgd.stored_json import read_json

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Run(RunFiles):
    """A run directory, opened for reading. Tables are loaded on first use and cached.

    >>> run.state, len(run.trace)
    ('finished', 300)

    Attributes
    ----------
    path
        The directory.
    config
        The resolved configuration.
    """

    @cached_property
    def trace(self) -> pd.DataFrame:
        """One row per applied update, in order.

        Columns: `update`, its number 0, 1, ..., each once; `worker` that computed the gradient, or
        -1 for a mean of several; `sequence`, the number of the gradient among those of its worker;
        `read_version`, updates applied before its snapshot was read; `staleness` = `update` -
        `read_version`; `batch_size`, in samples; `compute_seconds`, from snapshot received to
        gradient ready; `applied_seconds`, since the start of the run; `gradient_norm`, Euclidean.

        Raises
        ------
        NoRowsError
            The run keeps counts only, see `counts`.
        """
        return self._table(TRACE)

    @cached_property
    def members(self) -> pd.DataFrame:
        """One row per gradient of each update by a mean; columns as in the trace."""
        return self._checked(MEMBERS, member_defect)

    @cached_property
    def discarded(self) -> pd.DataFrame:
        """One row per gradient that arrived and was discarded; columns as in the trace.

        `update` is the number of the next update, and `discarded_seconds` the time.
        """
        return self._checked(DISCARDED, discarded_defect)

    @property
    def has_discarded(self) -> bool:
        """Whether a gradient was discarded."""
        if self.keeps_rows:
            return not self.discarded.empty
        return bool(self.staleness_counts.columns["discarded"].any())

    @cached_property
    def positions(self) -> pd.DataFrame:
        """One row per applied gradient if `data.sampling` is "epoch", none otherwise.

        Columns: `update` that it went into; `worker`; `position` of its first sample in the epochs
        of the worker's part, see `asgd.epochs`. Members of a mean are in the order of `members`.
        """
        return self._checked(POSITIONS, position_defect)

    @cached_property
    def counts(self) -> pd.DataFrame:
        """Exact numbers of updates and gradients by time, worker and staleness, also without rows.

        Columns: `update`, the first of a span of updates, all equally long; `worker` and
        `staleness`, as in the trace; `updates`, `members` and `discarded`, how many updates,
        gradients of means and discarded gradients there were of these; `compute_seconds`, their
        sum; `seconds`, when the last one was applied or discarded, 0 where there are only gradients
        of means. Gradients discarded after the last update are left out.
        """
        import pandas as pd

        return pd.DataFrame(self.staleness_counts.columns, copy=False)

    @cached_property
    def staleness_counts(self) -> StalenessCounts:
        """The counts of all updates; with rows they are counted now.

        Raises
        ------
        InputError
            A file is damaged or missing.
        """

        def read() -> StalenessCounts:
            counts, end = self._stored_counts(), self._updates_now()
            found = counts.adding(self._rows_of_gradients(counts.updates), end)
            # Else rows of members may be counted, or cut and written anew, after those of the trace
            # were read.
            if self._counted_now() != counts.updates or self._updates_now() < end:
                raise InputError(f"{self.path}: changed while it was read")
            return found

        places = [self.path / name for name in (TRACE, MEMBERS, DISCARDED, COUNTS)]
        found = undisturbed(read, *places)
        _ = self.recorded_updates  # refuses a lost end
        return found

    def _rows_of_gradients(self, begun: int) -> Iterator[tuple[str, Columns]]:
        """Yield the rows of the parts that are not counted, with the names of their tables."""
        count = begun
        for table in (TRACE, MEMBERS, DISCARDED):
            for part in self._parts(table, begun):
                for piece in read_pieces(part.path, TABLES[table], part.rows):
                    if table == TRACE:
                        self._refuse(TRACE, trace_defect(piece, count))
                        count += len(piece["update"])
                    yield table, piece

    @cached_property
    def loss(self) -> pd.DataFrame:
        """One row per loss evaluation.

        Columns: `update`, the number of applied updates; `seconds` from the start of the run to
        the last of them; `loss`, f at the parameters after them. Missing losses are an error,
        except those in `skipped` and those reported by the event `loss_damaged`.
        """
        return undisturbed(self._complete_losses, self.path / LOSS, self.path / SKIPPED)

    def _complete_losses(self) -> pd.DataFrame:
        # Read the state first: a run that finishes in between would seem to miss losses.
        reached = self.recorded_updates if self.state == "finished" else None
        loss = self._checked(LOSS, loss_defect)
        skipped = self._checked(SKIPPED, skipped_defect)["update"].to_numpy()
        missing = missing_losses(loss["update"].to_numpy(), skipped, self.config, reached)
        for update in set(missing) - reported_losses(self.events):
            self._refuse(LOSS, f"the loss after update {update} is missing; a part was lost")
        return loss

    @cached_property
    def skipped(self) -> pd.DataFrame:
        """One row per loss that was skipped for lack of time; column `update`."""
        return self._checked(SKIPPED, skipped_defect)

    def some_losses(self, most: int) -> list[float]:
        """Return at most `most` losses at equal distances, with the last, part by part."""

        def read() -> list[float]:
            rows = sum(part.rows for part in self._parts(LOSS))
            step = -(-rows // most) or 1
            found, next_row = [], (rows - 1) % step
            for part in self._parts(LOSS):
                found.append(part.columns("loss")["loss"][next_row::step])
                next_row += len(found[-1]) * step - part.rows
            return [float(loss) for some in found for loss in some]

        return undisturbed(read, self.path / LOSS)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row per loss evaluation, one column per metric of the problem.

        The index is `update`; a metric without a value is nan. Missing metrics are an error, except
        those reported by the event `metrics_damaged`.
        """
        places = [self.path / table for table in (LOSS, SKIPPED, METRICS)]
        return undisturbed(self._complete_metrics, *places)

    def _complete_metrics(self) -> pd.DataFrame:
        due = self._complete_losses()["update"].to_numpy()  # a loss is written after its metrics
        rows = self._table(METRICS).drop_duplicates(["update", "name"], keep="last")
        order = rows["name"].unique()
        table = rows.pivot(index="update", columns="name", values="value")
        missing = np.setdiff1d(due[due >= table.index.min()] if len(table) else [], table.index)
        told = any(event.get("event") == "metrics_damaged" for event in self.events)
        if len(missing) and not told:
            self._refuse(METRICS, f"update {missing[0]:.0f} is missing; a part was lost")
        return table.reindex(columns=order).rename_axis(columns=None)

    @property
    def parameters(self) -> Array:
        """The parameters x, shape (d,), of the newest saved state.

        A run that ended by itself, or by Ctrl-C, has saved its last state.

        Raises
        ------
        InputError
            None is saved.
        """
        return self._reached.parameters

    @property
    def parameters_update(self) -> int:
        """The number of updates that led to `parameters`."""
        return self._reached.update

    @cached_property
    def _reached(self) -> Reached:
        return Reached.of(self.path)

    @cached_property
    def outline(self) -> Outline:
        """Summary statistics of the trace, read part by part.

        Raises
        ------
        InputError
            A part is damaged or missing.
        """
        _ = self.recorded_updates  # refuses a lost end

        def read() -> Outline:
            known, counts = self._updates_now(), self._stored_counts()
            return outline(counts, self._parts(TRACE, counts.updates), known)

        return undisturbed(read, self.path / TRACE, self.path / COUNTS)

    def __repr__(self) -> str:
        return f"Run({in_a_line(self)})"

    def _repr_html_(self) -> str:
        """Return the headline numbers for a notebook."""
        import pandas as pd

        return str(pd.Series(summary(self), dtype=object).to_frame().to_html(header=False))

    def _table(self, table: str) -> pd.DataFrame:
        import pandas as pd

        if not self.keeps_rows and table in (TRACE, MEMBERS, DISCARDED, POSITIONS):
            raise NoRowsError(self.path)
        finished = table == TRACE and self.state == "finished"  # first, as it may finish meanwhile
        columns = undisturbed(lambda: self._columns(table), self.path / table)
        self._refuse(table, self._lost_end(finished, len(columns["update"])))
        return pd.DataFrame(columns, copy=False)

    def _checked(self, table: str, defect: Callable[[Columns], str | None]) -> pd.DataFrame:
        """Return a table after checking it as a whole."""
        found = self._table(table)
        self._refuse(
            table, defect({str(name): column.to_numpy() for name, column in found.items()})
        )
        return found


def as_path(path: str | Path) -> Path:
    """Return the path of a run.

    Raises
    ------
    InputError
        The argument is not a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"run = {type(path).__name__}: expected its directory")
    return Path(path)


def read_run(path: str | Path) -> Run:
    """Open a run directory.

    >>> opened = asgd.read_run(run.path)
    >>> bool(opened.trace["staleness"].mean() < opened.config.cluster.workers)
    True

    Raises
    ------
    InputError
        There is no run at `path`, it holds the repeats of a run (see `asgd.rundir.repeats`), or
        it contains links.
    """
    path = as_path(path)
    if (path / "record.json").is_file():
        raise InputError(f"{path}: a record of staleness, which has no parameters; expected a run")
    if not (path / "config.json").is_file():
        inside = next(path.glob("*/config.json"), None)
        hint = f"name one in it, such as {inside.parent}" if inside else "`asgd run` makes one"
        raise InputError(f"{path}: not a run directory (no config.json); {hint}")
    check_no_links(path)
    config = load_config(path / "config.json")
    if config.run.repeats > 1:
        raise InputError(f"{path}: holds repeats of a run; name one, such as {path}/repeat-000")
    return Run(path, config)


def describe_state(run: Run) -> tuple[str, str]:
    """Return the state of a run and a description of it.

    "finished", "interrupted" and "failed" are recorded by the run. Otherwise the state is "running"
    if the process is alive, "stopped" if it is gone, and "unknown" if it ran on another host and
    its heartbeat has stopped.
    """
    recorded, sign = run.state, read_heartbeat(run.path)
    alive = sign is not None and sign.presence in ("here", "elsewhere")
    if recorded == "finished" or (recorded != "unfinished" and not alive):
        return recorded, run.failure or run.ended_early or ""
    if sign is None:
        return recorded, "there is no heartbeat"
    heard = f"process {sign.pid} on {sign.host}, last heartbeat {_ago(sign.age)} ago"
    if sign.presence == "gone":
        return "stopped", f"the process ended without a message: {heard}"
    if sign.presence != "here":
        heard = f"{heard}; this host cannot tell more"
    return "running" if alive else "unknown", heard


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def summary(run: Run) -> dict[str, Any]:
    """Return the state and the headline numbers of a run as JSON values.

    Keys: `run`, `state` and `detail` (see `describe_state`), `problem`, `workers`, `updates`
    (applied so far), `of` (configured updates), `updates_per_second`, `mean_staleness`, `loss`
    (last evaluated) and `grade`, the fit of the geometric law in the stored profile; None if
    unknown.
    """
    config, found, loss = run.config, run.outline, run.last_row(LOSS)
    problem = config.problem
    state, detail = describe_state(run)
    return {
        "run": str(run.path),
        "state": state,
        "detail": detail,
        "problem": problem.kind if problem.dataset is None else problem.dataset,
        "workers": _workers(run),
        "updates": found.updates,
        "of": config.run.updates,
        "updates_per_second": found.updates / found.seconds if found.seconds else None,
        "mean_staleness": found.mean_staleness,
        "loss": None if loss is None else float(loss["loss"]),
        "grade": _grade(run),
    }


def in_a_line(run: Run) -> str:
    """Return the headline numbers of a run in one line, or the reason why it cannot be read."""
    try:
        facts = summary(run)
    except AsgdError as error:
        return f"{run.path}: unreadable, {error}"
    words = (
        f"{facts['run']}: {facts['problem']}, {facts['workers']} workers, {facts['state']}, "
        f"{facts['updates']} of {facts['of']} updates"
    )
    numbers = (("mean staleness", facts["mean_staleness"]), ("loss", facts["loss"]))
    return ", ".join(
        [words, *(f"{name} {value:.4g}" for name, value in numbers if value is not None)]
    )


def _workers(run: Run) -> int:
    """Return the number of workers after the last resize."""
    changes = [event for event in run.events if event.get("event") == "workers_changed"]
    return int(changes[-1]["after"]) if changes else run.config.cluster.workers


def _grade(run: Run) -> str | None:
    """Return the grade in the stored profile, None without a readable profile."""
    try:
        grade = read_json(run.path / "profile.json").get("grade")
    except InputError:
        return None
    return grade if isinstance(grade, str) else None
