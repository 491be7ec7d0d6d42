"""Summary statistics of a trace, from three columns, one part at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from asgd.rundir.tables import Table


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


def outline(parts: Iterable[Table], known: int) -> Outline:
    """Return the statistics of a trace of `known` updates, given its parts in order."""
    tail = known - max(1, known // 10)
    updates = total = recent = 0
    seconds = None
    by_worker: Counter[int] = Counter()
    for part in parts:
        columns = part.columns("worker", "staleness", "applied_seconds")
        workers, counts = np.unique(columns["worker"], return_counts=True)
        by_worker.update(dict(zip(workers.tolist(), counts.tolist(), strict=True)))
        total += int(columns["staleness"].sum())
        recent += int(columns["staleness"][max(tail - updates, 0) :].sum())
        seconds = float(columns["applied_seconds"][-1])
        updates += part.rows
    if updates <= tail or not updates:
        return Outline(0, None, None, None, {})
    return Outline(
        updates,
        seconds,
        total / updates,
        recent / (updates - tail),
        dict(sorted(by_worker.items())),
    )
