"""Staleness and speed of a parameter server with another number of workers (ours).

The times come from a configuration (its compute-time law and `[simulation]` times) or from a
measured run. Workers beyond those that have times reuse them in turn, so every further worker is
assumed to have its own core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Protocol

import msgspec
import numpy as np

from analysis.exact.limits import StabilityLimits, stability_limits
from analysis.exact.linear_rules import linear_rule
from analysis.planning.gradient_cost import GradientCost
from analysis.planning.paths import TurnsOf
from analysis.planning.turns import IndependentReads, QueueReads, Rounds
from analysis.prediction.setting import closure_of
from analysis.profile.queueing import (
    MeasuredTimes,
    ServerTimes,
    measured_cycles,
    server_staleness,
)
from asgd.config.tables import RunConfig
from asgd.delays import ComputeTime
from asgd.errors import InputError
from asgd.rules.base import Rule
from asgd.rundir.reader import Run
from asgd.simulation.order import server_order
from asgd.staleness.by_name import named_law
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric
from asgd.staleness.law import StalenessLaw
from asgd.streams import stream

MOST_LIMITED = 512  # workers for which limits are computed

_UPDATES = 20_000  # simulated updates if law or speed have no closed form; 20 per worker if more
_BOUNDED_PATHS = 16  # simulated servers if staleness is bounded


@dataclass(frozen=True)
class Pace:
    """Staleness and speed for a number of workers.

    Attributes
    ----------
    law
        Staleness of an update.
    updates_per_second
        Long-run average; inf if nothing takes any time.
    turns
        Makes the turns of servers with these workers.
    server
        The underlying times; None if lags are independent or staleness is bounded.
    gradients
        Number of gradients whose mean makes an update.
    """

    law: StalenessLaw
    updates_per_second: float
    turns: TurnsOf
    server: ServerTimes | None = None
    gradients: int = 1

    def limits(self, rule: Rule, workers: int, mean_square: bool) -> StabilityLimits | None:
        """Return the limits of the learning rate on a mode of curvature one.

        None for a rule that they do not cover, and for more than `MOST_LIMITED` workers, which
        would take too long. The mean-square limit only on request or if it is cheap.
        """
        linear = linear_rule(rule, self.law.mean())
        if linear is None or workers > MOST_LIMITED:
            return None
        known = linear.momentum, linear.staleness_aware, mean_square
        if self.server is None:
            return _limits(self.law, *known, independent=True)
        server, times = self.server, self.server.times
        if isinstance(times, ComputeTime):
            law = times.law, tuple(times.mean.tolist()), times.variation
            return _known_limits(law, server.dead_time, server.service_time, *known)
        return _limits(server, *known)


@lru_cache(maxsize=64)
def _known_limits(
    law: tuple[str, tuple[float, ...], float],
    dead_time: float,
    service_time: float,
    *rule: Any,
) -> StabilityLimits:
    """Return the limits under a law of compute times, cached per law."""
    name, mean, variation = law
    times = ComputeTime(name, np.array(mean), variation)
    return _limits(ServerTimes(times, dead_time, service_time), *rule)


def _limits(
    staleness: StalenessLaw | ServerTimes,
    momentum: float,
    staleness_aware: bool,
    mean_square: bool,
    independent: bool = False,
) -> StabilityLimits:
    return stability_limits(
        staleness,
        momentum=momentum,
        staleness_aware=staleness_aware,
        mean_square=mean_square,
        independent=independent,
    )


class PaceOf(Protocol):
    """Returns the pace of any number of workers."""

    @property
    def source(self) -> str:
        """Where the times come from, as a phrase."""

    @property
    def cost(self) -> GradientCost | None:
        """The cost of a gradient by batch size; None if unknown."""

    def __call__(self, workers: int, batch_size: int) -> Pace:
        """Return the pace of `workers` with batches of `batch_size`."""


@dataclass(frozen=True)
class ConfiguredPace:
    """The pace from the times of a configuration.

    Attributes
    ----------
    config
        The source of `[cluster.compute_time]`, `[simulation]` times, mode and schedule.
    cost
        Gradient cost, instead of `simulation.gradient_time`; None if not measured.

    Raises
    ------
    InputError
        Gradients are buffered or discarded.
    """

    config: RunConfig
    cost: GradientCost | None = None

    def __post_init__(self) -> None:
        _refuse_policy(self.config)

    @property
    def source(self) -> str:
        """Where the times come from, as a phrase."""
        return "the compute-time law and the [simulation] times of the configuration"

    def __call__(self, workers: int, batch_size: int) -> Pace:
        """Return the pace of `workers` with batches of `batch_size`."""
        config = with_workers(self.config, workers)
        if self.cost is not None:
            seconds = self.cost.seconds(batch_size)
            times = msgspec.structs.replace(config.simulation, gradient_time=seconds)
            config = msgspec.structs.replace(config, simulation=times)
        server, cluster = ServerTimes.from_config(config), config.cluster
        if cluster.mode == "sync":
            return _synchronous(server)
        if cluster.mode == "bounded":
            return _bounded(server, cluster.max_staleness)
        speed, simulation = _speed(server, cluster.schedule), config.simulation
        if simulation.staleness != "server":
            mean = simulation.mean_staleness
            law = named_law(simulation.staleness, workers - 1 if mean is None else mean)
            return Pace(law, speed, partial(IndependentReads, law, speed))
        drawn = cluster.schedule == "uniform"
        turns = partial(QueueReads, server, drawn=drawn)
        # a drawn order is independent of the times: it has the limits of memoryless workers
        alike = ServerTimes(ComputeTime("exponential", np.ones(workers))) if drawn else server
        return Pace(server_staleness(alike, _UPDATES), speed, turns, alike)


@dataclass(frozen=True)
class MeasuredPace:
    """The pace from the measured cycles of a run's workers, which include all waiting.

    Attributes
    ----------
    run
        Recorded in mode async; gradients were applied in order of arrival.
    cycles
        Seconds from one update of a worker to its next.
    cost
        Gradient cost by batch size; None if not measured.
    """

    run: Run
    cycles: MeasuredTimes
    cost: GradientCost | None = None

    @classmethod
    def of(cls, run: Run, cost: GradientCost | None = None) -> MeasuredPace:
        """Measure the cycles of a run.

        Raises
        ------
        InputError
            Another mode or order, whose cycles do not carry over to other numbers of workers; or
            a worker has fewer than two updates after the start-up.
        """
        _refuse_policy(run.config)
        cluster = run.config.cluster
        free = (cluster.mode, cluster.schedule) == ("async", "free")
        if not free or closure_of(run) == "iid":
            raise InputError(
                f"{run.path}: expected a run without workers that wait for each other; to plan "
                f"from its configuration, take {run.path / 'config.json'}"
            )
        return cls(run, measured_cycles(run), cost or GradientCost.of_run(run))

    @property
    def source(self) -> str:
        """Where the times come from, as a phrase."""
        return f"the cycles measured in {self.run.path}"

    @cached_property
    def _batch_size(self) -> float:
        return float(self.run.trace["batch_size"].mean())

    def __call__(self, workers: int, batch_size: int) -> Pace:
        """Return the pace of `workers` with batches of `batch_size`."""
        known = self.cycles.samples
        more = self.cost.per_sample * (batch_size - self._batch_size) if self.cost else 0.0
        cycles = [np.maximum(known[w % len(known)] + more, 0.0) for w in range(workers)]
        server = ServerTimes(MeasuredTimes(cycles))
        speed = _speed(server, "free")
        return Pace(server_staleness(server, _UPDATES), speed, partial(QueueReads, server), server)


def _refuse_policy(config: RunConfig) -> None:
    """Refuse policies under which gradients are buffered, chosen or discarded."""
    for key in ("discard_above", "gradients_per_update"):
        value = getattr(config.cluster, key)
        if value is not None:
            raise InputError(
                f"cluster.{key} = {value} in mode {config.cluster.mode!r}: expected none for a "
                "plan, which cannot tell speed and staleness under it; `asgd simulate` shows both"
            )


def with_workers(config: RunConfig, workers: int) -> RunConfig:
    """Return a configuration with another number of workers; per-worker means are repeated."""
    cluster = config.cluster
    compute = cluster.compute_time
    if isinstance(compute.mean, list):
        means = [compute.mean[worker % len(compute.mean)] for worker in range(workers)]
        compute = msgspec.structs.replace(compute, mean=means)
    cluster = msgspec.structs.replace(cluster, workers=workers, compute_time=compute)
    return msgspec.structs.replace(config, cluster=cluster)


def _synchronous(server: ServerTimes) -> Pace:
    """Return the pace of rounds; each waits for the slowest worker."""
    rounds = max(100, _UPDATES // server.workers)
    turns = Rounds(server, rounds, stream(0, "rounds"))
    turns.next(0)
    seconds = float(turns.seconds.mean())
    speed = 1.0 / seconds if seconds else np.inf
    law = ConstantPlusGeometric(0)
    return Pace(law, speed, partial(Rounds, server), gradients=server.workers)


def _bounded(server: ServerTimes, bound: int) -> Pace:
    """Return the pace of bounded staleness, where workers ahead wait, from simulated servers."""
    make = partial(QueueReads, server, bound=bound)
    turns, staleness = make(_BOUNDED_PATHS, stream(0, "bounded")), []
    half = max(500, 10 * server.workers)
    begun = 0.0
    for k in range(2 * half):
        reads = turns.next(k)
        if k == half - 1:
            begun = float(turns.seconds.mean())
        elif k >= half:
            first = np.searchsorted(reads.path, np.arange(_BOUNDED_PATHS))
            staleness.append(k - np.minimum.reduceat(reads.version, first))
    law = Empirical.from_sample(np.concatenate(staleness))
    seconds = float(turns.seconds.mean()) - begun
    return Pace(law, half / seconds if seconds else np.inf, make)


def _speed(server: ServerTimes, schedule: str) -> float:
    """Return updates per second in the long run.

    Workers that do not wait make one update per cycle each; otherwise the queue is simulated.
    """
    times = server.times
    cycles = times.mean + server.dead_time
    if schedule == "free" and server.service_time == 0.0:
        return float((1.0 / cycles).sum()) if np.all(cycles > 0) else np.inf
    workers, rng = len(cycles), stream(0, "pace")
    updates = max(_UPDATES, 20 * workers)
    clocks = [server.cycles(worker, rng) for worker in range(workers)]
    order = server_order(
        lambda worker, _: next(clocks[worker]),
        workers,
        updates,
        turns=rng.integers(workers, size=updates) if schedule == "uniform" else None,
        service_time=server.service_time,
    )
    half = updates // 2
    seconds = float(order.applied_seconds[-1] - order.applied_seconds[half - 1])
    return (updates - half) / seconds if seconds else np.inf
