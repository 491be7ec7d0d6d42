"""The state of a running server, for its launcher."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerStatus:
    """The state of a worker.

    Attributes
    ----------
    present
        Whether it has joined and has not left.
    received
        Gradients received from it so far.
    computing
        Seconds since it got the snapshot it owes a gradient for, 0 if it owes none.
    """

    present: bool
    received: int
    computing: float


@dataclass(frozen=True)
class Status:
    """The state of a run.

    Attributes
    ----------
    version
        Updates applied so far.
    seconds
        Since the first snapshot was handed out.
    mean_staleness
        Over all updates so far, nan before the first.
    workers
        Every worker that ever joined or was expected to.
    rejected
        Gradients refused because they cannot be applied.
    stopped
        Why the server wants no more gradients, None while it does.
    waiting
        Whether updates wait for the recorder, usually for the evaluation of losses.
    """

    version: int
    seconds: float
    mean_staleness: float
    workers: dict[int, WorkerStatus]
    rejected: int
    stopped: str | None
    waiting: bool = False
