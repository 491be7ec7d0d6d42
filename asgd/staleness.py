"""The one definition of staleness, and its laws.

The staleness of an update is the number of updates applied between reading the snapshot its
gradient was computed on and applying that gradient: `staleness = update - read_version >= 0`,
where `update` counts the updates applied before this one.

A law is a probability distribution of staleness on 0, 1, 2, ... in scipy's conventions: `pmf`,
`cdf`, `mean`, `var`, `rvs`. Laws are frozen, comparable and can be stored: `to_dict`,
`law_from_dict`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast, overload

import numpy as np
import numpy.typing as npt

from asgd.errors import InputError

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Size = int | tuple[int, ...] | None

_LONGEST_SUPPORT = 10_000_000


@overload
def staleness_of(update: int, read_version: int) -> int: ...
@overload
def staleness_of(update: npt.ArrayLike, read_version: npt.ArrayLike) -> Integers: ...
def staleness_of(update: Any, read_version: Any) -> Any:
    """Return update - read_version, in updates.

    Parameters
    ----------
    update
        How many updates were applied before this one, integer or shape (m,).
    read_version
        The version of the snapshot the gradient was computed on, same shape.

    Raises
    ------
    InputError
        A version is negative or was read before it existed.
    """
    if not isinstance(update, int) or not isinstance(read_version, int):
        update, read_version = np.asarray(update), np.asarray(read_version)
    value = update - read_version
    if np.any(value < 0) or np.any(read_version < 0):
        raise InputError(
            f"staleness: read version {_first_bad(read_version, value)} is outside 0..update"
        )
    return value


def _first_bad(read_version: Any, value: Any) -> int:
    bad = np.ravel((np.asarray(value) < 0) | (np.asarray(read_version) < 0))
    return int(np.ravel(read_version)[np.argmax(bad)])


class StalenessLaw(ABC):
    """A probability distribution on 0, 1, 2, ...; subclasses are frozen dataclasses.

    A subclass gives `_pmf` (or `_logpmf`) and `_tail` at whole numbers k >= 0 held as floats, its
    mean and variance `_moments`, and `_rvs`; `_tail(0)` is not used.
    """

    name: ClassVar[str]

    def _pmf(self, k: Array) -> Array:
        return np.exp(self._logpmf(k))

    def _logpmf(self, k: Array) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(self._pmf(k))

    @abstractmethod
    def _tail(self, k: Array) -> Array: ...

    @abstractmethod
    def _moments(self) -> tuple[float, float]: ...

    @abstractmethod
    def _rvs(self, size: Size, rng: np.random.Generator) -> Any: ...

    @property
    def params(self) -> dict[str, Any]:
        """The parameters by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(cast(Any, self))}

    @property
    def n_parameters(self) -> int:
        """Number of free parameters, as AIC counts them."""
        return len(self.params)

    def pmf(self, l: npt.ArrayLike) -> Array:
        """Return P(tau = l), shape of l."""
        k, outside = _counts(l)
        return np.where(outside, 0.0, self._pmf(k))[()]

    def logpmf(self, l: npt.ArrayLike) -> Array:
        """Return log P(tau = l), shape of l; minus infinity outside the support."""
        k, outside = _counts(l)
        return np.where(outside, -np.inf, self._logpmf(k))[()]

    def tail(self, l: npt.ArrayLike) -> Array:
        """Return P(tau >= l), shape of l, accurate where it is small."""
        k = np.maximum(np.ceil(np.asarray(l, dtype=float)), 0.0)
        return np.where(k == 0, 1.0, self._tail(k))[()]

    def cdf(self, l: npt.ArrayLike) -> Array:
        """Return P(tau <= l), shape of l."""
        return np.asarray(1.0 - self.tail(np.floor(np.asarray(l, dtype=float)) + 1.0))[()]

    def mean(self) -> float:
        """Return E tau, in updates."""
        return self._moments()[0]

    def var(self) -> float:
        """Return the variance of tau, in updates squared."""
        return self._moments()[1]

    def std(self) -> float:
        """Return the standard deviation of tau, in updates."""
        return math.sqrt(self.var())

    def rvs(self, size: Size = None, rng: np.random.Generator | None = None) -> Any:
        """Draw staleness: an integer, or an int64 array of the given size.

        Without a generator the draws are new on every call, as in scipy.
        """
        return self._rvs(size, np.random.default_rng() if rng is None else rng)

    def support_length(self, tail: float = 1e-6) -> int:
        """Return the smallest L with P(tau >= L) < tail."""
        _check(0.0 < tail < 1.0, "tail", tail, "a probability between 0 and 1")
        high = 1
        while self.tail(high) >= tail:
            high *= 2
            _check(high <= _LONGEST_SUPPORT, "tail", tail, f"more: {self!r} is too wide")
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.tail(middle) >= tail else (low, middle)
        return high

    def weights(self, length: int) -> Array:
        """Return pmf(0), ..., pmf(length - 1) scaled to sum to one, shape (length,)."""
        weights = self.pmf(np.arange(length))
        total = float(weights.sum())
        _check(total > 0.0, "length", length, f"more: {self!r} has no mass below it")
        return np.asarray(weights / total)

    def hazard(self, length: int) -> Array:
        """Return P(tau = l | tau >= l) for l = 0, ..., length - 1; one beyond the support."""
        l = np.arange(length)
        tail = self.tail(l)
        beyond = tail <= 0.0
        return np.minimum(np.where(beyond, 1.0, self.pmf(l) / np.where(beyond, 1.0, tail)), 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Return a description that `law_from_dict` reads and JSON can store."""
        params = {k: list(v) if isinstance(v, tuple) else v for k, v in self.params.items()}
        return {"law": self.name, **params}


def _counts(l: npt.ArrayLike) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return l as floats with everything outside 0, 1, 2, ... replaced by 0, and where it was."""
    values = np.asarray(l, dtype=float)
    outside = (values < 0) | (values != np.floor(values))
    return np.where(outside, 0.0, values), outside


def _check(condition: bool, key: str, value: Any, accepted: str) -> None:
    if not condition:
        raise InputError(f"{key} = {value}: expected {accepted}")


def _check_mu(mu: float, key: str = "mu") -> None:
    _check(0.0 <= mu < 1.0, key, mu, f"0 <= {key} < 1")


def _tail_of(probabilities: Array, k: Array) -> Array:
    """Return P(tau >= k) from a table of probabilities, summed from the small end."""
    tails = np.append(np.cumsum(probabilities[::-1])[::-1], 0.0)
    return np.asarray(tails[np.minimum(k, len(probabilities)).astype(np.int64)])


@dataclass(frozen=True)
class Geometric(StalenessLaw):
    """P(tau = l) = (1 - mu) mu^l: a server whose next worker is always uniformly random."""

    name: ClassVar[str] = "geometric"
    mu: float

    def __post_init__(self) -> None:
        _check_mu(self.mu)

    def _pmf(self, k: Array) -> Array:
        return np.asarray((1.0 - self.mu) * self.mu**k)

    def _tail(self, k: Array) -> Array:
        return np.asarray(self.mu**k)

    def _moments(self) -> tuple[float, float]:
        return self.mu / (1.0 - self.mu), self.mu / (1.0 - self.mu) ** 2

    def _rvs(self, size: Size, rng: np.random.Generator) -> Any:
        return rng.geometric(1.0 - self.mu, size) - 1


@dataclass(frozen=True)
class GeometricMixture(StalenessLaw):
    """sum_i w_i (1 - mu_i) mu_i^l: memoryless workers of unequal rates, one component each.

    `mus` are the mu_i and `shares` the w_i, which sum to one.
    """

    name: ClassVar[str] = "geometric_mixture"
    mus: tuple[float, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mus", tuple(float(mu) for mu in self.mus))
        object.__setattr__(self, "shares", tuple(float(share) for share in self.shares))
        for mu in self.mus:
            _check_mu(mu, "mus")
        same = len(self.mus) == len(self.shares) > 0
        _check(same, "shares", len(self.shares), f"one for each of the {len(self.mus)} mus")
        one = min(self.shares) >= 0.0 and abs(math.fsum(self.shares) - 1.0) < 1e-9
        _check(one, "shares", self.shares, "non-negative numbers that sum to one")

    @property
    def n_parameters(self) -> int:
        """One mu for each component, and the shares but one."""
        return 2 * len(self.mus) - 1

    @cached_property
    def _distinct(self) -> list[tuple[float, Geometric]]:
        mus, where = np.unique(self.mus, return_inverse=True)
        shares = np.bincount(where, weights=self.shares)
        return [(float(w), Geometric(float(mu))) for mu, w in zip(mus, shares, strict=True)]

    def _pmf(self, k: Array) -> Array:
        return np.asarray(sum(w * law._pmf(k) for w, law in self._distinct))

    def _tail(self, k: Array) -> Array:
        return np.asarray(sum(w * law._tail(k) for w, law in self._distinct))

    def _moments(self) -> tuple[float, float]:
        mean = sum(w * law.mean() for w, law in self._distinct)
        return mean, sum(w * (law.var() + (law.mean() - mean) ** 2) for w, law in self._distinct)

    def _rvs(self, size: Size, rng: np.random.Generator) -> Any:
        component = rng.choice(len(self.mus), size, p=np.array(self.shares) / sum(self.shares))
        return rng.geometric(1.0 - np.asarray(self.mus)[component], size) - 1


@dataclass(frozen=True)
class NegativeBinomial(StalenessLaw):
    """P(tau = l) = Gamma(l+shape)/(Gamma(shape) l!) (1-mu)^shape mu^l; shape 1 is geometric."""

    name: ClassVar[str] = "negative_binomial"
    shape: float
    mu: float

    def __post_init__(self) -> None:
        _check(0.0 < self.shape < math.inf, "shape", self.shape, "shape > 0")
        _check_mu(self.mu)

    def _logpmf(self, k: Array) -> Array:
        from scipy.special import betaln, xlog1py, xlogy

        # log of Gamma(k + shape) / (Gamma(shape) k!), without the cancellation of three large
        # log-gammas when the shape is large
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
    """P(tau = l) = exp(-rate) rate^l / l!; `rate` is the mean, in updates."""

    name: ClassVar[str] = "poisson"
    rate: float

    def __post_init__(self) -> None:
        _check(0.0 <= self.rate < math.inf, "rate", self.rate, "rate >= 0")

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
    """P(tau = l) ~ exp(l log_rate - nu log l!): any dispersion; nu 1 Poisson, nu 0 geometric."""

    name: ClassVar[str] = "conway_maxwell_poisson"
    log_rate: float
    nu: float

    def __post_init__(self) -> None:
        _check(math.isfinite(self.log_rate), "log_rate", self.log_rate, "a finite number")
        _check(0.0 <= self.nu < math.inf, "nu", self.nu, "nu >= 0")
        _check(self.nu > 0.0 or self.log_rate < 0.0, "log_rate", self.log_rate, "< 0 where nu = 0")

    @cached_property
    def table(self) -> Array:
        """Probabilities up to where the rest is below double precision."""
        from scipy.special import gammaln

        length = 64
        while length <= _LONGEST_SUPPORT:
            k = np.arange(length, dtype=float)
            log_term = k * self.log_rate - self.nu * gammaln(k + 1.0)
            log_term -= log_term.max()
            log_ratio = self.log_rate - self.nu * math.log(length)
            if log_ratio < 0.0 and log_term[-1] - math.log(-math.expm1(log_ratio)) < -40.0:
                term = np.exp(log_term)
                return np.asarray(term / term.sum())
            length *= 2
        raise InputError(f"{self!r} spreads over more than {_LONGEST_SUPPORT} staleness values")

    def _pmf(self, k: Array) -> Array:
        last = len(self.table) - 1
        return np.where(k > last, 0.0, self.table[np.minimum(k, last).astype(np.int64)])

    def _tail(self, k: Array) -> Array:
        return _tail_of(self.table, k)

    def _moments(self) -> tuple[float, float]:
        k = np.arange(len(self.table))
        mean = float(k @ self.table)
        return mean, float((k - mean) ** 2 @ self.table)

    def _rvs(self, size: Size, rng: np.random.Generator) -> Any:
        return np.searchsorted(np.cumsum(self.table[:-1]), rng.random(size), "right")


@dataclass(frozen=True)
class ConstantPlusGeometric(StalenessLaw):
    """tau = offset + a geometric part: a fixed pipeline depth and memoryless waiting."""

    name: ClassVar[str] = "constant_plus_geometric"
    offset: int
    mu: float = 0.0

    def __post_init__(self) -> None:
        whole = self.offset >= 0 and self.offset == int(self.offset)
        _check(whole, "offset", self.offset, "0, 1, 2, ...")
        _check_mu(self.mu)

    def _pmf(self, k: Array) -> Array:
        return Geometric(self.mu).pmf(k - self.offset)

    def _tail(self, k: Array) -> Array:
        return Geometric(self.mu).tail(k - self.offset)

    def _moments(self) -> tuple[float, float]:
        mean, var = Geometric(self.mu)._moments()
        return self.offset + mean, var

    def _rvs(self, size: Size, rng: np.random.Generator) -> Any:
        return self.offset + Geometric(self.mu).rvs(size, rng)


@dataclass(frozen=True)
class Empirical(StalenessLaw):
    """Measured frequencies, continued by a geometric tail.

    `probabilities` are P(tau = l) for l < threshold = len(probabilities); the mass that is left
    lies at threshold + a geometric variable of parameter `tail_mu`.
    """

    name: ClassVar[str] = "empirical"
    probabilities: tuple[float, ...]
    tail_mu: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "probabilities", tuple(float(p) for p in self.probabilities))
        total = math.fsum(self.probabilities)
        proper = min(self.probabilities, default=0.0) >= 0.0 and total <= 1.0 + 1e-9
        _check(proper, "probabilities", f"... of sum {total}", "numbers >= 0 of sum at most one")
        _check_mu(self.tail_mu, "tail_mu")

    @classmethod
    def from_sample(cls, sample: npt.ArrayLike, tail_count: int | None = None) -> Empirical:
        """Return the law of a sample; its mean is the sample's mean exactly.

        Parameters
        ----------
        sample
            Staleness values, shape (m,).
        tail_count
            The tail starts at the largest value that at least this many observations reach; its
            parameter is the maximum-likelihood one of their excesses. Default sqrt(m), at least
            10.
        """
        values = np.asarray(sample)
        _check(values.ndim == 1 and values.size > 0, "sample", values.shape, "shape (m,), m > 0")
        _check(bool(np.all(values >= 0)), "sample", values.min(), "staleness >= 0")
        values = values.astype(np.int64)
        if tail_count is None:
            tail_count = max(10, math.isqrt(values.size))
        counts = np.bincount(values)
        reach = np.cumsum(counts[::-1])[::-1]
        threshold = int(np.flatnonzero(reach >= min(tail_count, values.size))[-1])
        excess = float(np.mean(values[values >= threshold] - threshold))
        frequencies = counts[:threshold] / values.size
        return cls(tuple(frequencies.tolist()), excess / (1.0 + excess))

    @property
    def n_parameters(self) -> int:
        """The frequencies that are not zero, and the tail's parameter."""
        return sum(p > 0.0 for p in self.probabilities) + (self.tail_mu > 0.0)

    @cached_property
    def _bulk(self) -> Array:
        return np.array(self.probabilities, dtype=float)

    @cached_property
    def _rest(self) -> float:
        return max(0.0, 1.0 - math.fsum(self.probabilities))

    def _pmf(self, k: Array) -> Array:
        threshold = len(self._bulk)
        bulk = np.append(self._bulk, 0.0)[np.minimum(k, threshold).astype(np.int64)]
        return np.where(
            k < threshold, bulk, self._rest * Geometric(self.tail_mu).pmf(k - threshold)
        )

    def _tail(self, k: Array) -> Array:
        rest = self._rest * Geometric(self.tail_mu).tail(k - len(self._bulk))
        return np.asarray(_tail_of(self._bulk, k) + rest)

    def _moments(self) -> tuple[float, float]:
        k = np.arange(len(self._bulk))
        excess, excess_var = Geometric(self.tail_mu)._moments()
        beyond = len(k) + excess
        mean = float(k @ self._bulk) + self._rest * beyond
        spread = self._rest * ((beyond - mean) ** 2 + excess_var)
        return mean, float((k - mean) ** 2 @ self._bulk) + spread

    def _rvs(self, size: Size, rng: np.random.Generator) -> Any:
        threshold = len(self._bulk)
        bulk = np.searchsorted(np.cumsum(self._bulk), rng.random(size), "right")
        excess = Geometric(self.tail_mu).rvs(size, rng)
        return np.where(bulk < threshold, bulk, threshold + excess)[()]


LAWS: dict[str, type[StalenessLaw]] = {
    law.name: law
    for law in (
        Geometric,
        GeometricMixture,
        NegativeBinomial,
        Poisson,
        ConwayMaxwellPoisson,
        ConstantPlusGeometric,
        Empirical,
    )
}


def law_from_dict(description: Mapping[str, Any]) -> StalenessLaw:
    """Rebuild a law from what its `to_dict` returned.

    Raises
    ------
    InputError
        The law is unknown or its parameters are not its own.
    """
    params = dict(description)
    name = params.pop("law", None)
    if name not in LAWS:
        raise InputError(f"law = {name!r}: expected one of {', '.join(LAWS)}")
    try:
        return LAWS[name](**params)
    except TypeError as error:
        raise InputError(f"law {name!r}: {error}") from None


def named_law(name: str, mean: float) -> StalenessLaw:
    """Return the law of that name and mean (in updates): geometric, poisson or constant.

    Raises
    ------
    InputError
        Another name, a negative mean, or a constant that is not a whole number.
    """
    _check(0.0 <= mean < math.inf, "mean_staleness", mean, "a number >= 0")
    if name == Geometric.name:
        return Geometric(mean / (1.0 + mean))
    if name == Poisson.name:
        return Poisson(mean)
    _check(name == "constant", "staleness law", repr(name), "geometric, poisson or constant")
    _check(mean == int(mean), "mean_staleness", mean, "a whole number for the constant law")
    return ConstantPlusGeometric(int(mean))
