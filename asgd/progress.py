"""What a run, real or simulated, reports to its caller while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How a run stands.

    Attributes
    ----------
    update
        Updates applied so far, of `updates`.
    updates_per_second
        Over the last two seconds, or longer if these saw no update.
    mean_staleness
        Over the run so far, in updates; nan before the first.
    loss
        Evaluated last; None before the first.
    workers
        Worker processes alive; None in virtual time.
    evaluating
        Whether updates are held up until losses have been evaluated.
    """

    update: int
    updates: int
    updates_per_second: float
    mean_staleness: float
    loss: float | None
    workers: int | None = None
    evaluating: bool = False


class CallbackError(Exception):
    """Carries an exception of the caller's callback past the handlers of the run's own failures.

    Attributes
    ----------
    raised
        The callback's exception, which is to leave the run as itself.
    """

    def __init__(self, raised: Exception) -> None:
        super().__init__(f"{type(raised).__name__}: {' '.join(str(raised).split())}".rstrip(": "))
        self.raised = raised


def call_back(progress: Callable[[Progress], None], standing: Progress) -> None:
    """Call the caller's callback.

    Raises
    ------
    CallbackError
        The callback raised.
    BrokenPipeError
        It writes where nobody reads any more, which interrupts a run.
    """
    try:
        progress(standing)
    except BrokenPipeError:
        raise
    except Exception as error:
        raise CallbackError(error) from error
