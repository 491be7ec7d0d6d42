"""What a run, real or simulated, tells whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How a run stands.

    Attributes
    ----------
    update
        Updates applied so far, of `updates`.
    updates_per_second
        Over the last two seconds, and longer where none was made in them.
    mean_staleness
        Over the run so far, in updates; nan before the first.
    loss
        Evaluated last; None before the first.
    workers
        Worker processes alive; None in virtual time.
    evaluating
        Whether updates wait for losses to be evaluated.
    """

    update: int
    updates: int
    updates_per_second: float
    mean_staleness: float
    loss: float | None
    workers: int | None = None
    evaluating: bool = False
