"""Summary statistics of a trace, from the tallies that its parts store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from asgd.rundir.counts import StalenessCounts
from asgd.rundir.parts import first_update
from asgd.rundir.tables import DamagedTableError, Table


@dataclass(frozen=True)
class Outline:
    """Summary statistics of a trace.

    Attributes
    ----------
    updates
        Number of updates on record.
    seconds
        From the start of the run to the last update; None without updates.
    mean_staleness, recent_staleness
        Over all updates, and over the last tenth; None without updates.
    by_worker
        Number of updates of each worker.
    """

    updates: int
    seconds: float | None
    mean_staleness: float | None
    recent_staleness: float | None
    by_worker: dict[int, int]


class Tally(msgspec.Struct):
    """Totals of a part of a trace, stored in the part, so an outline need not read its rows.

    Attributes
    ----------
    rows
        Number of updates.
    staleness
        Sum over them.
    seconds
        From the start of the run to the last of them.
    by_worker
        Number of updates of each worker.
    """

    rows: int = 0
    staleness: int = 0
    seconds: float = 0.0
    by_worker: dict[int, int] = {}  # msgspec copies it

    @classmethod
    def of(cls, part: Table) -> Tally:
        """Return the tally of a part of a trace.

        Raises
        ------
        DamagedTableError
            It cannot be read or does not belong to the part.
        """
        tally = cls()
        if part.note is None:
            tally.add(part.columns("worker", "staleness", "applied_seconds"))
            return tally
        try:
            tally = msgspec.json.decode(part.note, type=cls)
        except msgspec.MsgspecError as error:
            raise DamagedTableError(f"{part.path}: its tally cannot be read ({error})") from None
        if tally.rows != part.rows:
            raise DamagedTableError(f"{part.path}: its tally is of {tally.rows} rows")
        return tally

    @classmethod
    def of_counts(cls, counts: StalenessCounts) -> Tally:
        """Return the tally of counted updates."""
        columns = counts.columns
        applied = columns["updates"] > 0
        worker = columns["worker"][applied]
        updates = columns["updates"][applied]
        tally = cls(
            counts.updates,
            int(updates @ columns["staleness"][applied]),
            float(columns["seconds"][applied].max(initial=0.0)),
        )
        found = ((int(one), int(updates[worker == one].sum())) for one in np.unique(worker))
        tally._count(dict(found))
        return tally

    def add(self, columns: Mapping[str, Any]) -> None:
        """Add the next rows of a trace."""
        workers, counts = np.unique(np.asarray(columns["worker"], int), return_counts=True)
        self._count(dict(zip(workers.tolist(), counts.tolist(), strict=True)))
        self.rows += len(columns["worker"])
        self.staleness += int(np.sum(columns["staleness"]))
        self.seconds = float(columns["applied_seconds"][-1])

    def join(self, following: Tally) -> None:
        """Add the tally of the next part."""
        self._count(following.by_worker)
        self.rows += following.rows
        self.staleness += following.staleness
        self.seconds = following.seconds

    def _count(self, by_worker: Mapping[int, int]) -> None:
        for worker, count in by_worker.items():
            self.by_worker[worker] = self.by_worker.get(worker, 0) + count


def outline(counts: StalenessCounts, parts: Iterable[Table], known: int) -> Outline:
    """Return the statistics of a trace of `known` updates or more, given its parts in order.

    Updates before the first part are counted. The last tenth then begins with a span of them.

    Raises
    ------
    DamagedTableError
        An update is missing, maybe because rows were counted or cut since they were known.
    """
    tail = known - max(1, known // 10)
    whole, recent = Tally.of_counts(counts), 0
    if whole.rows > tail:
        tail -= tail % counts.span
        late = counts.columns["update"] >= tail
        recent = int(np.sum((counts.columns["updates"] * counts.columns["staleness"])[late]))
    for part in parts:
        tally, before = Tally.of(part), whole.rows
        if first_update(part.path) != before:
            raise DamagedTableError(f"{part.path}: expected update {before} first")
        if before >= tail:
            recent += tally.staleness
        elif before + tally.rows > tail:
            recent += int(part.columns("staleness")["staleness"][tail - before :].sum())
        whole.join(tally)
    if whole.rows < known:
        raise DamagedTableError(f"the trace has {whole.rows} updates, expected {known}")
    if not whole.rows:
        return Outline(0, None, None, None, {})
    return Outline(
        whole.rows,
        whole.seconds,
        whole.staleness / whole.rows,
        recent / (whole.rows - tail),
        dict(sorted(whole.by_worker.items())),
    )
