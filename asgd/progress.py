"""Progress callbacks of real and simulated runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a run.

    Attributes
    ----------
    update
        Updates applied so far, of `updates`.
    updates_per_second
        Over the last two seconds, or longer if these saw no update.
    mean_staleness
        Over the run so far, in updates; nan before the first.
    loss
        Last evaluated loss; None before the first.
    workers
        Live worker processes; None in virtual time.
    evaluating
        Whether updates wait for the evaluation of losses.
    metrics
        Metrics of the problem at the last evaluation, by name.
    joining
        Workers that the first update still waits for: they start, and import the problem.
    skipped
        Losses that were not evaluated, because there was no time.
    homeless
        Workers that wait for a node of the cluster.
    """

    update: int
    updates: int
    updates_per_second: float
    mean_staleness: float
    loss: float | None
    workers: int | None = None
    evaluating: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    joining: int = 0
    skipped: int = 0
    homeless: int = 0


class CallbackError(Exception):
    """Wraps an exception of the progress callback, so that the run's error handlers skip it.

    Attributes
    ----------
    raised
        The original exception, which the run raises at its end.
    """

    def __init__(self, raised: Exception) -> None:
        super().__init__(f"{type(raised).__name__}: {' '.join(str(raised).split())}".rstrip(": "))
        self.raised = raised


def call_back(progress: Callable[[Progress], None], now: Progress) -> None:
    """Call the caller's callback.

    Raises
    ------
    CallbackError
        The callback raised.
    BrokenPipeError
        The callback writes to a closed pipe; this interrupts the run.
    """
    try:
        progress(now)
    except BrokenPipeError:
        raise
    except Exception as error:
        raise CallbackError(error) from error
