"""Count distributions: negative binomial, Poisson, Conway-Maxwell-Poisson."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from asgd.arrays import Array
from asgd.errors import InputError
from asgd.staleness.law import Size, StalenessLaw, check, check_mu, tail_of

# Bounds the cost of a bootstrap, which computes a table per resample; allows means up to 800.
LONGEST_TABLE = 2**15


@dataclass(frozen=True)
class NegativeBinomial(StalenessLaw):
    """P(tau = l) = Gamma(l+shape)/(Gamma(shape) l!) (1-mu)^shape mu^l; shape 1 is geometric.

    Raises
    ------
    InputError
        Unless shape > 0 and 0 <= mu < 1.
    """

    name: ClassVar[str] = "negative_binomial"
    shape: float
    mu: float

    def __post_init__(self) -> None:
        check(0.0 < self.shape < math.inf, "shape", self.shape, "shape > 0")
        check_mu(self.mu)

    def _logpmf(self, k: Array) -> Array:
        from scipy.special import betaln, xlog1py, xlogy

        # log of Gamma(k + shape) / (Gamma(shape) k!); for a large shape, a sum of three log-gammas
        # would cancel.
        log_choose = -np.log(k + self.shape) - betaln(self.shape, k + 1.0)
        return np.asarray(log_choose + xlog1py(self.shape, -self.mu) + xlogy(k, self.mu))

    def _tail(self, k: Array) -> Array:
        from scipy.special import betainc

        return np.asarray(betainc(np.maximum(k, 1.0), self.shape, self.mu))

    def _moments(self) -> tuple[float, float]:
        mean = self.shape * self.mu / (1.0 - self.mu)
        return mean, mean / (1.0 - self.mu)

    def _rvs(self, size: Size, rng: np.random.Generator) -> Any:
        return rng.negative_binomial(self.shape, 1.0 - self.mu, size)


@dataclass(frozen=True)
class Poisson(StalenessLaw):
    """P(tau = l) = exp(-rate) rate^l / l!; `rate` is the mean, in updates.

    Raises
    ------
    InputError
        Unless rate >= 0.
    """

    name: ClassVar[str] = "poisson"
    rate: float

    def __post_init__(self) -> None:
        check(0.0 <= self.rate < math.inf, "rate", self.rate, "rate >= 0")

    def _logpmf(self, k: Array) -> Array:
        from scipy.special import gammaln, xlogy

        return np.asarray(xlogy(k, self.rate) - self.rate - gammaln(k + 1.0))

    def _tail(self, k: Array) -> Array:
        from scipy.special import gammainc

        return np.asarray(gammainc(np.maximum(k, 1.0), self.rate))

    def _moments(self) -> tuple[float, float]:
        return self.rate, self.rate

    def _rvs(self, size: Size, rng: np.random.Generator) -> Any:
        return rng.poisson(self.rate, size)


@dataclass(frozen=True)
class ConwayMaxwellPoisson(StalenessLaw):
    """P(tau = l) proportional to exp(l log_rate - nu log l!): nu = 1 is Poisson, 0 geometric.

    Raises
    ------
    InputError
        Unless nu > 0, or nu = 0 and log_rate < 0.
    """

    name: ClassVar[str] = "conway_maxwell_poisson"
    log_rate: float
    nu: float

    def __post_init__(self) -> None:
        check(math.isfinite(self.log_rate), "log_rate", self.log_rate, "a finite number")
        check(0.0 <= self.nu < math.inf, "nu", self.nu, "nu >= 0")
        check(self.nu > 0.0 or self.log_rate < 0.0, "log_rate", self.log_rate, "< 0 where nu = 0")

    @cached_property
    def table(self) -> Array:
        """Probabilities of 0, 1, ...; the tail below double precision is cut off."""
        from scipy.special import gammaln

        length = 64
        while length <= LONGEST_TABLE:
            k = np.arange(length, dtype=float)
            log_term = k * self.log_rate - self.nu * gammaln(k + 1.0)
            log_term -= log_term.max()
            log_ratio = self.log_rate - self.nu * math.log(length)
            if log_ratio < 0.0 and log_term[-1] - math.log(-math.expm1(log_ratio)) < -40.0:
                term = np.exp(log_term)
                return np.asarray(term / term.sum())
            length *= 2
        raise InputError(f"law = {self!r}: expected at most {LONGEST_TABLE} values of staleness")

    def _logpmf(self, k: Array) -> Array:
        from scipy.special import gammaln

        return np.asarray(k * self.log_rate - self.nu * gammaln(k + 1.0) - self.log_normaliser)

    @cached_property
    def log_normaliser(self) -> float:
        """Logarithm of the sum over l of exp(l log_rate - nu log l!)."""
        mode = int(np.argmax(self.table))
        term = mode * self.log_rate - self.nu * math.lgamma(mode + 1.0)
        return term - math.log(self.table[mode])

    def _tail(self, k: Array) -> Array:
        return tail_of(self.table, k)

    def _moments(self) -> tuple[float, float]:
        k = np.arange(len(self.table))
        mean = float(k @ self.table)
        return mean, float((k - mean) ** 2 @ self.table)

    def _rvs(self, size: Size, rng: np.random.Generator) -> Any:
        return np.searchsorted(np.cumsum(self.table[:-1]), rng.random(size), "right")
