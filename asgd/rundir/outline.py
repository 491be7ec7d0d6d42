"""What a run's parts say at a glance: of millions of updates, two columns, part by part."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from asgd.rundir.parts import TRACE
from asgd.rundir.reader import Run


@dataclass(frozen=True)
class Outline:
    """Sums over a trace.

    Attributes
    ----------
    updates
        How many are on record.
    seconds
        From the start of the run to the last of them; None if there is none.
    mean_staleness, recent_staleness
        Of all, and of the last tenth; None likewise.
    by_worker
        Updates of each worker.
    """

    updates: int
    seconds: float | None
    mean_staleness: float | None
    recent_staleness: float | None
    by_worker: dict[int, int]


def outline(run: Run) -> Outline:
    """Return what the trace of a run says at a glance.

    Raises
    ------
    InputError
        A part is damaged or missing.
    """
    known = run.recorded_updates
    tail = known - max(1, known // 10)
    updates = total = recent = 0
    by_worker: Counter[int] = Counter()
    for part in run.parts(TRACE):
        columns = part.columns("worker", "staleness")
        workers, counts = np.unique(columns["worker"], return_counts=True)
        by_worker.update(dict(zip(workers.tolist(), counts.tolist(), strict=True)))
        total += int(columns["staleness"].sum())
        recent += int(columns["staleness"][max(tail - updates, 0) :].sum())
        updates += part.rows
    if updates <= tail or not updates:
        return Outline(0, None, None, None, {})
    last = run.last_row(TRACE)
    return Outline(
        updates,
        None if last is None else float(last["applied_seconds"]),
        total / updates,
        recent / (updates - tail),
        dict(sorted(by_worker.items())),
    )
