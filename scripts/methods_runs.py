"""Seconds of a run until it reaches a loss, in virtual time and on Ray."""

from __future__ import annotations

import heapq
import math
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import msgspec
import numpy as np

from asgd.arrays import Array
from asgd.config.tables import RunConfig
from asgd.draws import WorkerDraws
from asgd.local_steps import Pushes
from asgd.problems.base import Problem, starting_point
from asgd.rundir.reader import read_run
from cluster import run
from cluster.core.messages import Gradient, Snapshot
from cluster.core.server import ParameterServer, Replies

FINE = 1.03  # ratio of two successive times at which the loss is evaluated
LARGE = 1e3  # a run is abandoned at so many times the first loss


class VirtualRun:
    """The server and the workers of a run, with a virtual clock.

    A worker computes a push at once; it arrives at the server after its compute and message times.

    Parameters
    ----------
    config, problem
        The run.
    message
        Seconds of a message, one way.
    """

    def __init__(self, config: RunConfig, problem: Problem, message: float) -> None:
        start = starting_point(problem, config.run.seed)
        self.server = ParameterServer(config, start, n_samples=problem.n_samples)
        self._draws = WorkerDraws(config, problem)
        self._pushes = Pushes(config, problem, self._draws)
        self._arrivals: list[tuple[float, int, Gradient]] = []
        self._number, self._message = count(), message
        for worker in range(config.cluster.workers):
            self._deliver(self.server.join(worker, 0.0), 0.0)

    def points(self, times: Iterator[float]) -> Iterator[tuple[float, Array]]:
        """Yield the parameters at each of these times; they are valid until the next one."""
        for until in times:
            while self._arrivals and self._arrivals[0][0] <= until:
                now, _, gradient = heapq.heappop(self._arrivals)
                self._deliver(self.server.receive(gradient, now), now)
            self.server.drain()
            if not self._arrivals:  # the server has stopped
                return
            yield until, self.server.parameters

    def _deliver(self, replies: Replies, now: float) -> None:
        for worker, reply in replies:
            if not isinstance(reply, Snapshot):
                continue
            number = reply.sequence
            pushed = self._pushes.push(
                worker, number, reply.parameters, reply.batch_size, reply.position
            )
            seconds = self._draws.compute_seconds(worker, number)
            gradient = Gradient(
                worker, number, reply.version, reply.epoch, np.array(pushed), seconds
            )
            arrival = now + seconds + 2 * self._message
            heapq.heappush(self._arrivals, (arrival, next(self._number), gradient))


def virtual_seconds(
    config: RunConfig, problem: Problem, target: float, longest: float, message: float = 0.0
) -> float:
    """Return the virtual seconds until the loss is at the target; inf if not within `longest`."""
    first = float(problem.loss(starting_point(problem, config.run.seed)))
    moments = iter(np.geomspace(1.0, longest, 2 + int(math.log(longest) / math.log(FINE))))
    with np.errstate(all="ignore"):
        for seconds, x in VirtualRun(config, problem, message).points(map(float, moments)):
            loss = float(problem.loss(x))
            if loss <= target:
                return seconds
            if not loss < LARGE * first:
                break
    return math.inf


def real_seconds(config: RunConfig, target: float, longest: float) -> float:
    """Return the seconds of a run on Ray until the loss is at the target; inf if never."""
    ends = {"target_loss": target, "max_seconds": longest}
    config = msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, **ends))
    with tempfile.TemporaryDirectory(prefix="methods-") as directory:
        loss = read_run(run(config, Path(directory) / "run")).loss
    reached = loss[loss["loss"] <= target]
    return float(reached["seconds"].iloc[0]) if len(reached) else math.inf
