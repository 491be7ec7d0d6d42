"""The largest stable learning rates under staleness: three different limits.

On a mode of curvature a, where the gradient is a x, a run follows x' = x - eta a s_j with the
snapshot s_j of the worker that has the turn. Turns are random, so stability has three meanings:

- the mean E x decays below its limit; single runs can still diverge, as both signs cancel in it;
- E x^2 decays below the mean-square limit: runs converge, and so do their averages;
- almost every run decays below the almost-sure limit and grows above it. Between the last two
  limits runs converge with rare large excursions, which dominate every average: with noise, x has
  a heavy-tailed law without variance.

Ours; the equations are in section 5 of THEORY.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from analysis.exact.lyapunov import (
    IndependentLags,
    QueueTurns,
    Recursion,
    TypicalGrowth,
    mean_square_growth,
)
from analysis.exact.mean_square import MemorylessServer, independent_limit
from analysis.exact.stability import max_stable_learning_rate
from analysis.models.recorded_turns import RecordedTurns, ResampledTurns
from analysis.models.turns import Turns, pool_hazards, workers_of
from analysis.profile.queueing import ServerTimes, Times, memoryless_law
from asgd.arrays import Array
from asgd.errors import InputError
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric
from asgd.staleness.law import StalenessLaw
from asgd.streams import stream

Verdict = Literal["stable", "heavy tail", "diverges"]

# Standard errors between a learning rate and a limit for a definite verdict.
_SURE = 2.0

_TYPICAL = 400_000  # updates for the almost-sure limit
_POPULATION = 300_000  # updates of all paths of one population
_TURNS_EACH = 60  # least turns of each worker on a path
_FEWEST = 600  # least updates of a path
_START_UP_TURNS = 20  # of each worker, before a path is counted
_POPULATIONS = 6  # for the final estimate, at steps below and above the previous one
_APART = 0.03  # relative distance of these steps from it
_ROUGH = 0.25  # share of the paths in the first populations


@dataclass(frozen=True)
class Limit:
    """A largest learning rate.

    Attributes
    ----------
    value
        The learning rate.
    error
        Standard error of the value, 0 if it is exact.
    """

    value: float
    error: float = 0.0

    def __truediv__(self, curvature: float) -> Limit:
        return Limit(self.value / curvature, self.error / curvature)


@dataclass(frozen=True)
class StabilityLimits:
    """Three limits of the learning rate on one mode.

    Attributes
    ----------
    mean
        Limit of E x for independent lags or memoryless workers; otherwise limit of the mean
        recursion with the staleness law.
    mean_square
        Limit of E x^2; None if unknown.
    almost_sure
        Limit of single runs.
    """

    mean: Limit
    mean_square: Limit | None
    almost_sure: Limit

    def classify(self, learning_rate: float) -> Verdict:
        """Return "stable", "heavy tail" or "diverges"; within two standard errors, "heavy tail".

        "stable" means below the mean-square limit, so it needs that limit; "diverges" means above
        the almost-sure limit.
        """
        second, sure = self.mean_square, self.almost_sure
        if learning_rate >= sure.value + _SURE * sure.error:
            return "diverges"
        if second is not None and learning_rate < second.value - _SURE * second.error:
            return "stable"
        return "heavy tail"

    def at_curvature(self, curvature: float) -> StabilityLimits:
        """Return the limits on a mode with `curvature` times the curvature of this one."""
        second = self.mean_square and self.mean_square / curvature
        return StabilityLimits(self.mean / curvature, second, self.almost_sure / curvature)


def stability_limits(
    staleness: StalenessLaw | Times | ServerTimes | RecordedTurns,
    *,
    curvature: float = 1.0,
    workers: int | None = None,
    momentum: float = 0.0,
    staleness_aware: bool = False,
    independent: bool = False,
    mean_square: bool = True,
    seed: int = 0,
) -> StabilityLimits:
    """Return the limits of the mean, of the mean square, and of almost every run.

    >>> limits = analysis.stability_limits(asgd.ConstantPlusGeometric(7), curvature=2.0)
    >>> round(limits.almost_sure.value, 4)
    0.1045

    Parameters
    ----------
    staleness
        A law: turns by its hazards, (P2). Compute times of the workers, or `ServerTimes` with the
        other times of a cycle: the queue. Recorded turns: resampled, (P3).
    curvature
        Largest eigenvalue of the Hessian, > 0.
    workers
        P, for a law; default 1 + its mean. Otherwise it must equal the number of workers given.
    momentum
        beta of the heavy ball, in [0, 1).
    staleness_aware
        Whether the step is eta / (1 + tau).
    independent
        Whether every update draws its lag independently, as in the model of An, Lu, Ying, instead
        of on a server.
    mean_square
        Whether to simulate populations for the mean-square limit if it has no exact form; this is
        most of the work.
    seed
        Seed of the simulations.

    Raises
    ------
    InputError
        A number is outside its range; the mean of the law is P - 1 for no whole number P, and
        `workers` is not given; or independent lags come from something other than a law.
    """
    if not curvature > 0:
        raise InputError(f"curvature = {curvature}: expected a positive number")
    if not 0.0 <= momentum < 1.0:
        raise InputError(f"momentum = {momentum}: expected a number in [0, 1)")
    if not isinstance(staleness, StalenessLaw | ServerTimes | RecordedTurns):
        staleness = ServerTimes(staleness)
    if independent and not isinstance(staleness, StalenessLaw):
        raise InputError(
            f"staleness = {type(staleness).__name__}: expected a law with independent = True"
        )
    if workers is not None and workers < 1:
        raise InputError(f"workers = {workers}: expected an integer >= 1")
    if isinstance(staleness, StalenessLaw):
        remedy = "the argument `workers`, or `independent = True`"
        team = 0 if independent else workers or workers_of(staleness, "staleness", remedy)
        limits = _of_law(staleness, team, momentum, staleness_aware, mean_square, seed)
    elif workers not in (None, staleness.workers):
        raise InputError(f"workers = {workers}: expected {staleness.workers}, those of the turns")
    else:
        mode = _Mode(staleness, staleness.workers, momentum, staleness_aware, seed)
        limits = mode.limits(mean_square)
    return limits.at_curvature(curvature)


@lru_cache(maxsize=256)
def _of_law(
    law: StalenessLaw,
    workers: int,
    momentum: float,
    staleness_aware: bool,
    mean_square: bool,
    seed: int,
) -> StabilityLimits:
    return _Mode(law, workers, momentum, staleness_aware, seed).limits(mean_square)


@dataclass(frozen=True)
class _Mode:
    """A mode of curvature one under given turns; independent lags have no workers."""

    source: StalenessLaw | ServerTimes | RecordedTurns
    workers: int
    momentum: float
    staleness_aware: bool
    seed: int

    def limits(self, mean_square: bool) -> StabilityLimits:
        """Return its limits; the mean-square limit only on request or if it is cheap."""
        delay = self._constant_delay()
        if delay is not None:
            same = Limit(self._mean_limit(ConstantPlusGeometric(delay)))
            return StabilityLimits(same, same, same)
        exact = self._exact_mean_square()
        sure = _almost_sure_limit(self._typical, exact)
        second = None if exact is None else Limit(exact)
        if exact is None and mean_square:
            second = self._mean_square(sure.value)
        return StabilityLimits(self._mean(), second, sure)

    def _constant_delay(self) -> int | None:
        """Return the staleness if it is constant."""
        source = self.source
        if self.workers == 1:
            return 0
        if isinstance(source, StalenessLaw):
            return round(source.mean()) if source.var() < 1e-12 else None
        if isinstance(source, RecordedTurns):
            oldest = source.workers - 1
            late = zip(source.ranks, source.start_up, strict=True)
            return oldest if all(np.all(ranks[start:] == oldest) for ranks, start in late) else None
        rng = stream(self.seed, "times")
        one = source.times.draw_each(np.repeat(np.arange(self.workers), 16), rng)
        return self.workers - 1 if np.ptp(one) == 0.0 else None

    @cached_property
    def _recursion(self) -> Recursion:
        source, workers = self.source, self.workers
        rule = self.momentum, self.staleness_aware
        if isinstance(source, ServerTimes):
            return Recursion(lambda n, rng: QueueTurns(source, n, rng), workers, *rule)
        if isinstance(source, RecordedTurns):
            return Recursion(lambda n, rng: ResampledTurns(source, n, rng), workers, *rule)
        if not workers:
            length = source.support_length()
            lags = IndependentLags
            return Recursion(lambda n, rng: lags(source, length, n, rng), length, *rule, True)
        hazards = pool_hazards([source] * workers, stream(self.seed, "hazards"))
        if hazards.shape[1] == 1:
            hazards = np.repeat(hazards[:1], workers, axis=0)
        return Recursion(lambda n, rng: Turns(hazards, n, rng), workers, *rule)

    @property
    def _team(self) -> float:
        """P, for independent lags that of a server of the same mean staleness."""
        if isinstance(self.source, StalenessLaw) and not self.workers:
            return 1.0 + self.source.mean()
        return float(self.workers)

    @property
    def _start_up(self) -> int:
        # Near its limit a heavy ball forgets its start far more slowly than its velocity decays.
        forgets = 60.0 * self.momentum / (1.0 - self.momentum)
        return int(_START_UP_TURNS * self._team + self._recursion.slots + 10.0 + forgets)

    @property
    def _updates(self) -> int:
        return max(_FEWEST, int(_TURNS_EACH * self._team))

    @cached_property
    def _typical(self) -> TypicalGrowth:
        paths = max(16, _TYPICAL // (2 * self._updates))
        rng = stream(self.seed, "typical")
        return TypicalGrowth.draw(self._recursion, paths, 2 * self._updates, self._start_up, rng)

    def _mean_limit(self, law: StalenessLaw) -> float:
        return max_stable_learning_rate(
            law, 1.0, momentum=self.momentum, staleness_aware=self.staleness_aware
        )

    def _mean(self) -> Limit:
        """Return the limit of the mean, from the law or from the drawn staleness."""
        if isinstance(self.source, StalenessLaw):
            return Limit(self._mean_limit(self.source))
        if isinstance(self.source, ServerTimes) and self.source.memoryless:
            return Limit(self._mean_limit(memoryless_law(1.0 / self.source.times.mean)))
        staleness = self._typical.staleness()
        parts = np.array_split(staleness, 8)
        values = [self._mean_limit(Empirical.from_sample(part.ravel())) for part in parts]
        value = self._mean_limit(Empirical.from_sample(staleness.ravel()))
        return Limit(value, float(np.std(values, ddof=1) / np.sqrt(len(values))))

    def _exact_mean_square(self) -> float | None:
        """Return the exact mean-square limit of independent lags, or of memoryless workers.

        None for other turns, and for workers with unequal steps.
        """
        source = self.source
        if isinstance(source, StalenessLaw) and not self.workers:
            return independent_limit(
                source, momentum=self.momentum, staleness_aware=self.staleness_aware
            )
        if self.staleness_aware:
            return None
        if isinstance(source, ServerTimes) and source.memoryless:
            return MemorylessServer.of_rates(1.0 / source.times.mean, self.momentum).limit()
        if isinstance(source, Geometric):
            return MemorylessServer.of_rates(np.ones(self.workers), self.momentum).limit()
        return None

    def _mean_square(self, almost_sure: float) -> Limit:
        """Return the mean-square limit from populations of paths."""
        updates = self._updates
        paths = max(100, _POPULATION // updates)
        rng = stream(self.seed, "populations")

        def growth(step: float, share: float = 1.0) -> float:
            return mean_square_growth(
                self._recursion,
                step,
                paths=int(share * paths),
                updates=updates,
                start_up=self._start_up,
                rng=rng,
            )

        # L(0) is zero at the almost-sure limit, and L(2) is positive there.
        above, high = almost_sure, growth(almost_sure, _ROUGH)
        below, low = above, high
        while low > 0.0:
            above, high = below, low
            below *= 0.9
            low = growth(below, _ROUGH)
        middle = below + (above - below) * (-low / (high - low) if high > low else 0.5)
        steps = middle * (1.0 + _APART * np.tile([-1.0, 1.0], _POPULATIONS // 2))
        return _zero(steps, np.array([growth(step) for step in steps]))


def _almost_sure_limit(growth: TypicalGrowth, lower: float | None) -> Limit:
    """Return the smallest step at which L(0) is not negative.

    Parameters
    ----------
    lower
        A lower bound, such as the mean-square limit; None if none is known.
    """
    from scipy.optimize import brentq

    few = growth.part(-(-len(growth.read) // 4))
    recursion = growth.recursion
    low = lower or 0.02 * (1.0 - recursion.momentum) / recursion.slots
    while few(low * 1.3) < 0.0:
        low *= 1.3
    high = low * 1.3 * 1.05
    low /= 1.05
    while growth(high) <= 0.0:
        high *= 1.05
    while growth(low) >= 0.0:
        low /= 1.05
    step = float(brentq(growth, low, high, rtol=1e-5))
    slope = (growth(1.02 * step) - growth(0.98 * step)) / (0.04 * step)
    scatter = growth.of_paths(step).std(ddof=1) / np.sqrt(len(growth.read))
    return Limit(step, float(abs(scatter / slope)))


def _zero(steps: Array, values: Array) -> Limit:
    """Return the zero of the regression line of the values."""
    slope, value = np.polyfit(steps - steps.mean(), values, 1)
    away = value / slope
    residual = values - value - slope * (steps - steps.mean())
    scatter = np.sqrt(residual @ residual / (len(steps) - 2))
    spread = 1.0 / len(steps) + away**2 / np.sum((steps - steps.mean()) ** 2)
    return Limit(float(steps.mean() - away), float(abs(scatter / slope) * np.sqrt(spread)))
