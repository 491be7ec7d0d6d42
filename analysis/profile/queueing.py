"""Computes the staleness law of a parameter server from its times.

Each worker repeats: receive a snapshot, compute for a random time, push. The server applies pushes
one at a time in order of arrival and answers each with the new snapshot. For memoryless compute
times and no other delay the law is known in closed form; otherwise an event simulation of the
queue, without gradients, gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.profile.dependence import start_up
from analysis.profile.estimators import Counts
from analysis.profile.goodness import total_variation
from analysis.profile.stragglers import stragglers_of, taking_part
from analysis.profile.verdict import CLOSE
from asgd.arguments import count, shown
from asgd.arrays import Array, Integers
from asgd.config.make import Configuration, as_config
from asgd.config.tables import RunConfig
from asgd.delays import ComputeTime, CycleTimes
from asgd.errors import InputError
from asgd.rundir.reader import Run
from asgd.simulation.order import server_order
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric, GeometricMixture
from asgd.staleness.law import StalenessLaw
from asgd.streams import Seed, as_seed, stream

_WARM_UP = 10  # cycles of every worker before staleness is recorded
_CHUNK = 64  # times drawn at once for one worker
_GROUP = 100  # least number of updates behind each probability of a simulated law


class Times(Protocol):
    """The interface of compute times; `asgd.delays.ComputeTime` implements it."""

    @property
    def mean(self) -> Array:
        """Mean time of each worker in seconds, shape (workers,)."""

    @property
    def memoryless(self) -> bool:
        """Whether the times are exponential."""

    def draw_many(self, worker: int, size: int, rng: np.random.Generator) -> Array:
        """Return independent times of a worker in seconds, shape (size,)."""

    def draw_each(self, workers: Integers, rng: np.random.Generator) -> Array:
        """Return an independent time in seconds for each of `workers`, same shape (m,)."""


@dataclass(frozen=True)
class MeasuredTimes:
    """Times resampled from measured ones.

    Attributes
    ----------
    samples
        Measured times of each worker in seconds, shapes (m_i,).
    """

    samples: Sequence[Array]
    memoryless: bool = False

    def __post_init__(self) -> None:
        if not self.samples or any(len(sample) == 0 for sample in self.samples):
            raise InputError("samples = []: expected at least one time for each worker")

    @property
    def mean(self) -> Array:
        """Mean time of each worker in seconds, shape (workers,)."""
        return np.array([float(np.mean(sample)) for sample in self.samples])

    def draw_many(self, worker: int, size: int, rng: np.random.Generator) -> Array:
        """Return independent times of a worker in seconds, shape (size,)."""
        return rng.choice(self.samples[worker], size)

    def draw_each(self, workers: Integers, rng: np.random.Generator) -> Array:
        """Return an independent time in seconds for each of `workers`, same shape (m,)."""
        chosen = rng.random(len(workers)) * self._sizes[workers]
        return self._flat[self._begin[workers] + chosen.astype(np.int64)]

    @cached_property
    def _flat(self) -> Array:
        return np.concatenate(self.samples)

    @cached_property
    def _sizes(self) -> Integers:
        return np.array([len(sample) for sample in self.samples])

    @cached_property
    def _begin(self) -> Integers:
        return np.cumsum(self._sizes) - self._sizes


@dataclass(frozen=True)
class TimeTable:
    """Compute times for compiled loops: a drawn number becomes the time of the next worker.

    The number u becomes times[begin] u of worker i, or times[begin + int(u size)] if size is not 0.

    Attributes
    ----------
    times
        Means, or measured times one worker after the other, in seconds.
    begin, size
        Where a worker's times begin, and their number, 0 for a mean; shape (workers,).
    draw
        Draws a given number of values u.
    """

    times: Array
    begin: Integers
    size: Integers
    draw: Callable[[int, np.random.Generator], Array]

    @classmethod
    def of(cls, times: Times) -> TimeTable:
        """Make the table of configured or measured times."""
        if isinstance(times, MeasuredTimes):
            return cls(times._flat, times._begin, times._sizes, lambda n, rng: rng.random(n))
        if isinstance(times, ComputeTime):
            workers = np.arange(len(times.mean))
            return cls(times.mean, workers, np.zeros_like(workers), times.draw_relative)
        raise InputError(f"times = {shown(times)}: expected an asgd.ComputeTime")


@dataclass(frozen=True)
class ServerTimes:
    """The times that determine the order of pushes at a server.

    Attributes
    ----------
    times
        Compute times of the workers.
    dead_time
        Fixed part of each cycle outside the server, in seconds: the gradient, two messages.
    service_time
        Time of the server for one push, in seconds; pushes queue.
    """

    times: Times
    dead_time: float = 0.0
    service_time: float = 0.0

    @classmethod
    def from_config(cls, config: RunConfig) -> ServerTimes:
        """Return the times of a configured run, from its `[simulation]` section.

        Raises
        ------
        InputError
            A push takes the times of several gradients, whose sum has another law.
        """
        if (gradients := config.optimizer.gradients_per_push) > 1:
            raise InputError(
                f"optimizer.local_steps = {gradients}: expected none or 1 where staleness comes "
                "from the law of cluster.compute_time, as a push takes a sum of its times"
            )
        beside = CycleTimes.of(config.simulation)
        times = ComputeTime.from_config(config.cluster)
        return cls(times, beside.dead_time, beside.service_time)

    @property
    def workers(self) -> int:
        """P."""
        return len(self.times.mean)

    @property
    def memoryless(self) -> bool:
        """Whether the next worker is independent of the past."""
        return self.times.memoryless and not self.dead_time and not self.service_time

    def cycles(self, worker: int, rng: np.random.Generator) -> Iterator[float]:
        """Yield the durations in seconds of a worker's cycles, without service."""
        while True:
            for seconds in self.times.draw_many(worker, _CHUNK, rng).tolist():
                yield self.dead_time + seconds


def memoryless_law(rates: npt.ArrayLike) -> StalenessLaw:
    """Return the law of memoryless workers that push at these rates.

    Each update is one of worker i with probability p_i = rate_i / sum of the rates, independently
    of the past. So the law is geometric with mu = 1 - 1/P for P equal workers, else a mixture of
    geometric laws with mu_i = 1 - p_i and shares p_i (ours).

    Parameters
    ----------
    rates
        Pushes per unit of time, shape (workers,).
    """
    rate = np.asarray(rates, dtype=float)
    if rate.ndim != 1 or rate.size == 0 or not np.all(np.isfinite(rate) & (rate > 0)):
        raise InputError(f"rates = {rate}: expected one positive number per worker")
    if np.all(rate == rate[0]):
        return Geometric(1.0 - 1.0 / len(rate))
    different, workers = np.unique(rate, return_counts=True)
    p = different / rate.sum()
    return GeometricMixture(tuple((1.0 - p).tolist()), tuple((workers * p).tolist()))


def queue_staleness(
    times: Times,
    *,
    gradient_time: float = 0.0,
    message_time: float = 0.0,
    service_time: float = 0.0,
    updates: int = 100_000,
    seed: Seed = 0,
) -> StalenessLaw:
    """Return the stationary staleness law of the queue.

    >>> analysis.queue_staleness(asgd.ComputeTime("exponential", [1.0] * 4))
    Geometric(mu=0.75)

    The law is closed for memoryless times without other delays, see `memoryless_law`; otherwise it
    is the histogram of a simulation. Every delay that is not memoryless makes the law deviate from
    the geometric: for a fixed part r of a cycle and a memoryless part of mean c,
    P(tau = 0) = (1/P) (1 + r/c)^-(P-1) (ours).

    Parameters
    ----------
    times
        Compute times of the workers.
    gradient_time
        Fixed part of each computation, in seconds.
    message_time
        One-way delay between worker and server, in seconds.
    service_time
        Time of the server for one push, in seconds; pushes queue.
    updates
        Least number of simulated updates; 20 per worker if that is more.

    Raises
    ------
    InputError
        A time is negative.
    """
    if not hasattr(times, "draw_many"):
        raise InputError(f"times = {shown(times)}: expected an asgd.ComputeTime")
    updates = count(updates, "updates")
    beside = CycleTimes(gradient_time, message_time, service_time)
    server = ServerTimes(times, beside.dead_time, beside.service_time)
    return server_staleness(server, updates, as_seed(seed))


def server_staleness(server: ServerTimes, updates: int = 100_000, seed: int = 0) -> StalenessLaw:
    """Return the stationary staleness law of a server, see `queue_staleness`."""
    if server.memoryless:
        return memoryless_law(1.0 / server.times.mean)
    updates = max(updates, 20 * server.workers)
    staleness = simulate_queue(server, updates, stream(seed, "queue"))
    if np.all(staleness == staleness[0]):
        return ConstantPlusGeometric(int(staleness[0]))
    return _smoothed(staleness)


def config_staleness(config: Configuration, seed: int = 0) -> StalenessLaw:
    """Return the staleness law of a configured run, before it runs.

    >>> float(analysis.config_staleness({"cluster": {"workers": 4}}).mean())
    3.0

    Parameters
    ----------
    config
        Its compute-time law, its schedule and, in seconds, the times of `[simulation]` are used.
    seed
        Seed of the simulated queue.

    Raises
    ------
    InputError
        The configuration cannot be used.
    """
    config = as_config(config)
    if config.cluster.schedule == "uniform":
        return Geometric(1.0 - 1.0 / config.cluster.workers)
    return server_staleness(ServerTimes.from_config(config), seed=seed)


def measured_cycles(run: Run) -> MeasuredTimes:
    """Return the cycles of a run's workers: the times between updates of the same worker.

    A cycle contains computing, messages, service and waiting. A queue with these times and no
    other delay has the staleness law of the run unless neighbouring cycles depend on each other,
    as when workers wait for one another.

    Raises
    ------
    InputError
        A worker has fewer than two updates after the start-up.
    """
    trace = _steady(run).sort_values(["worker", "update"])
    cycles = []
    for worker, rows in trace.groupby("worker"):
        if len(rows) < 2:
            raise InputError(
                f"{run.path}: worker {worker} has fewer than two updates after the start-up"
            )
        cycles.append(np.diff(rows["applied_seconds"].to_numpy(dtype=float)))
    if not cycles:
        raise InputError(f"{run.path}: recorded no update")
    return MeasuredTimes(cycles)


@dataclass(frozen=True)
class QueueCheck:
    """Whether a queue of independent workers explains the staleness of a run.

    Attributes
    ----------
    law
        The law of the queue with the run's own cycles.
    distance
        Its total variation distance to the measured staleness.
    chance
        The expected distance if the queue is right, for as many independent updates.
    """

    law: StalenessLaw
    distance: float
    chance: float

    @property
    def holds(self) -> bool:
        """Whether the distance is within `CLOSE` of the expected one."""
        return self.distance < CLOSE + 2.0 * self.chance

    @property
    def sentence(self) -> str:
        """The answer as a sentence."""
        if self.holds:
            return f"Independent cycles explain the staleness: distance {self.distance:.2f}."
        return (
            f"Independent cycles do not explain the staleness: distance {self.distance:.2f}, "
            f"{self.chance:.2f} by chance. Workers wait for one another, for a processor or in a "
            "common stall, so their cycles move together and keep their order. Use the recorded "
            "turns."
        )


def check_queue(run: Run, updates: int = 20_000) -> QueueCheck:
    """Compare the staleness of a run with a queue that draws its measured cycles independently.

    Parameters
    ----------
    updates
        Number of simulated updates of the queue.

    Raises
    ------
    InputError
        A worker has fewer than two updates after the start-up.
    """
    counts = Counts.of(_steady(run)["staleness"].to_numpy())
    law = queue_staleness(measured_cycles(run), updates=updates)
    expected = law.pmf(counts.staleness)
    noise = np.sqrt(2.0 / np.pi * expected * (1.0 - expected) / counts.size)
    return QueueCheck(law, total_variation(law, counts), float(noise.sum()) / 2.0)


def explains_staleness(run: Run) -> QueueCheck | None:
    """Return `check_queue`; None if it does not apply or the run is too short.

    It does not apply where workers wait by design or gradients were discarded, nor without rows.
    """
    cluster = run.config.cluster
    if not run.keeps_rows or (cluster.mode, cluster.schedule) != ("async", "free"):
        return None
    if not run.discarded.empty:
        return None
    with suppress(InputError):
        return check_queue(run)
    return None


def _steady(run: Run) -> pd.DataFrame:
    """Return the updates after the start-up, without stragglers."""
    trace = run.trace[["update", "worker", "staleness", "applied_seconds"]]
    left_out = stragglers_of(run)
    if left_out:
        trace = trace[taking_part(trace["worker"].to_numpy(), left_out)]
    return trace.iloc[start_up(trace["staleness"].to_numpy(), trace["update"].to_numpy()) :]


def simulate_queue(server: ServerTimes, updates: int, rng: np.random.Generator) -> Integers:
    """Return the staleness of consecutive updates in steady state.

    Workers begin at random points of their cycle. The result starts after 10 updates per worker
    and after every worker's first push, but at the latest at half of the simulation.

    Parameters
    ----------
    updates
        Updates to simulate after the first 10 per worker.

    Returns
    -------
    Integers
        Shape (m,), m <= updates.
    """
    workers = server.workers
    clocks = [server.cycles(worker, rng) for worker in range(workers)]
    phases = rng.random(workers).tolist()

    def cycle(worker: int, sequence: int) -> float:
        seconds = next(clocks[worker])
        return seconds if sequence else phases[worker] * seconds

    warm_up = _WARM_UP * workers
    order = server_order(cycle, workers, warm_up + updates, service_time=server.service_time)
    begun = np.flatnonzero(order.sequence == 0)[-1] + 1
    return order.staleness[max(warm_up, min(int(begun), (warm_up + updates) // 2)) :]


def _smoothed(staleness: Integers) -> Empirical:
    """Return the frequencies, averaged over neighbours that have fewer than `_GROUP` updates.

    With thousands of workers the law has more values than there are updates.
    """
    law = Empirical.from_sample(staleness, tail_count=_GROUP)
    p = np.array(law.probabilities)
    sparse = p * len(staleness) < _GROUP
    group = np.empty(len(p), dtype=np.int64)
    number, held = -1, 0.0
    for l, (is_sparse, weight) in enumerate(zip(sparse.tolist(), p.tolist(), strict=True)):
        if l == 0 or not is_sparse or not sparse[l - 1] or held * len(staleness) >= _GROUP:
            number, held = number + 1, 0.0
        held += weight
        group[l] = number
    if len(p):
        p = (np.bincount(group, weights=p) / np.bincount(group))[group]
    return Empirical(tuple(p.tolist()), law.tail_mu)
