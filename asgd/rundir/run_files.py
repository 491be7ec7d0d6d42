"""The files of a run directory, read without pandas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from asgd.arrays import Columns
from asgd.config.tables import RunConfig
from asgd.errors import InputError
from asgd.rundir.columns import COUNTS, TABLES, TRACE
from asgd.rundir.counts import StalenessCounts, counted_updates
from asgd.rundir.defects import trace_defect
from asgd.rundir.events import read_events
from asgd.rundir.parts import first_update, most_rows, parts_of, undisturbed, with_ends
from asgd.rundir.tables import Table, read_pieces
from asgd.stored_json import read_json

# The state after each event that changes it.
_ENDS = {
    "finish": "finished",
    "interrupted": "interrupted",
    "failed": "failed",
    "server_restored": "unfinished",
    "settings_changed": "unfinished",
}


@dataclass(frozen=True, repr=False)
class RunFiles:
    """The events of a run and the parts of its tables.

    Attributes
    ----------
    path
        The directory.
    config
        The resolved configuration.
    """

    path: Path
    config: RunConfig

    @property
    def keeps_rows(self) -> bool:
        """Whether there is a row for each update, not only counts of them."""
        return self.config.run.record == "updates"

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The events in order; torn lines are skipped."""
        return read_events(self.path / "events.jsonl")

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, host, cores and start time of the run."""
        return read_json(self.path / "environment.json")

    @property
    def state(self) -> str:
        """Return "finished", "interrupted", "failed", or "unfinished" if no end was recorded."""
        return _ENDS.get(str(self._end.get("event")), "unfinished")

    @property
    def failure(self) -> str | None:
        """Return the recorded reason of a failure, else None."""
        reason = self._end.get("reason") if self.state == "failed" else None
        return None if reason is None else str(reason)

    @property
    def ended_early(self) -> str | None:
        """Return why a finished run made fewer updates than configured, None if it did not."""
        reason = self._end.get("reason") if self.state == "finished" else None
        return None if reason is None else str(reason)

    @property
    def _end(self) -> dict[str, Any]:
        """The latest event that changed the state."""
        ends = (event for event in reversed(self.events) if event.get("event") in _ENDS)
        return next(ends, {})

    @cached_property
    def recorded_updates(self) -> int:
        """Number of updates on record, without reading all of it."""
        finished = self.state == "finished"  # before the trace, which may still grow
        count = undisturbed(self._updates_now, self.path / TRACE, self.path / COUNTS)
        self._refuse(TRACE, self._lost_end(finished, count))
        return count

    def _updates_now(self) -> int:
        begun = count = self._counted_now()
        for part in self._parts(TRACE, begun):
            if first_update(part.path) != count:
                self._refuse(TRACE, f"update {count} is missing; a part was lost")
            count += part.rows
        return count

    def _counted_now(self) -> int:
        return 0 if self.keeps_rows else counted_updates(self.path)

    def last_row(self, table: str) -> dict[str, Any] | None:
        """Return the last row of a table, None if it is empty; reads only the last part."""

        def read() -> dict[str, Any] | None:
            paths = parts_of(self.path / table)
            if not paths:
                return None
            with Table(paths[-1], TABLES[table], most_rows(self.config, table)) as part:
                return {name: column[-1] for name, column in part.columns(*TABLES[table]).items()}

        return undisturbed(read, self.path / table)

    def _parts(self, table: str, begun: int = 0) -> Iterator[Table]:
        """Open the parts of a table one after another, to read only a few columns.

        Parts are left out whose updates are counted: those before update `begun`.
        """
        for path, bound in with_ends(parts_of(self.path / table), begun):
            if bound < begun or (table == TRACE and first_update(path) < begun):
                continue
            with Table(path, TABLES[table], most_rows(self.config, table)) as part:
                yield part

    def _stored_counts(self) -> StalenessCounts:
        if self.keeps_rows:
            return StalenessCounts.none()
        return StalenessCounts.load(self.path, most_rows(self.config, COUNTS))

    def _columns(self, table: str) -> Columns:
        types, most = TABLES[table], most_rows(self.config, table)
        rows = {part.path: part.rows for part in self._parts(table)}
        total = sum(rows.values())
        if total > most:
            self._refuse(table, f"{total} rows, expected at most {most}")
        columns: Columns = {
            name: np.empty(total, object if kind is str else kind) for name, kind in types.items()
        }
        count = 0
        for path in rows:  # copied into place: joining the pieces would double the memory
            end = count + rows[path]
            for piece in read_pieces(path, types, rows[path]):
                if table == TRACE:  # members and losses are smaller and checked as a whole
                    self._refuse(TRACE, trace_defect(piece, count))
                for name, column in piece.items():
                    columns[name][count : count + len(column)] = column
                count += len(piece["update"])
            if count != end:
                self._refuse(table, f"{path.name} changed while it was read")
        return columns

    def _lost_end(self, finished: bool, count: int) -> str | None:
        """Return the fault if a finished run has too few updates."""
        updates = self.config.run.updates
        if not finished or count == updates or self.ended_early is not None:
            return None
        return f"{count} updates, but the finished run made {updates}; a part was lost"

    def _refuse(self, table: str, defect: str | None) -> None:
        if defect is not None:
            raise InputError(f"{self.path / table}: {defect}")
