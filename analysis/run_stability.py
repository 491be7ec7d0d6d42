"""Is a run stable, what is the largest stable learning rate, how far is the run from it? (ours).

On each leading mode of the Hessian the mean follows the recursion of `analysis.stability` under
the run's staleness law. Curvature changes along a run, so it is looked at where the run starts and
where its prediction ends; for a memoryless server the second moment has a limit of its own, which
is lower. Noise that grows with the distance from the minimum lowers both; that is not counted, and
what then is known to be stable is the mean. Under a schedule its largest learning rate counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from analysis.setting import Setting
from analysis.stability import (
    max_stable_learning_rate,
    server_max_stable_learning_rate,
    spectral_radius,
)
from asgd.errors import UnreliableEstimateError
from asgd.problems.base import Array, Problem
from asgd.staleness import Geometric
from asgd.streams import stream

LEADING = 6  # modes looked at
_DENSE_DIM = 64  # up to here a full eigendecomposition is cheaper than Lanczos iterations
_TOLERANCE = 1e-4  # relative, of the eigenvalues
_OUTGROWN = 2.0  # times as far above the lowest loss as the start is
_RISEN = 0.05  # of the way down: less is scatter of the prediction


@dataclass(frozen=True)
class PointStability:
    """Stability with the curvatures of one point.

    Attributes
    ----------
    learning_rate
        Of the run, the largest under a schedule.
    curvature
        Leading eigenvalues of the Hessian, largest first.
    spectral_radius
        Slowest factor per update of each of these modes; the mean decays below one.
    mean_limit
        Largest learning rate at which the mean decays on all modes; inf without curvature.
    mean_square_limit
        The same for the second moment, known for memoryless servers; else None.
    mean_alone
        Whether the limit is that of the mean alone: that of the second moment is not known, or
        noise that depends on x lowers it.
    """

    learning_rate: float
    curvature: list[float]
    spectral_radius: list[float]
    mean_limit: float
    mean_square_limit: float | None
    mean_alone: bool

    @property
    def limit(self) -> float:
        """The lower of the two limits."""
        second = self.mean_square_limit
        return self.mean_limit if second is None else min(self.mean_limit, second)

    @property
    def factor(self) -> float:
        """The limit over the learning rate: above one is stable."""
        return self.limit / self.learning_rate


@dataclass(frozen=True)
class RunStability:
    """Stability of a run at its start and at its predicted end.

    Attributes
    ----------
    start, end
        At x_0 and at the mean of the predicted final points; `end` is None if that is not finite.
    """

    start: PointStability
    end: PointStability | None

    @property
    def tightest(self) -> PointStability:
        """The point where the learning rate is nearest to its limit, or farthest above."""
        return min((p for p in (self.start, self.end) if p is not None), key=lambda p: p.factor)

    @property
    def limit(self) -> float:
        """Largest stable learning rate at the tightest point."""
        return self.tightest.limit

    @property
    def factor(self) -> float:
        """The limit over the run's learning rate: above one is stable."""
        return self.tightest.factor

    @property
    def sentence(self) -> str:
        """The answer in a sentence."""
        rate, start, end = self.tightest.learning_rate, self.start, self.end
        if np.isinf(self.limit):
            return (
                "Cannot tell whether it is stable: no curvature is positive where it was looked at."
            )
        if self.factor >= 1:
            what = " in the mean" if self.tightest.mean_alone else ""
            where = "" if end is not None else " at the start"
            return (
                f"Stable{what}{where}: the largest stable learning rate is {self.limit:.3g}, "
                f"{self.factor:.3g} times the {rate:g} of this run."
            )
        if end is not None and end.factor >= 1:
            return (
                f"Unstable at the start, stable at the end: the largest stable learning rate goes "
                f"from {start.limit:.3g} to {end.limit:.3g} as the leading curvature goes from "
                f"{start.curvature[0]:.3g} to {end.curvature[0]:.3g}; this run has {rate:g}."
            )
        return (
            f"Unstable: the learning rate {rate:g} of this run is {1 / self.factor:.3g} times "
            f"the largest stable one, {self.limit:.3g}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "sentence": self.sentence,
            "learning_rate": self.tightest.learning_rate,
            "largest_stable_learning_rate": _finite(self.limit),
            "factor": _finite(self.factor),
            "start": _json(self.start),
            "end": None if self.end is None else _json(self.end),
        }


def run_stability(setting: Setting, end: Array | None = None) -> RunStability:
    """Return the stability of a run.

    Parameters
    ----------
    setting
        The run's problem, learning rate and staleness law.
    end
        The mean of its predicted final points, shape (d,).

    Raises
    ------
    UnreliableEstimateError
        The Lanczos iterations found no eigenvalue.
    """
    at_end = None
    if end is not None and np.all(np.isfinite(end)):
        at_end = _point(setting, end)
    return RunStability(_point(setting, setting.initial), at_end)


def leading_curvatures(problem: Problem, x: Array, count: int = LEADING) -> Array:
    """Return the largest eigenvalues of the Hessian at x, shape (d,), largest first.

    By Lanczos iterations (ARPACK) on Hessian-vector products, memory O(count d).

    Raises
    ------
    UnreliableEstimateError
        No eigenvalue converged.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    d = problem.dim
    if d <= _DENSE_DIM:
        return np.asarray(np.linalg.eigvalsh(problem.hessian(x))[::-1][:count])
    operator = LinearOperator(
        (d, d), matvec=lambda v: problem.hessian_vector(x, v.ravel()), dtype=np.float64
    )
    start = stream(0, "lanczos").standard_normal(d)
    try:
        # One BLAS thread: a product with one vector has too little work to share.
        with threadpool_limits(1, user_api="blas"):
            values = eigsh(
                operator, k=count, which="LA", v0=start, tol=_TOLERANCE, return_eigenvectors=False
            )
    except ArpackNoConvergence as error:
        values = np.real(error.eigenvalues)
        if not len(values):
            raise UnreliableEstimateError(
                f"leading curvatures: no eigenvalue of {d} converged", np.nan
            ) from None
    return np.asarray(np.sort(values)[::-1])


def outgrows(loss: Array) -> bool:
    """Return whether a predicted loss leaves its start behind ever faster.

    It ends more than twice as far above its lowest value as it began, and rose by more in its last
    quarter than in the one before, peak to peak: what settles above its start does not.

    Parameters
    ----------
    loss
        Shape (m,), at evenly spaced updates.
    """
    first, lowest = float(loss[0]), float(loss.min())
    return grows(loss) and float(loss[-1]) - lowest > _OUTGROWN * (first - lowest)


def grows(loss: Array) -> bool:
    """Return whether a loss rises at its end by ever more and by more than scatter."""
    if len(loss) < 4:
        return False
    second, third, last = (float(part.max()) for part in np.array_split(loss, 4)[1:])
    rise = last - third
    return rise > max(third - second, 0.0) and rise > _RISEN * float(loss[0] - loss.min())


def _point(setting: Setting, x: Array) -> PointStability:
    learning_rate = float(np.max(setting.learning_rate))
    law = setting.pool_law if setting.closure == "pool" else setting.law
    curvature = leading_curvatures(setting.problem, x)
    rising = curvature[curvature > 0]
    radius = [spectral_radius(law, learning_rate * float(a)) for a in rising]
    memoryless = setting.closure == "pool" and isinstance(law, Geometric)
    mean_alone = not (memoryless and setting.problem.additive_noise)
    if not len(rising):
        return PointStability(learning_rate, curvature.tolist(), radius, np.inf, None, mean_alone)
    top = float(rising[0])
    return PointStability(
        learning_rate,
        curvature.tolist(),
        radius,
        max_stable_learning_rate(law, top),
        server_max_stable_learning_rate(setting.workers, top) if memoryless else None,
        mean_alone,
    )


def _json(point: PointStability) -> dict[str, Any]:
    return {**asdict(point), "mean_limit": _finite(point.mean_limit)}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
