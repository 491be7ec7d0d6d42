"""The worker: read a snapshot, compute a gradient, push it; again until told to stop."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from asgd.arrays import Array
from asgd.config.tables import RunConfig
from asgd.draws import WorkerDraws
from asgd.local_steps import Pushes
from asgd.problems.base import Problem
from cluster.core.messages import Gradient, Reply, Snapshot, Stop


class Connection(Protocol):
    """A worker's connection to the server; both calls block until the server answers.

    They raise `ConnectionError` if the server is gone.
    """

    def join(self, worker: int) -> Reply:
        """Ask for the first snapshot."""
        ...

    def push(self, gradient: Gradient) -> Reply:
        """Deliver a gradient and ask for the next snapshot."""
        ...


class Worker:
    """One worker of a run.

    The random draws for its s-th gradient depend only on the seed, the worker's number and s. After
    computing a gradient, or the pseudo-gradient of its local steps, the worker sleeps for the added
    compute time. Only this object has the state of a local rule that is kept, and the rest that a
    compression leaves.

    Parameters
    ----------
    config, worker
        The run, and the number of the worker.
    problem
        Its problem.
    turn
        The lock of the workers that share the problem, held while computing but not while
        sleeping; None if the problem is not shared.
    """

    def __init__(
        self,
        config: RunConfig,
        worker: int,
        problem: Problem,
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        self.worker = worker
        self._shares = turn is not None
        self._turn = turn or nullcontext()
        self._draws = WorkerDraws(config, problem)
        self._pushes = Pushes(config, problem, self._draws)

    def run(self, connection: Connection) -> Stop:
        """Compute gradients until the server says stop; return its message."""
        reply = connection.join(self.worker)
        while isinstance(reply, Snapshot):
            reply = connection.push(self.compute(reply))
        return reply

    def compute(self, snapshot: Snapshot) -> Gradient:
        """Return the gradient at a snapshot, or the pseudo-gradient of local steps from it."""
        start = time.perf_counter()
        gradient = self._push(snapshot)
        added = self._draws.compute_seconds(self.worker, snapshot.sequence)
        if added > 0.0:
            time.sleep(added)
        return Gradient(
            self.worker,
            snapshot.sequence,
            snapshot.version,
            snapshot.epoch,
            gradient,
            time.perf_counter() - start,
        )

    def _push(self, snapshot: Snapshot) -> Array:
        with self._turn:
            gradient = self._pushes.push(
                self.worker,
                snapshot.sequence,
                snapshot.parameters,
                snapshot.batch_size,
                snapshot.position,
            )
            # The problem may reuse its memory in the next worker's turn.
            return gradient.copy() if self._shares else gradient
