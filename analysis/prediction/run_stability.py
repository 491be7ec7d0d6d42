"""The stability of a run: its verdict, the largest stable learning rate, the distance to it (ours).

These are the three limits of `analysis.exact.limits` for the run's turns and rule, over the leading
curvature of the Hessian, at the start of the run and at the end of its prediction. Gradient noise
that grows with the distance from the minimum lowers the limits, and so do other modes through it;
this is not included, but a run with predicted paths that diverge is never called stable. Clipped
gradients count as unclipped: a clipped run above its limit oscillates. Under a schedule the largest
learning rate counts. Rules that the limits do not cover get none, and neither do local steps,
compressed gradients and batches that are not independent draws from all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from analysis.exact.limits import StabilityLimits, Verdict, stability_limits
from analysis.exact.linear_rules import LinearRule, linear_rule
from analysis.exact.stability import spectral_radius
from analysis.prediction.lanczos import largest_eigenvalues
from analysis.prediction.setting import Setting
from asgd.arrays import Array
from asgd.problems.base import Problem
from asgd.streams import stream

LEADING = 6  # number of modes
DENSE_DIM = 64  # up to here a full eigendecomposition is cheaper than Lanczos iterations
_TOLERANCE = 1e-4  # relative tolerance of the eigenvalues
_FEW_STARTS = 4  # of repeats that start at different points; more would cost as much as paths
FEW_DIVERGE = 0.02  # share of diverged paths up to which they do not make a run unstable


@dataclass(frozen=True, kw_only=True)
class PointStability:
    """Stability at the curvatures of one point.

    Attributes
    ----------
    learning_rate
        Learning rate of the run, the largest under a schedule.
    curvature
        Leading eigenvalues of the Hessian, largest first; of a network only the largest.
    spectral_radius
        Slowest factor per update of each of these modes; the mean decays if it is below one.
    limits
        Limits on the leading mode; None if no curvature is positive, or for the rule.
    momentum
        beta of the run's rule.
    additive_noise
        Whether the gradient noise is constant; noise that grows lowers the limits.
    covered
        Whether the limits cover the run's rule and data.
    dependence
        The configuration key by which batches are not independent draws from all samples, as the
        limits assume; or None.
    """

    learning_rate: float
    curvature: list[float]
    spectral_radius: list[float]
    limits: StabilityLimits | None
    momentum: float
    additive_noise: bool
    covered: bool = True
    dependence: str | None = None

    @property
    def limit(self) -> float:
        """The largest stable learning rate, from the mean square; inf without curvature."""
        if self.limits is None:
            return np.inf
        return (self.limits.mean_square or self.limits.almost_sure).value

    @property
    def almost_sure(self) -> float:
        """The learning rate above which almost every run grows; inf without curvature."""
        return np.inf if self.limits is None else self.limits.almost_sure.value

    @property
    def factor(self) -> float:
        """The limit over the learning rate; above one is stable."""
        return self.limit / self.learning_rate

    @property
    def verdict(self) -> Verdict:
        """The learning rate compared with the limits."""
        return "stable" if self.limits is None else self.limits.classify(self.learning_rate)


class StabilityAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The stability answer that a prediction stores, with the numbers of the tightest point.

    Attributes
    ----------
    sentence
        The answer as text.
    verdict
        The learning rate compared with its limits; None if no curvature is positive.
    learning_rate, largest_stable_learning_rate, diverges_from, factor
        The run's learning rate; its limit; the almost-sure limit; the limit over the learning
        rate. None without a limit.
    start, end
        Stability at x_0 and at the predicted end; None if that is not finite.
    """

    sentence: str
    verdict: Verdict | None
    learning_rate: float
    largest_stable_learning_rate: float | None
    diverges_from: float | None
    factor: float | None
    start: PointStability
    end: PointStability | None


@dataclass(frozen=True)
class DivergedPaths:
    """The simulated paths of a model, and how many of them diverged.

    Attributes
    ----------
    model
        Label of the model.
    """

    model: str
    paths: int
    diverged: int

    @property
    def share(self) -> float:
        """Share of the paths that diverged."""
        return self.diverged / self.paths


@dataclass(frozen=True)
class RunStability:
    """Stability of a run at its start and at its predicted end.

    Attributes
    ----------
    start, end
        At x_0 and at the mean of the predicted final points; `end` is None if that is not finite.
    paths
        Paths of its prediction, if any diverged.
    uncovered
        The part of the run that the limits do not cover, in words.
    """

    start: PointStability
    end: PointStability | None
    paths: DivergedPaths | None = None
    uncovered: str = "this rule"

    @property
    def tightest(self) -> PointStability:
        """The point at which the learning rate is closest to its limit or furthest above it."""
        return min((p for p in (self.start, self.end) if p is not None), key=lambda p: p.factor)

    @property
    def limit(self) -> float:
        """Largest stable learning rate at the tightest point."""
        return self.tightest.limit

    @property
    def factor(self) -> float:
        """The limit over the run's learning rate; above one is stable."""
        return self.tightest.factor

    @property
    def verdict(self) -> Verdict:
        """The verdict at the tightest point, or a worse one if paths diverge."""
        verdict = self.tightest.verdict
        if self.paths is None or verdict == "diverges":
            return verdict
        return "diverges" if self.paths.share > FEW_DIVERGE else "heavy tail"

    @property
    def sentence(self) -> str:
        """The answer as a sentence or two."""
        if self.start.dependence is not None:
            return (
                "Cannot tell whether it is stable: the limits of the learning rate, and every "
                "model but the replay, take each batch for an independent draw from all samples, "
                f"which does not hold with {self.start.dependence}; the replay of the measured "
                f"staleness draws as the run does.{self._about_paths('In')}"
            )
        if not self.start.covered:
            return (
                "Cannot tell whether it is stable: no limit of the learning rate is known for "
                f"{self.uncovered}; the replay of the measured staleness shows what it does."
                f"{self._about_paths('In')}"
            )
        if np.isinf(self.limit):
            return (
                "Cannot tell whether it is stable: no curvature is positive at the start or at the "
                f"end of the run.{self._about_paths('In')}"
            )
        words = self._verdict_in_words
        if self.tightest.verdict != "stable":
            words += self._about_paths("In")
        if self.tightest.additive_noise:
            return words
        return (
            f"{words} These limits leave out gradient noise that grows with the distance from the "
            "minimum: it lowers both."
        )

    def _about_paths(self, first: str) -> str:
        """Return the sentence on paths that diverged, "" if none did."""
        if self.paths is None:
            return ""
        paths = self.paths
        of = f"{paths.diverged} of {paths.paths} paths ({paths.model})"
        return f" {first} the prediction {of} diverge."

    @property
    def _verdict_in_words(self) -> str:
        point, start, end = self.tightest, self.start, self.end
        rate, limit, sure = point.learning_rate, point.limit, point.almost_sure
        rule = f" with momentum {point.momentum:g}" if point.momentum else ""
        if end is not None and end.verdict == "stable" != start.verdict:
            what = {"heavy tail": "Heavy tail", "diverges": "Unstable"}[start.verdict]
            return (
                f"{what} at the start, stable at the end: the largest stable learning rate{rule} "
                f"goes from {start.limit:.3g} to {end.limit:.3g} (mean square), the one from which "
                f"on single runs diverge from {start.almost_sure:.3g} to {end.almost_sure:.3g}, as "
                f"the leading curvature goes from {start.curvature[0]:.3g} to "
                f"{end.curvature[0]:.3g}; this run has {rate:g}."
            )
        if point.verdict == "stable":
            lead = "Stable:" if end is not None else "Stable at the start:"
            if self.paths is not None:
                what = "Unstable" if self.verdict == "diverges" else "Heavy tail"
                lead = f"{what}:{self._about_paths('in')} By curvature alone,"
            return (
                f"{lead} the largest stable learning rate{rule} is {limit:.3g} (mean square), "
                f"{self.factor:.3g} times the {rate:g} of this run; single runs diverge from "
                f"{sure:.3g} on."
            )
        if point.verdict == "heavy tail":
            return (
                f"Heavy tail: at the learning rate {rate:g} of this run{rule}, runs converge with "
                f"rare large excursions. The largest stable one (mean square) is {limit:.3g}; "
                f"single runs diverge from {sure:.3g} on."
            )
        return (
            f"Unstable: the learning rate {rate:g} of this run is {rate / sure:.3g} times "
            f"{sure:.3g}, from which on single runs diverge{rule}, or swing where the loss "
            f"saturates. The largest stable one (mean square) is {limit:.3g}."
        )

    def answer(self) -> StabilityAnswer:
        """Return the answer to store with a prediction."""
        return StabilityAnswer(
            sentence=self.sentence,
            verdict=None if np.isinf(self.limit) and self.paths is None else self.verdict,
            learning_rate=self.tightest.learning_rate,
            largest_stable_learning_rate=_finite(self.limit),
            diverges_from=_finite(self.tightest.almost_sure),
            factor=_finite(self.factor),
            start=self.start,
            end=self.end,
        )


def run_stability(
    setting: Setting, end: Array | None = None, paths: DivergedPaths | None = None
) -> RunStability:
    """Return the stability of a run.

    Parameters
    ----------
    setting
        The run's problem, learning rate, rule and staleness; with recorded turns if available.
    end
        The mean of the predicted final points, shape (d,); of k starts one for each, shape (k, d).
        Of the first four starts and ends those with the largest curvature count.
    paths
        Paths of the prediction, if any diverged.

    Raises
    ------
    UnreliableEstimateError
        The Lanczos iterations found no eigenvalue.
    """
    points = [np.atleast_2d(setting.initial)]
    if end is not None and np.all(np.isfinite(end)):
        points.append(np.atleast_2d(end))
    # Where a gradient of all samples is costly, so is a product with the Hessian.
    count = LEADING if setting.problem.gives_noise else 1
    curvatures = [
        max(
            (leading_curvatures(setting.problem, x, count) for x in several[:_FEW_STARTS]),
            key=lambda curvature: float(curvature[0]),
        )
        for several in points
    ]
    return at_curvatures(setting, curvatures, paths)


def at_curvatures(
    setting: Setting, curvatures: Sequence[Array], paths: DivergedPaths | None = None
) -> RunStability:
    """Return the stability of a run by the curvatures at its start and, if given, at its end.

    Parameters
    ----------
    curvatures
        Of one point or two, largest first.
    """
    unknown = setting.replay_only or setting.pushes is not None or setting.dependence is not None
    rule = None if unknown else linear_rule(setting.rule, setting.law.mean())
    limits = limits_of(setting, rule) if rule else None
    start, *end = (_point(setting, rule, limits, curvature) for curvature in curvatures)
    what = "this policy of the server" if setting.replay_only else "this rule"
    if setting.pushes is not None:
        what = setting.pushes.feature
    return RunStability(start, end[0] if end else None, paths, what)


def limits_of(setting: Setting, rule: LinearRule) -> StabilityLimits:
    """Return the limits of a rule on a mode of curvature one."""
    options: Any = asdict(rule)
    if setting.closure != "pool":
        return stability_limits(setting.law, independent=True, **options)
    if setting.turns is not None:
        return stability_limits(setting.turns, **options)
    return stability_limits(setting.pool_law, workers=setting.workers, **options)


def leading_curvatures(problem: Problem, x: Array, count: int = LEADING) -> Array:
    """Return the largest eigenvalues of the Hessian at x, shape (d,), largest first.

    By Hessian-vector products: one eigenvalue mostly takes 11, six take 20 to 50.

    Raises
    ------
    UnreliableEstimateError
        No eigenvalue converged.
    """
    if problem.dim <= DENSE_DIM:
        return np.asarray(np.linalg.eigvalsh(problem.hessian(x))[::-1][:count])
    start = stream(0, "lanczos").standard_normal(problem.dim)
    # One thread: a product with one vector is too small to share.
    with problem.in_one_thread(), threadpool_limits(1, user_api="blas"):
        return largest_eigenvalues(
            lambda v: problem.hessian_vector(x, v), start, count, _TOLERANCE
        )[0]


def _point(
    setting: Setting, rule: LinearRule | None, limits: StabilityLimits | None, curvature: Array
) -> PointStability:
    """Return the stability at a point; `limits` are those of a mode of curvature one."""
    learning_rate = float(np.max(setting.learning_rate))
    law = setting.pool_law if setting.closure == "pool" else setting.law
    rising = curvature[curvature > 0]
    known: Any = asdict(rule) if rule else None
    factors = [spectral_radius(law, learning_rate * float(a), **known) for a in rising if rule]
    return PointStability(
        learning_rate=learning_rate,
        curvature=curvature.tolist(),
        spectral_radius=factors,
        limits=limits.at_curvature(float(rising[0])) if limits and len(rising) else None,
        momentum=rule.momentum if rule else 0.0,
        additive_noise=setting.problem.additive_noise,
        covered=rule is not None,
        dependence=setting.dependence,
    )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
