"""How stale and how fast a parameter server would be with another number of workers (ours).

The times come from a configuration (its compute-time law and `[simulation]` times) or from a run
that was measured. Workers beyond those that have times of their own take these in turn, so each
further worker is taken to have a core of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np

from analysis.moments import Closure
from analysis.queue import MeasuredTimes, Times, config_staleness, measured_cycles, queue_staleness
from analysis.setting import closure_of
from asgd.config import RunConfig
from asgd.delays import ComputeTime
from asgd.errors import InputError
from asgd.server_times import server_order
from asgd.staleness import ConstantPlusGeometric, StalenessLaw, named_law
from asgd.streams import stream
from asgd.trace import Run

_UPDATES = 20_000  # simulated where the speed is not known in closed form; 20 per worker if more
_CHUNK = 64  # times drawn at once for one worker


@dataclass(frozen=True)
class Pace:
    """How so many workers go.

    Attributes
    ----------
    law
        Staleness of an update.
    closure
        How the staleness of one update depends on that of the others.
    updates_per_second
        In the long run; inf where nothing takes any time.
    gradients
        In the mean that makes an update.
    """

    law: StalenessLaw
    closure: Closure
    updates_per_second: float
    gradients: int = 1


class PaceOf(Protocol):
    """Tells the pace of any number of workers."""

    @property
    def source(self) -> str:
        """Where the times are from, in words."""

    def __call__(self, workers: int) -> Pace:
        """Return the pace of so many workers."""


@dataclass(frozen=True)
class ConfiguredPace:
    """The pace that the times of a configuration give.

    Attributes
    ----------
    config
        Its `[cluster.compute_time]` and `[simulation]` times are used, its mode and schedule.
    """

    config: RunConfig

    @property
    def source(self) -> str:
        """Where the times are from, in words."""
        return "the compute-time law and the [simulation] times of the configuration"

    def __call__(self, workers: int) -> Pace:
        """Return the pace of so many workers."""
        config = with_workers(self.config, workers)
        times, simulation = ComputeTime.from_config(config.cluster), config.simulation
        dead = simulation.gradient_time + 2.0 * simulation.message_time
        if config.cluster.mode == "sync":
            return _synchronous(times, dead, simulation.service_time)
        speed = _speed(times, dead, simulation.service_time, config.cluster.schedule)
        if simulation.staleness != "server":
            mean = simulation.mean_staleness
            law = named_law(simulation.staleness, workers - 1 if mean is None else mean)
            return Pace(law, "iid", speed)
        return Pace(config_staleness(config), "pool", speed)


@dataclass(frozen=True)
class MeasuredPace:
    """The pace that the cycles of a run's workers give: all that a cycle is made of, waiting too.

    Attributes
    ----------
    run
        Recorded in mode async, its gradients applied as they arrived.
    cycles
        Seconds from one update of a worker to its next.
    """

    run: Run
    cycles: MeasuredTimes

    @classmethod
    def of(cls, run: Run) -> MeasuredPace:
        """Measure a run.

        Raises
        ------
        InputError
            Another mode or order, whose cycles say nothing of other numbers of workers; or a
            worker has fewer than two updates after the start-up.
        """
        cluster = run.config.cluster
        if (cluster.mode, cluster.schedule) != ("async", "free") or closure_of(run) == "iid":
            raise InputError(
                f"{run.path}: a plan takes the cycles of workers that wait for nobody; take "
                f"{run.path / 'config.json'} to plan from its configuration"
            )
        return cls(run, measured_cycles(run))

    @property
    def source(self) -> str:
        """Where the times are from, in words."""
        return f"the cycles measured in {self.run.path}"

    def __call__(self, workers: int) -> Pace:
        """Return the pace of so many workers."""
        known = self.cycles.samples
        times = MeasuredTimes([known[worker % len(known)] for worker in range(workers)])
        return Pace(queue_staleness(times), "pool", _speed(times, 0.0, 0.0, "free"))


def with_workers(config: RunConfig, workers: int) -> RunConfig:
    """Return a configuration with another number of workers; means of their own are repeated."""
    cluster = config.cluster
    compute = cluster.compute_time
    if isinstance(compute.mean, list):
        means = [compute.mean[worker % len(compute.mean)] for worker in range(workers)]
        compute = msgspec.structs.replace(compute, mean=means)
    cluster = msgspec.structs.replace(cluster, workers=workers, compute_time=compute)
    return msgspec.structs.replace(config, cluster=cluster)


def _synchronous(times: Times, dead: float, service: float) -> Pace:
    """Return the pace of rounds that wait for the slowest worker."""
    workers, rng = len(times.mean), stream(0, "rounds")
    rounds = max(100, _UPDATES // workers)
    slowest = np.zeros(rounds)
    for worker in range(workers):
        np.maximum(slowest, times.draw_many(worker, rounds, rng), out=slowest)
    seconds = float(slowest.mean()) + dead + workers * service
    return Pace(ConstantPlusGeometric(0), "iid", 1.0 / seconds if seconds else np.inf, workers)


def _speed(times: Times, dead: float, service: float, schedule: str) -> float:
    """Return updates per second in the long run.

    Workers that wait for nobody make one update a cycle each; otherwise the queue is simulated.
    """
    cycles = times.mean + dead
    if schedule == "free" and service == 0.0:
        return float((1.0 / cycles).sum()) if np.all(cycles > 0) else np.inf
    workers, rng = len(cycles), stream(0, "pace")
    updates = max(_UPDATES, 20 * workers)
    clocks = [_endless(times, worker, rng) for worker in range(workers)]
    order = server_order(
        lambda worker, _: dead + next(clocks[worker]),
        workers,
        updates,
        turns=rng.integers(workers, size=updates) if schedule == "uniform" else None,
        service_time=service,
    )
    half = updates // 2
    seconds = float(order.applied_seconds[-1] - order.applied_seconds[half - 1])
    return (updates - half) / seconds if seconds else np.inf


def _endless(times: Times, worker: int, rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from times.draw_many(worker, _CHUNK, rng).tolist()
