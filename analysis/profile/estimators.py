"""Maximum-likelihood estimates of staleness laws from histograms.

Iterative estimators start from a previous estimate, so that a bootstrap can refit thousands of
resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import brentq
from scipy.special import digamma, gammaln, xlogy

from asgd.arrays import Array, Integers
from asgd.staleness.counts import ConwayMaxwellPoisson, NegativeBinomial, Poisson
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric, GeometricMixture
from asgd.staleness.law import StalenessLaw

# Above these the laws equal their limits to working precision: NegativeBinomial the Poisson law,
# ConwayMaxwellPoisson a law on at most two neighbouring values.
LARGEST_SHAPE = 1e6
LARGEST_NU = 1e3
_MIXTURE_STEPS = 400
_MIXTURE_RESTEPS = 100  # steps for a resample, from the estimate of the sample
_MIXTURE_VALUES = 300  # with more distinct values, EM groups neighbours


@dataclass(frozen=True)
class Counts:
    """The histogram of a sample, the input of every estimator.

    Attributes
    ----------
    staleness
        The distinct values, ascending, shape (l,).
    updates
        Number of updates with each value, at least one, shape (l,).
    worker_updates, worker_staleness
        Updates of each worker and the sum of their staleness, shape (workers,), or None.
    """

    staleness: Integers
    updates: Array
    worker_updates: Array | None = None
    worker_staleness: Array | None = None

    @classmethod
    def of(cls, staleness: Integers, workers: Integers | None = None, n_workers: int = 0) -> Counts:
        """Count a sample; `workers` has the number 0, ..., n_workers - 1 of each update."""
        values, counts = np.unique(staleness, return_counts=True)
        if workers is None:
            return cls(values, counts.astype(float))
        updates = np.bincount(workers, minlength=n_workers)
        total = np.bincount(workers, weights=staleness, minlength=n_workers)
        return cls(values, counts.astype(float), updates.astype(float), total.astype(float))

    @cached_property
    def size(self) -> int:
        """Number of values."""
        return int(self.updates.sum())

    @cached_property
    def mean(self) -> float:
        """Mean staleness."""
        return float(self.staleness @ self.updates) / self.size

    @cached_property
    def var(self) -> float:
        """Variance of staleness, with the number of values as the denominator."""
        return float((self.staleness - self.mean) ** 2 @ self.updates) / self.size


def log_likelihood(law: StalenessLaw, counts: Counts) -> float:
    """Return sum of log pmf over the sample, in nats."""
    return float(counts.updates @ law.logpmf(counts.staleness))


def geometric(counts: Counts, start: StalenessLaw | None = None) -> Geometric:
    """Return mu = mean/(1 + mean)."""
    return Geometric(counts.mean / (1.0 + counts.mean))


def poisson(counts: Counts, start: StalenessLaw | None = None) -> Poisson:
    """Return the Poisson law with the mean of the sample."""
    return Poisson(counts.mean)


def constant_plus_geometric(
    counts: Counts, start: StalenessLaw | None = None
) -> ConstantPlusGeometric:
    """Return the minimum as offset, with the geometric law of the rest.

    The likelihood grows with the offset, because a geometric law has less entropy the smaller its
    mean is.
    """
    offset = int(counts.staleness[0])
    excess = max(counts.mean - offset, 0.0)
    return ConstantPlusGeometric(offset, excess / (1.0 + excess))


def empirical(counts: Counts, start: StalenessLaw | None = None) -> Empirical:
    """Return the smoothed frequencies."""
    return Empirical.from_counts(counts.staleness, counts.updates)


def negative_binomial(counts: Counts, start: StalenessLaw | None = None) -> NegativeBinomial:
    """Return the root of the profile score in the shape, up to `LARGEST_SHAPE`."""
    mean, size = counts.mean, counts.size
    if mean == 0.0:
        return NegativeBinomial(1.0, 0.0)
    k = counts.staleness.astype(float)

    def score(log_shape: float) -> float:
        shape = math.exp(log_shape)
        harmonic = float(counts.updates @ (digamma(shape + k) - digamma(shape)))
        return shape * (harmonic - size * math.log1p(mean / shape))

    largest = math.log(LARGEST_SHAPE)
    if counts.var <= mean or score(largest) >= 0.0:
        shape = LARGEST_SHAPE
    else:
        shape = math.exp(brentq(score, math.log(1e-6), largest, xtol=1e-10))
    return NegativeBinomial(shape, mean / (mean + shape))


def conway_maxwell_poisson(
    counts: Counts, start: StalenessLaw | None = None
) -> ConwayMaxwellPoisson:
    """Return the maximum of the concave likelihood over 0 <= nu <= `LARGEST_NU`, by Newton."""
    mean = counts.mean
    if mean == 0.0:
        return ConwayMaxwellPoisson(-700.0, 1.0)
    log_factorials = gammaln(counts.staleness + 1.0)
    target = np.array([mean, float(log_factorials @ counts.updates) / counts.size])
    flat = ConwayMaxwellPoisson(math.log(mean / (1.0 + mean)), 0.0)
    if target[1] >= _moments(flat)[0][1]:
        return flat
    if isinstance(start, ConwayMaxwellPoisson) and 0.0 < start.nu < LARGEST_NU:
        theta = np.array([start.log_rate, start.nu])
    else:
        nu = min(max(mean / max(counts.var, 1e-9), 0.2), LARGEST_NU)
        theta = np.array([nu * math.log(max(mean + (nu - 1.0) / (2.0 * nu), 0.05)), nu])
    return _newton(theta, target, 10.0 * (mean + 10.0) * (1.0 + counts.var))


def _moments(law: ConwayMaxwellPoisson) -> tuple[Array, Array]:
    """Return mean and covariance of (tau, log tau!) under the law."""
    p = law.table
    k = np.arange(len(p), dtype=float)
    statistics = np.stack([k, gammaln(k + 1.0)])
    mean = statistics @ p
    centred = statistics - mean[:, None]
    return mean, (centred * p) @ centred.T


def _newton(theta: Array, target: Array, widest: float) -> ConwayMaxwellPoisson:
    """Maximise log_rate t_0 - nu t_1 - log Z; keep the mode in [0, widest] on the way."""
    sign = np.array([1.0, -1.0])
    law = ConwayMaxwellPoisson(float(theta[0]), float(theta[1]))
    for _ in range(100):
        mean, covariance = _moments(law)
        gradient = sign * (target - mean)
        if law.nu >= LARGEST_NU and gradient[1] >= 0.0:
            step = np.array([gradient[0] / max(covariance[0, 0], 1e-12), 0.0])
        else:
            hessian = covariance * np.outer(sign, sign)
            step = np.linalg.solve(hessian + 1e-13 * np.trace(hessian) * np.eye(2), gradient)
        largest = max(0.5 * law.nu, 0.1)
        step = step * min(1.0, largest / max(abs(step[1]), 1e-300))
        moved = _move(law, step, gradient, target, widest)
        if moved is None:
            return law
        law = moved
    return law


def _move(
    law: ConwayMaxwellPoisson, step: Array, gradient: Array, target: Array, widest: float
) -> ConwayMaxwellPoisson | None:
    """Return the law after the first halved step that raises the likelihood, or None."""
    if step @ gradient < 1e-12:
        return None
    value = _value(law, target)
    for _ in range(40):
        nu = min(max(law.nu + step[1], 1e-6), LARGEST_NU)
        log_rate = law.log_rate + step[0]
        if log_rate < nu * math.log(widest):
            candidate = ConwayMaxwellPoisson(float(log_rate), float(nu))
            if _value(candidate, target) > value:
                return candidate
        step = step / 2.0
    return None


def _value(law: ConwayMaxwellPoisson, target: Array) -> float:
    """Return the log-likelihood per value."""
    return law.log_rate * float(target[0]) - law.nu * float(target[1]) - law.log_normaliser


def geometric_mixture(counts: Counts, start: StalenessLaw | None = None) -> GeometricMixture:
    """Return one geometric law per worker, or two components by EM if workers are unknown."""
    if counts.worker_updates is not None and counts.worker_staleness is not None:
        updates = np.maximum(counts.worker_updates, 1.0)
        mean = counts.worker_staleness / updates
        mus, shares = mean / (1.0 + mean), counts.worker_updates / counts.size
        return GeometricMixture(tuple(mus.tolist()), tuple(shares.tolist()))
    if isinstance(start, GeometricMixture) and np.ptp(start.mus) > 1e-3:
        mus, shares = np.array(start.mus), np.array(start.shares)
        return _expectation_maximisation(counts, mus, shares, _MIXTURE_RESTEPS)
    means = np.array([0.5, 1.5]) * counts.mean
    mus, shares = means / (1.0 + means), np.array([0.5, 0.5])
    return _expectation_maximisation(counts, mus, shares, _MIXTURE_STEPS)


def _expectation_maximisation(
    counts: Counts, mus: Array, shares: Array, steps: int
) -> GeometricMixture:
    group = np.arange(len(counts.staleness))
    group = group * min(len(group), _MIXTURE_VALUES) // len(group)
    n = np.bincount(group, counts.updates)
    seen = np.bincount(group, counts.updates * counts.staleness) / n
    before = -math.inf
    for _ in range(steps):
        # in logarithms: the likelihood of an outlier underflows
        with np.errstate(divide="ignore"):
            log_joint = np.log(shares) + np.log1p(-mus) + xlogy(seen[:, None], mus)
        total = np.logaddexp.reduce(log_joint, axis=1)
        value = float(n @ total)
        if value - before < 1e-7:
            break
        before = value
        part = n[:, None] * np.exp(log_joint - total[:, None])
        weight = part.sum(axis=0)
        mean = (seen @ part) / np.maximum(weight, 1e-300)
        mus, shares = mean / (1.0 + mean), weight / weight.sum()
    order = np.argsort(mus)
    return GeometricMixture(tuple(mus[order].tolist()), tuple(shares[order].tolist()))


ESTIMATORS: dict[str, Callable[[Counts, StalenessLaw | None], StalenessLaw]] = {
    Geometric.name: geometric,
    GeometricMixture.name: geometric_mixture,
    NegativeBinomial.name: negative_binomial,
    Poisson.name: poisson,
    # the simpler law for constant staleness, so before Conway-Maxwell-Poisson
    ConstantPlusGeometric.name: constant_plus_geometric,
    ConwayMaxwellPoisson.name: conway_maxwell_poisson,
    Empirical.name: empirical,
}
