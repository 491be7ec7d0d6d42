"""The state of a running server, for its launcher."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerStatus:
    """The state of a worker.

    Attributes
    ----------
    present
        Whether it has joined and not left.
    received
        Gradients received from it so far.
    computing
        Seconds since it got its snapshot, 0 if it owes no gradient.
    """

    present: bool
    received: int
    computing: float


@dataclass(frozen=True, kw_only=True)
class Status:
    """The state of a run.

    Attributes
    ----------
    version
        Updates applied so far.
    seconds
        Since the first snapshot was sent.
    mean_staleness
        Over all updates so far, nan before the first.
    workers
        Every worker that has joined or was expected to join.
    rejected
        Gradients refused as invalid.
    stopped
        Reason why the server has stopped, None while it runs.
    waiting
        Whether updates wait for the recorder, usually for the evaluation of losses.
    skipped
        Losses that were not evaluated, by this server.
    """

    version: int
    seconds: float
    mean_staleness: float
    workers: dict[int, WorkerStatus]
    rejected: int
    stopped: str | None
    waiting: bool = False
    skipped: int = 0
