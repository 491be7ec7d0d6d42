"""Faults without processes: duplicate, lost and late messages, and workers that die."""

from __future__ import annotations

import msgspec
import numpy as np

from asgd.config.tables import ComputeTimeConfig, RunConfig
from asgd.problems.base import Problem, starting_point
from asgd.problems.make import make_problem
from asgd.rules.base import Optimizer
from asgd.rules.make import make_rule
from asgd.rundir.columns import SHARED
from asgd.rundir.reader import Run
from asgd.schedules import learning_rate_schedule
from cluster.core.ledger import Record
from cluster.core.messages import Array, Gradient, Snapshot, Stop
from cluster.core.server import ParameterServer, Replies
from cluster.core.worker import Worker


class Crowd:
    """A server and its workers in one process; the test decides the order of messages.

    `at_hand` has each worker's unanswered snapshot, `sent` all gradients sent so far, and `stopped`
    the workers that were told to stop.
    """

    def __init__(self, config: RunConfig, problem: Problem | None = None) -> None:
        self.config = config
        self.problem = problem or make_problem(config)
        self.initial = starting_point(self.problem, config.run.seed)
        self.server = ParameterServer(config, self.initial, n_samples=self.problem.n_samples)
        self.workers = {w: Worker(config, w, self.problem) for w in range(config.cluster.workers)}
        self.at_hand: dict[int, Snapshot] = {}
        self.sent: dict[int, list[Gradient]] = {w: [] for w in self.workers}
        self.stopped: dict[int, str] = {}
        self.now = 0.0

    def join(self, worker: int) -> None:
        """Let a worker ask for its first snapshot and lose an earlier one."""
        self.at_hand.pop(worker, None)
        self._deliver(self.server.join(worker, self._tick()))

    def join_all(self) -> None:
        for worker in self.workers:
            self.join(worker)

    def add(self, worker: int) -> None:
        """Add a worker that is not in the configuration, and let it join."""
        self.workers[worker] = Worker(self.config, worker, self.problem)
        self.sent[worker] = []
        self.server.admit(worker)
        self.join(worker)

    def retire(self, worker: int) -> None:
        """Retire a worker after its pending gradient."""
        self._deliver(self.server.retire(worker, self._tick()))

    def push(self, worker: int) -> None:
        """Let a worker answer its snapshot."""
        gradient = self.workers[worker].compute(self.at_hand.pop(worker))
        self.sent[worker].append(gradient)
        self.send(gradient)

    def send(self, gradient: Gradient) -> None:
        """Deliver a gradient, new or old."""
        self._deliver(self.server.receive(gradient, self._tick()))

    def die(self, worker: int) -> None:
        """Let a worker die, and tell the server."""
        self.at_hand.pop(worker, None)
        self._deliver(self.server.leave(worker, self._tick()))

    def go_on(self) -> None:
        """Let the server continue with space in its ledger."""
        before = -1
        while before < self.server.version:
            before = self.server.version
            self._deliver(self.server.go_on(self._tick()))

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
                    reply.position,
                )
                self.at_hand[worker] = copy


def gradients_of(record: Record) -> list[list[tuple[int, int, int, int]]]:
    """Return (worker, sequence, read_version, batch_size) of each gradient of each update."""
    names = ("worker", "sequence", "read_version", "batch_size")
    rows = zip(*(record.trace[name].tolist() for name in names), strict=True)
    members = zip(*(record.members[name].tolist() for name in ("update", *names)), strict=True)
    shared: dict[int, list[tuple[int, int, int, int]]] = {}
    for update, *member in members:
        shared.setdefault(update, []).append(tuple(member))
    groups = []
    for update, row in enumerate(rows):
        assert (row[0] == SHARED) == (update in shared)
        groups.append(shared.get(update, [row]))
    return groups


def replay(config: RunConfig, problem: Problem, initial: Array, record: Record) -> list[Array]:
    """Return x_0, x_1, ... by replaying a trace."""
    rate = learning_rate_schedule(config.optimizer)
    points, optimizer = [initial.copy()], Optimizer(make_rule(config), initial)
    workers: dict[int, Worker] = {}
    positions = iter(record.positions["position"].tolist())
    for update, group in enumerate(gradients_of(record)):
        gradients = []
        for worker, sequence, read_version, size in group:
            position = next(positions, 0)  # none if samples are drawn with replacement
            snapshot = Snapshot(points[read_version], read_version, 0, sequence, size, position)
            if worker not in workers:
                workers[worker] = Worker(config, worker, problem)
            gradients.append(np.array(workers[worker].compute(snapshot).gradient))
        mean = gradients[0] if len(gradients) == 1 else np.sum(gradients, axis=0) / len(gradients)
        staleness = update - min(read_version for _, _, read_version, _ in group)
        points.append(points[-1].copy())
        read = points[group[0][2]]
        optimizer.apply(points[-1], mean, rate(update), update, staleness, read)
    return points


def replay_run(run: Run) -> list[Array]:
    """Return x_0, x_1, ... of a run by replaying its record, without compute times."""
    config = msgspec.structs.replace(
        run.config,
        cluster=msgspec.structs.replace(run.config.cluster, compute_time=ComputeTimeConfig()),
    )
    problem = make_problem(config)
    tables = {
        name: {key: column.to_numpy() for key, column in getattr(run, name).items()}
        for name in ("trace", "members", "discarded", "positions")
    }
    record = Record(**tables)
    initial = starting_point(problem, config.run.seed)
    return replay(config, problem, initial, record)
