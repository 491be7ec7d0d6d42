"""Faults for tests: messages repeated, lost and late, workers that die, without any process."""

from __future__ import annotations

from asgd.config import RunConfig
from asgd.problems import Problem, make_problem
from asgd.streams import stream
from cluster.ledger import Record
from cluster.messages import Array, Gradient, Snapshot, Stop
from cluster.server import ParameterServer, Replies
from cluster.worker import Worker


class Crowd:
    """A server and its workers in one process; the test decides which message arrives when.

    `at_hand` holds the snapshot each worker has received and not yet answered, `sent` every
    gradient a worker ever sent, `stopped` the workers that were told to stop.
    """

    def __init__(self, config: RunConfig, problem: Problem | None = None) -> None:
        self.config = config
        self.problem = problem or make_problem(config)
        self.initial = self.problem.initial_point(stream(config.run.seed, "initial"))
        self.server = ParameterServer(config, self.initial)
        self.workers = {w: Worker(config, w, self.problem) for w in range(config.cluster.workers)}
        self.at_hand: dict[int, Snapshot] = {}
        self.sent: dict[int, list[Gradient]] = {w: [] for w in self.workers}
        self.stopped: dict[int, str] = {}
        self.now = 0.0

    def join(self, worker: int) -> None:
        """Let a worker ask for its first snapshot; what it had at hand is gone."""
        self.at_hand.pop(worker, None)
        self._deliver(self.server.join(worker, self._tick()))

    def join_all(self) -> None:
        for worker in self.workers:
            self.join(worker)

    def push(self, worker: int) -> None:
        """Let a worker answer the snapshot it has at hand."""
        gradient = self.workers[worker].compute(self.at_hand.pop(worker))
        self.sent[worker].append(gradient)
        self.send(gradient)

    def send(self, gradient: Gradient) -> None:
        """Deliver a gradient, new or old."""
        self._deliver(self.server.receive(gradient, self._tick()))

    def die(self, worker: int) -> None:
        """Let a worker die; the server is told."""
        self.at_hand.pop(worker, None)
        self._deliver(self.server.leave(worker, self._tick()))

    def _tick(self) -> float:
        self.now += 1.0
        return self.now

    def _deliver(self, replies: Replies) -> None:
        for worker, reply in replies:
            if isinstance(reply, Stop):
                self.stopped[worker] = reply.reason
            else:
                copy = Snapshot(
                    reply.parameters.copy(),
                    reply.version,
                    reply.epoch,
                    reply.sequence,
                    reply.batch_size,
                )
                self.at_hand[worker] = copy


def replay(config: RunConfig, problem: Problem, initial: Array, record: Record) -> list[Array]:
    """Return x_0, x_1, ...: the trace applied again, one gradient after another."""
    worker_of = {w: Worker(config, w, problem) for w in set(record.trace["worker"].tolist())}
    points = [initial.copy()]
    rows = zip(*(record.trace[name].tolist() for name in record.trace), strict=True)
    for (
        update,
        worker,
        sequence,
        read_version,
        *_,
    ) in rows:
        assert update == len(points) - 1
        size = int(record.trace["batch_size"][update])
        snapshot = Snapshot(points[read_version], read_version, 0, sequence, size)
        gradient = worker_of[worker].compute(snapshot).gradient
        points.append(points[-1] - config.optimizer.learning_rate * gradient)
    return points
