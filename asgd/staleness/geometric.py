"""Geometric laws: memoryless workers with equal or unequal rates, or behind a fixed pipeline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from asgd.arrays import Array
from asgd.staleness.law import Size, StalenessLaw, check, check_mu


@dataclass(frozen=True)
class Geometric(StalenessLaw):
    """P(tau = l) = (1 - mu) mu^l: the next worker to push is always uniformly random.

    >>> law = asgd.Geometric(0.75)
    >>> float(law.mean()), law.pmf([0, 1]).tolist()
    (3.0, [0.25, 0.1875])

    P memoryless workers have mu = 1 - 1/P, and mean P - 1 in updates.

    Raises
    ------
    InputError
        Unless 0 <= mu < 1.
    """

    name: ClassVar[str] = "geometric"
    mu: float

    def __post_init__(self) -> None:
        check_mu(self.mu)

    def _pmf(self, k: Array) -> Array:
        return np.asarray((1.0 - self.mu) * self.mu**k)

    def _logpmf(self, k: Array) -> Array:
        if self.mu == 0.0:
            return np.where(k == 0, 0.0, -np.inf)
        return np.asarray(math.log1p(-self.mu) + k * math.log(self.mu))

    def _tail(self, k: Array) -> Array:
        return np.asarray(self.mu**k)

    def _moments(self) -> tuple[float, float]:
        return self.mu / (1.0 - self.mu), self.mu / (1.0 - self.mu) ** 2

    def _rvs(self, size: Size, rng: np.random.Generator) -> Any:
        return rng.geometric(1.0 - self.mu, size) - 1


@dataclass(frozen=True)
class GeometricMixture(StalenessLaw):
    """P(tau = l) = sum_i w_i (1 - mu_i) mu_i^l: one component per memoryless worker.

    `mus` are the mu_i and `shares` the w_i, which sum to one.

    Raises
    ------
    InputError
        A mu is outside [0, 1), or the shares are negative, too few or many, or do not sum to one.
    """

    name: ClassVar[str] = "geometric_mixture"
    mus: tuple[float, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mus", tuple(float(mu) for mu in self.mus))
        object.__setattr__(self, "shares", tuple(float(share) for share in self.shares))
        for mu in self.mus:
            check_mu(mu, "mus")
        same = len(self.mus) == len(self.shares) > 0
        check(same, "shares", len(self.shares), f"one for each of the {len(self.mus)} mus")
        one = min(self.shares) >= 0.0 and abs(math.fsum(self.shares) - 1.0) < 1e-9
        check(one, "shares", self.shares, "non-negative numbers that sum to one")

    @property
    def n_parameters(self) -> int:
        """The mus, and all shares but one."""
        return 2 * len(self.mus) - 1

    @cached_property
    def _distinct(self) -> list[tuple[float, Geometric]]:
        mus, where = np.unique(self.mus, return_inverse=True)
        shares = np.bincount(where, weights=self.shares)
        return [(float(w), Geometric(float(mu))) for mu, w in zip(mus, shares, strict=True)]

    def _pmf(self, k: Array) -> Array:
        return np.asarray(sum(w * law._pmf(k) for w, law in self._distinct))

    def _logpmf(self, k: Array) -> Array:
        parts = [math.log(w) + law._logpmf(k) for w, law in self._distinct if w > 0.0]
        return np.asarray(np.logaddexp.reduce(parts, axis=0))

    def _tail(self, k: Array) -> Array:
        return np.asarray(sum(w * law._tail(k) for w, law in self._distinct))

    def _moments(self) -> tuple[float, float]:
        mean = sum(w * law.mean() for w, law in self._distinct)
        return mean, sum(w * (law.var() + (law.mean() - mean) ** 2) for w, law in self._distinct)

    def _rvs(self, size: Size, rng: np.random.Generator) -> Any:
        component = rng.choice(len(self.mus), size, p=np.array(self.shares) / sum(self.shares))
        return rng.geometric(1.0 - np.asarray(self.mus)[component], size) - 1


@dataclass(frozen=True)
class ConstantPlusGeometric(StalenessLaw):
    """tau = offset + a geometric variable: a fixed pipeline depth and memoryless waiting.

    `offset` is in updates; with mu = 0 the staleness is always `offset`.

    Raises
    ------
    InputError
        Unless the offset is 0, 1, 2, ... and 0 <= mu < 1.
    """

    name: ClassVar[str] = "constant_plus_geometric"
    offset: int
    mu: float = 0.0

    def __post_init__(self) -> None:
        whole = self.offset >= 0 and self.offset == int(self.offset)
        check(whole, "offset", self.offset, "0, 1, 2, ...")
        check_mu(self.mu)

    def _pmf(self, k: Array) -> Array:
        return Geometric(self.mu).pmf(k - self.offset)

    def _logpmf(self, k: Array) -> Array:
        return Geometric(self.mu).logpmf(k - self.offset)

    def _tail(self, k: Array) -> Array:
        return Geometric(self.mu).tail(k - self.offset)

    def _moments(self) -> tuple[float, float]:
        mean, var = Geometric(self.mu)._moments()
        return self.offset + mean, var

    def _rvs(self, size: Size, rng: np.random.Generator) -> Any:
        return self.offset + Geometric(self.mu).rvs(size, rng)
