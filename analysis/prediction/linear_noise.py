"""Fast prediction: one mean path under the law, and linear noise around it (ours).

The mean path is (G1) without noise. Around it a small deviation of one Hessian mode obeys a linear
recursion with the delays of the law; h_i is its impulse response. With the Hessian at the time of
interest and the noise S from the time of its injection,

    Cov_k = (eta^2 / b) sum_{j<k} h_{k-1-j}(H) S_j h_{k-1-j}(H)
    E f = f(mean) + tr(H Cov)/2,   Var f = g.Cov g + tr((H Cov)^2)/2,   g = grad f(mean)       (F1)

and the slope of the curvature bends the mean path by the force

    E grad f - grad f(mean) = (1/2) f''' : Cov                                                  (F2)

H, S and the force are taken at a few times; the cumulants of the loss are interpolated between
them, the force is constant. In small dimension the sums are formed. Beyond, draws of the noise are
multiplied by functions of H by Lanczos iterations, with Hessian-vector products only.

The theory omits the noise of the random lag, and everything beyond second order in the noise. It
fails where these matter: near the limits of stability, where random lags amplify the noise (see
`lag_amplification`); where noise carries paths from one valley to another, which it cannot detect;
where curvature vanishes at the minimum, so that noise is not small; and beyond the edge of
stability, where it grows large. There are no values from the time on when growing noise costs half
of the gain of the mean path (the loss of a real run saturates there, the linear theory does not),
or when orders beyond the second make more than 2 % of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from analysis.exact.stability import spectral_radius
from analysis.models.history import History
from analysis.models.turns import START_UP, Turns, pool_hazards
from analysis.prediction.exact import quadratic_cumulants
from analysis.prediction.loss_curve import LossCurve
from asgd.arrays import Array, Integers
from asgd.errors import InputError
from asgd.problems.base import Problem
from asgd.staleness import Geometric, StalenessLaw
from asgd.streams import stream

TIMES = 8  # number of times with curvature and noise
PROBES = 8  # draws of the noise at each time
FEW_PROBES, WIDE_DIM = 4, 10_000  # above this dimension a sum over modes averages by itself
LANCZOS_STEPS = 12
DENSE_DIM = 64  # largest dimension for sums over all modes
LARGEST_COST = 0.5  # of growing noise, as a share of the mean path's gain
# Share of the predicted loss beyond second order in the noise. On the quartic at 0.2 and 0.3 of the
# mean-square limit it is 0.01 and 0.16, and the loss 7 and 18 % off.
LARGEST_REST = 0.02
_DRAWS = 64  # deviations drawn for it in small dimension

# Pools for the amplification of a push, and how long it is followed: multiples of 1/step and of the
# turns of each worker.
_PUSHED_PATHS = 1000
_LIVES, _LONGEST_PUSH = 10.0, 4000


class ExpectedRead:
    """sum_l w_l v_{k-l} of a sequence v_0, v_1, ... under a law; O(1) memory if geometric.

    Parameters
    ----------
    law
        The staleness law.
    first, before
        v_0, and the constant value of v before it; both of the same shape.
    """

    def __init__(self, law: StalenessLaw, first: Array, before: Array) -> None:
        self._mu = law.mu if isinstance(law, Geometric) else None
        if self._mu is not None:
            self._average = (1 - self._mu) * first + self._mu * before
        else:
            self._history = History(law.weights(law.support_length()), before)
            self._history.push(first)

    def push(self, value: Array) -> None:
        """Append the next value."""
        if self._mu is None:
            self._history.push(value)
        else:
            self._average = self._mu * self._average + (1 - self._mu) * value

    def value(self) -> Array:
        """Return the current average."""
        return self._history.average() if self._mu is None else self._average


class MeanPath:
    """(G1) without noise, but with the force of noise on the mean, one update at a time.

    Attributes
    ----------
    x
        The current point, shape (d,).
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
        gradient = problem.gradient(self.x)
        self._read = ExpectedRead(law, gradient, gradient)

    def step(self) -> None:
        """Advance one update."""
        self.x = self.x - self._learning_rate * self._read.value()
        self._read.push(self._problem.gradient(self.point()) + self.force)

    def point(self) -> Array:
        """Return x in the precision of the gradients."""
        return self.x.astype(self._dtype, copy=False)


def response_power(
    law: StalenessLaw, learning_rate: float, curvature: Array, lags: Integers
) -> Array:
    """Return sum_{i<m} h_i h_i^T over modes at the given lags m.

    Parameters
    ----------
    curvature
        Shape (..., n): the n modes of one product.
    lags
        Ascending, shape (q,).

    Returns
    -------
    Array
        Shape (q, ..., n, n).
    """
    return _power(law, learning_rate, curvature, lags, lambda h: h[..., :, None] * h[..., None, :])


def _power(
    law: StalenessLaw,
    learning_rate: float,
    curvature: Array,
    lags: Integers,
    square: Callable[[Array], Array],
) -> Array:
    step = learning_rate * curvature
    h = np.ones_like(step)
    read = ExpectedRead(law, h, np.zeros_like(h))
    total = np.zeros_like(square(h))
    out, row = np.empty((len(lags), *total.shape)), 0
    for m in range(int(lags[-1]) + 1):
        while row < len(lags) and lags[row] == m:
            out[row] = total
            row += 1
        total += square(h)
        h = h - step * read.value()
        read.push(h)
    return out


def linear_noise(
    problem: Problem,
    learning_rate: float,
    law: StalenessLaw,
    seed: int,
    *,
    batch_size: int,
    initial: Array,
    record: Integers,
    dtype: npt.DTypeLike = np.float64,
    progress: Callable[[int, int], None] | None = None,
) -> LossCurve:
    """Predict the loss from one mean path and linear noise around it, (F1), (F2).

    Parameters
    ----------
    seed
        Seed of the draws of the noise above 64 dimensions.
    initial
        x_0, shape (d,).
    record
        Updates to predict, ascending, shape (m,).
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
    middle = (times[1:] + times[:-1]) // 2
    rng = stream(seed, "linear noise")
    kind = _AllModes if problem.dim <= DENSE_DIM else _SampledModes
    # One BLAS thread: a single path has too little work to share.
    with np.errstate(over="ignore", invalid="ignore"), threadpool_limits(1, user_api="blas"):
        path = MeanPath(problem, learning_rate, law, initial, dtype)
        noise = kind(problem, learning_rate, law, learning_rate**2 / batch_size, rng)
        cumulants = np.full((len(times), 3), np.nan)
        cumulants[0] = 0.0
        unstable_from = None
        start = float(problem.loss(path.x))
        recorded, wanted = np.full((len(record), problem.dim), np.nan), set(record.tolist())
        row = 0
        for k in range(last + 1):
            if k in wanted:
                recorded[row] = path.x
                row += 1
            if k in times[1:] and np.all(np.isfinite(path.x)):
                number = int(np.searchsorted(times, k))
                try:
                    spread = noise.spread(path.point(), times[: number + 1])
                except np.linalg.LinAlgError:  # the path diverges
                    unstable_from = int(times[number - 1]) + 1
                    break
                cumulants[number], path.force = spread.cumulants, spread.force
                here, cost = float(problem.loss(path.x)), cumulants[number, 0]
                gain = abs(start - here)
                # Without a force gradients are linear, and the theory holds for large noise too.
                bent = np.linalg.norm(path.force) > 1e-9 * np.linalg.norm(path.x - initial)
                grows = not cost <= LARGEST_COST * gain and _grows(law, learning_rate * spread.top)
                if bent and (grows or abs(spread.rest) > LARGEST_REST * abs(here + cost)):
                    unstable_from = int(times[number - 1]) + 1
                    break
            if k in middle:
                noise.add_source(path.point())
            if k < last:
                path.step()
            if progress is not None and k % max(last // 100, 1) == 0:
                progress(k, last)
        loss = np.asarray(problem.loss(recorded))
        axis = np.log1p(record)
        first, second, third = (np.interp(axis, np.log1p(times), c) for c in cumulants.T)
    curve = LossCurve.of_cumulants(record, loss + first, second, third, path.x)
    return curve if unstable_from is None else curve.cut(unstable_from)


def lag_amplification(
    law: StalenessLaw, workers: int, step: float, rng: np.random.Generator
) -> float:
    """Return the amplification of a push by random lags, sum_k E h_k^2 / sum_k (E h_k)^2 by (P2).

    It is one for constant lags and infinite from the mean-square limit on. (F1) knows only the
    second sum, so it underestimates the cost of noise on a mode of this step by this factor.

    Parameters
    ----------
    workers
        P.
    step
        Learning rate times curvature, > 0.
    """
    turns = Turns(pool_hazards([law] * workers, rng), _PUSHED_PATHS, rng)
    path = np.arange(_PUSHED_PATHS)
    for _ in range(START_UP * workers):
        slot = turns.next()
    x, held = np.ones(_PUSHED_PATHS), np.zeros((_PUSHED_PATHS, workers))
    held[path, slot] = 1.0
    squares = np.zeros(_PUSHED_PATHS)
    of_mean = 0.0
    with np.errstate(over="ignore"):
        for _ in range(int(min(_LIVES / step + _LIVES * workers, _LONGEST_PUSH))):
            squares += x**2
            of_mean += float(x.mean()) ** 2
            slot = turns.next()
            x = x - step * held[path, slot]
            held[path, slot] = x
    return float(squares.mean() / of_mean)


def _grows(law: StalenessLaw, step: float) -> bool:
    return np.isfinite(step) and step > 0 and spectral_radius(law, step) > 1


def _times(last: int) -> Integers:
    """Return 0 and up to `TIMES` updates, even in the logarithm, including `last`."""
    times = np.geomspace(min(8, last), last, TIMES).round().astype(np.int64)
    return np.concatenate([[0], np.unique(times)])


class Spread(NamedTuple):
    """The spread of the paths around a point of the mean path.

    Attributes
    ----------
    cumulants
        Three cumulants of the loss about f(x), shape (3,).
    force
        E grad f - grad f(x), shape (d,).
    top
        Largest curvature.
    rest
        What the loss gains on average beyond second order in the deviation, which (F1) omits.
    """

    cumulants: Array
    force: Array
    top: float
    rest: float


class _AllModes:
    """The spread of the paths in small dimension: all modes, all products."""

    def __init__(
        self,
        problem: Problem,
        learning_rate: float,
        law: StalenessLaw,
        scale: float,
        rng: np.random.Generator,
    ) -> None:
        self._problem, self._learning_rate, self._law = problem, learning_rate, law
        self._scale, self._rng = scale, rng
        self._sources: list[Array] = []

    def add_source(self, x: Array) -> None:
        """Take the noise of the current interval at a point x of it."""
        self._sources.append(self._problem.gradient_covariance(x))

    def spread(self, x: Array, times: Integers) -> Spread:
        """Return the spread of the paths around x at the last of the times."""
        problem = self._problem
        curvature, basis = np.linalg.eigh(problem.hessian(x))
        lags = (times[-1] - times)[::-1]
        power = response_power(self._law, self._learning_rate, curvature, lags)[::-1]
        covariance = sum(
            (power[j] - power[j + 1]) * (basis.T @ source @ basis)
            for j, source in enumerate(self._sources)
        )
        covariance = self._scale * np.asarray(covariance)
        slope = (problem.gradient(x) @ basis)[None]
        first, second, third = quadratic_cumulants(slope, curvature, covariance[None])
        if not np.all(np.isfinite(covariance)):
            return Spread(np.full(3, np.nan), np.zeros_like(x), float(curvature[-1]), np.nan)
        sizes, axes = np.linalg.eigh(covariance)
        root = axes * np.sqrt(np.maximum(sizes, 0.0))
        force = _bend(problem, x, (basis @ root).T).sum(axis=0)
        z = self._rng.standard_normal((_DRAWS, problem.dim)) @ root.T
        rest = _rest(problem, x, z @ basis.T, z**2 @ curvature / 2)
        return Spread(np.concatenate([first, second, third]), force, float(curvature[-1]), rest)


class _SampledModes:
    """The spread of the paths from draws of the noise, with Hessian-vector products only.

    A draw xi of covariance S_j becomes one of covariance K S_j K with K^2 = sum h_i(H)^2. Then
    tr(H Cov)/2 is the mean of xi.K H K xi / 2, and tr((H Cov)^2) that of (x.H y)^2 over pairs.
    """

    def __init__(
        self,
        problem: Problem,
        learning_rate: float,
        law: StalenessLaw,
        scale: float,
        rng: np.random.Generator,
    ) -> None:
        self._problem, self._learning_rate, self._law = problem, learning_rate, law
        self._scale, self._rng = scale, rng
        self._probes = PROBES if problem.dim <= WIDE_DIM else FEW_PROBES
        self._sources: list[Array] = []

    def add_source(self, x: Array) -> None:
        """Take the noise of the current interval at a point x of it."""
        points = np.tile(x, (self._probes, 1))
        self._sources.append(self._problem.gradient_and_noise(points, self._rng)[1])

    def spread(self, x: Array, times: Integers) -> Spread:
        """Return the spread of the paths around x at the last of the times."""
        problem, probes = self._problem, self._probes
        deviation, first, top = np.zeros((probes, problem.dim)), 0.0, 0.0
        # One source at a time: the Lanczos vectors of all would need too much memory.
        for j, source in enumerate(self._sources):
            curvature, modes, basis = _lanczos(problem, x, source)
            top = max(top, float(curvature.max()))
            lags = times[-1] - times[[j + 1, j]]
            power = _power(self._law, self._learning_rate, curvature, lags, np.square)
            kernel = self._scale * np.maximum(power[1] - power[0], 0.0)
            first += float((modes**2 * curvature * kernel).sum() / (2 * probes))
            deviation += ((modes * np.sqrt(kernel))[:, None] @ basis)[:, 0]
        along = float(((deviation @ problem.gradient(x)) ** 2).mean())
        curved = problem.hessian_vector(x, deviation)
        trace = float(((deviation @ curved.T)[np.triu_indices(probes, 1)] ** 2).mean())
        # Third cumulant: as for equal modes, with the slope along one of them.
        typical = trace / (2 * first) if first > 0 else 0.0
        cumulants = np.array([first, trace / 2 + along, typical * (trace + 3 * along)])
        force = _bend(problem, x, deviation).mean(axis=0)
        quadratic = np.einsum("rd,rd->r", deviation, curved) / 2
        return Spread(cumulants, force, top, _rest(problem, x, deviation, quadratic))


def _rest(problem: Problem, x: Array, deviation: Array, quadratic: Array) -> float:
    """Return the mean of f(x + z) - f(x), without odd orders, beyond its quadratic part (r,)."""
    both = problem.loss(x + deviation) + problem.loss(x - deviation)
    return float(np.mean(both / 2 - problem.loss(x) - quadratic))


def _bend(problem: Problem, x: Array, deviation: Array) -> Array:
    """Return the mean of grad f(x + z) and grad f(x - z) minus grad f(x), shape (r, d)."""
    change = problem.gradient(x + deviation) + problem.gradient(x - deviation)
    return np.asarray(change / 2 - problem.gradient(x))


def _lanczos(problem: Problem, x: Array, start: Array) -> tuple[Array, Array, Array]:
    """Return Ritz values, components of the starts along Ritz vectors, and these vectors.

    One orthogonalisation against all earlier vectors suffices for the few steps.

    Parameters
    ----------
    start
        One start vector per row, shape (r, d).

    Returns
    -------
    tuple of Array
        Shapes (r, s), (r, s) and (r, s, d).
    """
    rows, steps = len(start), min(LANCZOS_STEPS, problem.dim)
    basis = np.zeros((rows, steps, start.shape[1]), start.dtype)
    least = max(1e-10, 100 * float(np.finfo(start.dtype).eps))
    diagonal, below = np.zeros((rows, steps)), np.zeros((rows, steps))
    norm = np.linalg.norm(start, axis=1)
    vector = start / np.where(norm > 0, norm, 1.0)[:, None]
    for s in range(steps):
        basis[:, s] = vector
        product = problem.hessian_vector(x, vector)
        diagonal[:, s] = np.einsum("rd,rd->r", vector, product)
        known = basis[:, : s + 1]
        overlap = known @ product[:, :, None]
        product = product - (overlap.swapaxes(-1, -2) @ known)[:, 0]
        below[:, s] = np.linalg.norm(product, axis=1)
        ended = below[:, s] < least * np.abs(diagonal[:, 0])
        below[ended, s] = 0.0
        vector = product / np.where(below[:, s] > 0, below[:, s], 1.0)[:, None]
        vector[ended] = 0.0
    matrix = np.zeros((rows, steps, steps))
    index = np.arange(steps)
    matrix[:, index, index] = diagonal
    matrix[:, index[1:], index[:-1]] = matrix[:, index[:-1], index[1:]] = below[:, :-1]
    values, vectors = np.linalg.eigh(matrix)
    return values, vectors[:, 0] * norm[:, None], vectors.swapaxes(-1, -2) @ basis
