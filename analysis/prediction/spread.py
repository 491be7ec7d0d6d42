"""The spread of paths around one point of a mean path, (F1) with (F3).

In small dimension all modes of the Hessian and all products are formed. Beyond, draws of the noise
are multiplied by functions of the Hessian by Lanczos iterations, with Hessian-vector products only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from analysis.prediction.exact import quadratic_cumulants
from analysis.prediction.lag_noise import WIDE_DIM, DrawnReads, GradientPath
from analysis.prediction.response import power_of_squares, response_power
from asgd.arrays import Array, Integers
from asgd.problems.base import Problem
from asgd.staleness.law import StalenessLaw

PROBES = 8  # draws of the noise at each time
FEW_PROBES = 4  # of wide problems, whose many modes average
LANCZOS_STEPS = 12
ALL_MODES_DIM = 64  # largest dimension for sums over all modes
_DRAWS = 64  # deviations drawn for orders beyond the second in small dimension
# Directions in which the gradient varies along the mean path, and Krylov steps from them.
_LAG_DIRECTIONS, _LAG_STEPS = 6, 8
_LEAST_NEW = 1e-6  # a new Krylov vector below this share of its length is rounding error


@dataclass(frozen=True)
class Dynamics:
    """The parameters of linear noise that do not depend on the point.

    Attributes
    ----------
    law
        The staleness law of the mean path.
    reads
        Drawn reads, for the noise of random lags; None to leave it out.
    """

    problem: Problem
    learning_rate: float
    batch_size: int
    law: StalenessLaw
    reads: DrawnReads | None

    @property
    def noise_scale(self) -> float:
        """eta^2 / b."""
        return self.learning_rate**2 / self.batch_size


class Spread(NamedTuple):
    """The spread of the paths around a point of the mean path.

    Attributes
    ----------
    cumulants
        Three cumulants of the loss about f(x), shape (3,).
    error
        Standard error of the first, due to the drawn reads.
    force
        E grad f - grad f(x), shape (d,).
    top
        Largest curvature.
    lags
        Part of the first cumulant that is due to (F3).
    rest
        Mean contribution of orders beyond the second to the loss, which (F1) omits.
    """

    cumulants: Array
    error: float
    force: Array
    top: float
    lags: float
    rest: float

    @classmethod
    def none(cls, x: Array) -> Spread:
        """Return the spread at x_0."""
        return cls(np.zeros(3), 0.0, np.zeros_like(x), 0.0, 0.0, 0.0)

    @classmethod
    def lost(cls, x: Array, top: float) -> Spread:
        """Return the spread of paths that went to infinity."""
        return cls(np.full(3, np.nan), np.nan, np.zeros_like(x), top, np.nan, np.nan)


class Spreader(ABC):
    """Collects the noise along a mean path.

    Parameters
    ----------
    rng
        Generator of drawn noise.
    """

    def __init__(self, dynamics: Dynamics, rng: np.random.Generator) -> None:
        self._dynamics, self._rng = dynamics, rng
        self._sources: list[Array] = []

    @abstractmethod
    def add_source(self, x: Array) -> None:
        """Take the noise of the current interval at a point x of it."""

    @abstractmethod
    def spread(self, x: Array, times: Integers, gradients: GradientPath) -> Spread:
        """Return the spread of the paths around x at the last of the times."""

    def _amplification(self, curvature: Array, lags: Integers) -> tuple[Array, Array]:
        """Return the factor of random lags on sums of squared responses, and its standard error."""
        reads, shape = self._dynamics.reads, (len(lags), *curvature.shape)
        if reads is None:
            return np.ones(shape), np.zeros(shape)
        return reads.amplification(self._dynamics.learning_rate * curvature, lags)

    def _lag_deviations(self, curvature: Array, slopes: Array) -> Array:
        """Return deviations due to random lags, (servers, n); `slopes` is by version and mode."""
        reads, eta = self._dynamics.reads, self._dynamics.learning_rate
        if reads is None:
            return np.zeros((1, len(curvature)))
        return reads.deviations(eta * curvature, eta * slopes)


class AllModes(Spreader):
    """All modes of the Hessian, all products."""

    def add_source(self, x: Array) -> None:
        """Take the covariance of the noise."""
        self._sources.append(self._dynamics.problem.gradient_covariance(x))

    def spread(self, x: Array, times: Integers, gradients: GradientPath) -> Spread:
        """Return the spread of the paths around x at the last of the times."""
        problem, eta = self._dynamics.problem, self._dynamics.learning_rate
        curvature, basis = np.linalg.eigh(problem.hessian(x))
        lags = (times[-1] - times)[::-1]
        power = response_power(self._dynamics.law, eta, curvature, lags)
        ratio, ratio_error = self._amplification(curvature, lags)
        amplified = (power * np.sqrt(ratio[:, :, None] * ratio[:, None, :]))[::-1]
        sources = [basis.T @ source @ basis for source in self._sources]
        covariance = np.zeros((problem.dim, problem.dim))
        for j, source in enumerate(sources):
            covariance += self._dynamics.noise_scale * (amplified[j] - amplified[j + 1]) * source
        lagged = self._lag_deviations(curvature, gradients.components(basis.T, int(times[-1])))
        error = _standard_error(curvature, np.diag(covariance), ratio[-1], ratio_error[-1], lagged)
        covariance += lagged.T @ lagged / len(lagged)
        if not np.all(np.isfinite(covariance)):
            return Spread.lost(x, float(curvature[-1]))
        slope = (problem.gradient(x) @ basis)[None]
        cumulants = np.concatenate(quadratic_cumulants(slope, curvature, covariance[None]))
        sizes, axes = np.linalg.eigh(covariance)
        root = axes * np.sqrt(np.maximum(sizes, 0.0))
        force = _bend(problem, x, (basis @ root).T).sum(axis=0)
        z = self._rng.standard_normal((_DRAWS, problem.dim)) @ root.T
        rest = _rest(problem, x, z @ basis.T, z**2 @ curvature / 2)
        by_lags = float((lagged**2 @ curvature).mean() / 2)
        return Spread(cumulants, error, force, float(curvature[-1]), by_lags, rest)


class SampledModes(Spreader):
    """Draws of the noise, and the subspace in which random lags push.

    A draw xi of covariance S_j becomes one of covariance K S_j K with K^2 = sum h_i(H)^2. Then
    tr(H Cov)/2 is the mean of xi.K H K xi / 2, and tr((H Cov)^2) that of (x.H y)^2 over pairs.
    Random lags push along differences of gradients on the mean path, few directions and their
    Krylov space.
    """

    @property
    def _probes(self) -> int:
        return PROBES if self._dynamics.problem.dim <= WIDE_DIM else FEW_PROBES

    def add_source(self, x: Array) -> None:
        """Take draws of the noise."""
        points = np.tile(x, (self._probes, 1))
        self._sources.append(self._dynamics.problem.gradient_and_noise(points, self._rng)[1])

    def spread(self, x: Array, times: Integers, gradients: GradientPath) -> Spread:
        """Return the spread of the paths around x at the last of the times."""
        problem, probes = self._dynamics.problem, self._probes
        noise = self._of_samples(x, times)
        lags = self._of_lags(x, gradients, int(times[-1]))
        first, root = noise.cost + lags.cost, lags.vectors
        # Two independent draws for the samples; the few directions of the lags are known.
        curved = problem.hessian_vector(x, noise.vectors)
        trace = float(((noise.vectors @ curved.T)[np.triu_indices(probes, 1)] ** 2).mean())
        trace += 2.0 * float(((curved @ root.T) ** 2).sum()) / probes + lags.trace
        slope = problem.gradient(x)
        along = float(((noise.vectors @ slope) ** 2).mean() + ((root @ slope) ** 2).sum())
        # Third cumulant: as for equal modes, with the slope along one of them.
        typical = trace / (2 * first) if first > 0 else 0.0
        cumulants = np.array([first, trace / 2 + along, typical * (trace + 3 * along)])
        force = _bend(problem, x, noise.vectors).mean(axis=0)
        if len(root):
            force = force + _bend(problem, x, root).sum(axis=0)
        draws = noise.vectors + self._rng.standard_normal((probes, len(root))) @ root
        quadratic = np.einsum("rd,rd->r", draws, problem.hessian_vector(x, draws)) / 2
        rest = _rest(problem, x, draws, quadratic)
        error = float(np.hypot(noise.error, lags.error))
        return Spread(cumulants, error, force, max(noise.top, lags.top), lags.cost, rest)

    def _of_samples(self, x: Array, times: Integers) -> _Part:
        dynamics, probes = self._dynamics, self._probes
        deviation, cost, error, top = np.zeros((probes, len(x))), 0.0, 0.0, 0.0
        # One source at a time: the Lanczos vectors of all would need too much memory.
        for j, source in enumerate(self._sources):
            curvature, modes, basis = _lanczos(dynamics.problem, x, source)
            top = max(top, float(curvature.max()))
            lags = times[-1] - times[[j + 1, j]]
            power = power_of_squares(dynamics.law, dynamics.learning_rate, curvature, lags)
            ratio, ratio_error = self._amplification(curvature, lags)
            power = power * ratio
            kernel = dynamics.noise_scale * np.maximum(power[1] - power[0], 0.0)
            costs = modes**2 * curvature * kernel / (2 * probes)
            cost += float(costs.sum())
            error += float((np.abs(costs) * ratio_error[1] / ratio[1]).sum())
            deviation += ((modes * np.sqrt(kernel))[:, None] @ basis)[:, 0]
        return _Part(cost, error, top, deviation, np.nan)

    def _of_lags(self, x: Array, gradients: GradientPath, version: int) -> _Part:
        start = gradients.leading(_LAG_DIRECTIONS)
        if self._dynamics.reads is None or not len(start):  # or the gradient never changed
            return _Part(0.0, 0.0, 0.0, np.empty((0, len(x))), 0.0)
        curvature, basis = _krylov(self._dynamics.problem, x, start)
        lagged = self._lag_deviations(curvature, gradients.components(basis, version))
        cost = lagged**2 @ curvature / 2
        error = float(cost.std() / np.sqrt(len(cost)))
        product = curvature[:, None] * (lagged.T @ lagged) / len(lagged)
        sizes, axes = np.linalg.eigh(lagged.T @ lagged / len(lagged))
        vectors = (axes * np.sqrt(np.maximum(sizes, 0.0))).T @ basis
        trace = float(np.sum(product * product.T))
        return _Part(float(cost.mean()), error, float(curvature.max()), vectors, trace)


class _Part(NamedTuple):
    """A part of the spread.

    Attributes
    ----------
    cost, error
        tr(H Cov)/2 and its standard error.
    top
        Largest curvature seen.
    vectors
        Deviations, shape (r, d): draws of covariance Cov; or with a known trace a root of Cov.
    trace
        tr((H Cov)^2), nan if only draws give it.
    """

    cost: float
    error: float
    top: float
    vectors: Array
    trace: float


def _standard_error(
    curvature: Array, variance: Array, ratio: Array, ratio_error: Array, lagged: Array
) -> float:
    """Return the standard error of tr(H Cov)/2, due to the drawn reads.

    Parameters
    ----------
    variance
        Of each mode, due to sampling noise, shape (n,).
    ratio, ratio_error
        Its amplification, shape (n,).
    lagged
        Deviations due to random lags, shape (servers, n).
    """
    amplified = np.abs(curvature * variance * ratio_error / ratio).sum() / 2
    cost = lagged**2 @ curvature / 2
    return float(np.hypot(amplified, cost.std() / np.sqrt(len(cost))))


def _rest(problem: Problem, x: Array, deviation: Array, quadratic: Array) -> float:
    """Return the mean of f(x + z) - f(x) minus its quadratic part (r,); odd orders cancel."""
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


def _krylov(problem: Problem, x: Array, start: Array) -> tuple[Array, Array]:
    """Return Ritz values (m,) and vectors (m, d) of the Krylov space of all start vectors."""
    basis, products, block = np.empty((0, len(x))), np.empty((0, len(x))), start
    for _ in range(_LAG_STEPS):
        for _ in range(2):  # orthogonalising twice is enough
            block = block - (block @ basis.T) @ basis
        orthonormal, triangle = np.linalg.qr(block.T)
        block = orthonormal.T[np.abs(np.diag(triangle)) > _LEAST_NEW * np.abs(triangle).max()]
        if not len(block):
            break
        basis = np.concatenate([basis, block])
        block = problem.hessian_vector(x, block)
        products = np.concatenate([products, block])
    matrix = products @ basis.T
    curvature, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return curvature, vectors.T @ basis
