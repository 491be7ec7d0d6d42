"""Fast prediction: one mean path under the law, and linear noise around it (ours).

The mean path is (G1) without noise. Around it a small deviation of one Hessian mode obeys a linear
recursion with the delays of the law; h_i is its impulse response. With the Hessian at the time of
interest and the noise S from the time of its injection,

    Cov_k = (eta^2 / b) sum_{j<k} h_{k-1-j}(H) S_j h_{k-1-j}(H)
    E f = f(mean) + tr(H Cov)/2,   Var f = g.Cov g + tr((H Cov)^2)/2,   g = grad f(mean)       (F1)

and the slope of the curvature bends the mean path by the force

    E grad f - grad f(mean) = (1/2) f''' : Cov                                                  (F2)

Random lags amplify the sums over h and add a covariance of their own, (F3). H, S and the force are
taken at a few times; the cumulants of the loss are interpolated between them, the force is
constant.

The theory omits everything beyond second order in the deviations. It fails where this matters: near
the limits of stability; where noise carries paths from one valley to another, which it cannot
detect; where curvature vanishes at the minimum, so that noise is not small; and beyond the edge of
stability, where it grows large. The curve ends where growing noise costs half of the gain of the
mean path (the loss of a real run saturates there, the linear theory does not), where orders beyond
the second make more than 2 % of the loss, where random lags push it by more than 2 %, or where some
hundred drawn servers do not determine their cost to 0.75 %. Quadratics, for which the theory is
exact, are never refused.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from analysis.exact.stability import spectral_radius
from analysis.prediction.lag_noise import DrawnReads, GradientPath
from analysis.prediction.loss_curve import LossCurve
from analysis.prediction.response import ExpectedRead
from analysis.prediction.spread import (
    ALL_MODES_DIM,
    AllModes,
    Dynamics,
    SampledModes,
    Spread,
    Spreader,
)
from asgd.arrays import Array, Integers
from asgd.errors import InputError
from asgd.problems.base import Problem
from asgd.staleness.law import StalenessLaw
from asgd.streams import stream

TIMES = 8  # number of times with curvature and noise
LARGEST_COST = 0.5  # of growing noise, as a share of the mean path's gain
# Share of the predicted loss beyond second order. On the quartic at 0.2 and 0.3 of the mean-square
# limit it is 0.01 and 0.16, and the error of the loss is 7 and 18 %.
LARGEST_REST = 0.02
# Largest share of the predicted loss that random lags cost by (F3). Where the Hessian changes, the
# theory misses once or twice this cost, because lags throw paths far from the moving mean: on a
# tanh network at 0.2, 0.3 and 0.5 of that limit the share is 0.009, 0.027 and 0.07, and the error
# of the loss is 2, 4 and 8 %.
LARGEST_LAGS = 0.02
# Largest standard error due to `SERVERS` drawn servers, as a share of the predicted loss. On a tanh
# network with memoryless workers it is 0.002 at 0.3 of that limit, 0.005 at 0.5, and 0.009 at 0.65.
LARGEST_ERROR = 0.0075


class MeanPath:
    """(G1) without noise, but with the force of noise on the mean, one update at a time.

    Attributes
    ----------
    x
        The current point, shape (d,).
    gradient
        E grad f there, shape (d,).
    force
        E grad f - grad f(mean), shape (d,); zero without noise.
    """

    def __init__(
        self,
        problem: Problem,
        learning_rate: float,
        law: StalenessLaw,
        initial: Array,
        dtype: npt.DTypeLike = np.float64,
    ) -> None:
        self._problem, self._learning_rate, self._dtype = problem, learning_rate, dtype
        self.x = np.array(initial, dtype=float)
        self.force = np.zeros_like(self.x)
        self.gradient = problem.gradient(self.x)
        self._read = ExpectedRead(law, self.gradient, self.gradient)

    def step(self) -> None:
        """Advance one update."""
        self.x = self.x - self._learning_rate * self._read.value()
        self.gradient = self._problem.gradient(self.point()) + self.force
        self._read.push(self.gradient)

    def point(self) -> Array:
        """Return x in the precision of the gradients."""
        return self.x.astype(self._dtype, copy=False)


def linear_noise(
    problem: Problem,
    learning_rate: float,
    law: StalenessLaw,
    seed: int,
    *,
    batch_size: int,
    initial: Array,
    record: Integers,
    reads: DrawnReads | None = None,
    dtype: npt.DTypeLike = np.float64,
    progress: Callable[[int, int], None] | None = None,
) -> LossCurve:
    """Predict the loss from one mean path and linear noise around it, (F1) to (F3).

    Parameters
    ----------
    seed
        Seed of the draws of the noise above 64 dimensions.
    initial
        x_0, shape (d,).
    record
        Updates to predict, ascending, shape (m,).
    reads
        Drawn reads, for the noise of random lags; None to leave it out.
    dtype
        float64 or float32, the precision of gradients and Hessian-vector products.
    progress
        Called as progress(done, total) about a hundred times.

    Returns
    -------
    LossCurve
        Without values from `unstable_from` on if noise outgrows the linear theory.

    Raises
    ------
    InputError
        There is no update to predict.
    """
    if record[-1] < 1:
        raise InputError(f"record = {record}: expected at least one update after the start")
    last = int(record[-1])
    times = _times(last)
    middle, wanted = set(((times[1:] + times[:-1]) // 2).tolist()), set(record.tolist())
    dynamics = Dynamics(problem, learning_rate, batch_size, law, reads)
    kind = AllModes if problem.dim <= ALL_MODES_DIM else SampledModes
    # One BLAS thread: a single path has too little work to share.
    with np.errstate(over="ignore", invalid="ignore"), threadpool_limits(1, user_api="blas"):
        path = MeanPath(problem, learning_rate, law, initial, dtype)
        spreader = kind(dynamics, stream(seed, "linear noise"))
        gradients, points = GradientPath(last, problem.dim), []
        start, unstable_from = float(problem.loss(path.x)), None
        spreads = [Spread.none(path.x)]
        for k in range(last + 1):
            gradients.add(k, path.gradient)
            if k in wanted:
                points.append(path.x)
            if k == times[len(spreads)]:
                spread = _spread(spreader, path, times[: len(spreads) + 1], gradients)
                if spread is None or _outgrown(spread, dynamics, path, initial, start):
                    unstable_from = int(times[len(spreads) - 1]) + 1
                    break
                spreads.append(spread)
                path.force = spread.force
            if k in middle:
                spreader.add_source(path.point())
            if k < last:
                path.step()
            if progress is not None and k % max(last // 100, 1) == 0:
                progress(k, last)
        loss = np.full(len(record), np.nan)
        loss[: len(points)] = problem.loss(np.array(points))
    axis, known = np.log1p(record), np.log1p(times[: len(spreads)])
    columns = [*np.array([spread.cumulants for spread in spreads]).T]
    columns.append(np.array([spread.error for spread in spreads]))
    first, second, third, error = (np.interp(axis, known, column) for column in columns)
    cumulants = loss + first, second, third
    curve = LossCurve.of_cumulants(record, *cumulants, end=path.x, mean_error=error)
    return curve if unstable_from is None else curve.cut(unstable_from)


def _spread(
    spreader: Spreader, path: MeanPath, times: Integers, gradients: GradientPath
) -> Spread | None:
    """Return the spread at the last of the times; None if the path diverges."""
    if not np.all(np.isfinite(path.x)):
        return None
    try:
        return spreader.spread(path.point(), times, gradients)
    except np.linalg.LinAlgError:
        return None


def _outgrown(
    spread: Spread, dynamics: Dynamics, path: MeanPath, initial: Array, start: float
) -> bool:
    """Return whether noise is too large for the linear theory around this point of the path."""
    here, cost = float(dynamics.problem.loss(path.x)), float(spread.cumulants[0])
    # Without a force gradients are linear, and the theory holds for large noise too.
    if np.linalg.norm(spread.force) <= 1e-9 * np.linalg.norm(path.x - initial):
        return False
    loss = abs(here + cost)
    if not (spread.error <= LARGEST_ERROR * loss and abs(spread.lags) <= LARGEST_LAGS * loss):
        return True
    step = dynamics.learning_rate * spread.top
    grows = np.isfinite(step) and step > 0 and spectral_radius(dynamics.law, step) > 1
    costly = not cost <= LARGEST_COST * abs(start - here)
    return bool((costly and grows) or abs(spread.rest) > LARGEST_REST * loss)


def _times(last: int) -> Integers:
    """Return 0 and up to `TIMES` updates, even in the logarithm, including `last`."""
    times = np.geomspace(min(8, last), last, TIMES).round().astype(np.int64)
    return np.concatenate([[0], np.unique(times)])
