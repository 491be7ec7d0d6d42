"""The base class of staleness laws, with the methods of a scipy distribution."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array
from asgd.errors import InputError

Size = int | tuple[int, ...] | None

LONGEST_SUPPORT = 10_000_000
_TABLE = 20_000  # for fewer values, `ppf` searches a table instead of bisecting


class StalenessLaw(ABC):
    """A probability distribution on 0, 1, 2, ...; subclasses are frozen dataclasses.

    >>> law: asgd.StalenessLaw = asgd.Poisson(3.0)
    >>> law.mean(), law.rvs(10, np.random.default_rng(0)).shape
    (3.0, (10,))

    A subclass defines `_pmf` or `_logpmf`, `_tail`, `_moments` (mean and variance) and `_rvs`. The
    arguments k are whole numbers >= 0 as floats; the result of `_tail(0)` is ignored.
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
        """Return P(tau >= l), shape of l, accurate even for tiny probabilities."""
        k = np.maximum(np.ceil(np.asarray(l, dtype=float)), 0.0)
        return np.where(k == 0, 1.0, self._tail(k))[()]

    def cdf(self, l: npt.ArrayLike) -> Array:
        """Return P(tau <= l), shape of l."""
        return np.asarray(1.0 - self.tail(np.floor(np.asarray(l, dtype=float)) + 1.0))[()]

    def ppf(self, q: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the smallest l with P(tau <= l) >= q, shape of q, for 0 <= q < 1."""
        level = np.asarray(q, dtype=float)
        check(bool(np.all((level >= 0.0) & (level < 1.0))), "q", q, "probabilities below 1")
        ends = [self._smallest(float(end)) for end in (level.min(), level.max())]
        if ends[1] - ends[0] < _TABLE:
            table = self.cdf(np.arange(ends[0], ends[1] + 1))
            return np.asarray(ends[0] + np.searchsorted(table, level)).astype(np.int64)[()]
        low, high = np.full(level.shape, ends[0] - 1), np.full(level.shape, ends[1])
        while np.any(high - low > 1):
            middle = (low + high) // 2
            enough = self.cdf(middle) >= level
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return high[()]

    def _smallest(self, level: float) -> int:
        low, high = -1, 0
        while self.cdf(high) < level:
            low, high = high, 2 * high + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.cdf(middle) >= level else (middle, high)
        return high

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

        Without `rng`, every call uses a new, unseeded generator.
        """
        return self._rvs(size, np.random.default_rng() if rng is None else rng)

    def support_length(self, tail: float = 1e-6) -> int:
        """Return the smallest L with P(tau >= L) < tail."""
        check(0.0 < tail < 1.0, "tail", tail, "a probability between 0 and 1")
        high = 1
        while self.tail(high) >= tail:
            high *= 2
            if high > LONGEST_SUPPORT:  # not `check`: formatting the law takes a millisecond
                raise InputError(f"tail = {tail}: expected a larger one: {self!r} is too wide")
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.tail(middle) >= tail else (low, middle)
        return high

    def weights(self, length: int) -> Array:
        """Return pmf(0), ..., pmf(length - 1) normalised to sum to one, shape (length,)."""
        weights = self.pmf(np.arange(length))
        total = float(weights.sum())
        if not total > 0.0:
            raise InputError(
                f"length = {length}: expected a larger one: {self!r} has no mass below"
            )
        return np.asarray(weights / total)

    def hazard(self, length: int) -> Array:
        """Return P(tau = l | tau >= l) for l = 0, ..., length - 1; 1 beyond the support."""
        l = np.arange(length)
        tail = self.tail(l)
        beyond = tail <= 0.0
        return np.minimum(np.where(beyond, 1.0, self.pmf(l) / np.where(beyond, 1.0, tail)), 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the parameters of the law, for JSON."""
        params = {k: list(v) if isinstance(v, tuple) else v for k, v in self.params.items()}
        return {"law": self.name, **params}


def _counts(l: npt.ArrayLike) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return l as floats, with values outside 0, 1, 2, ... set to 0, and a mask of these."""
    values = np.asarray(l, dtype=float)
    outside = (values < 0) | (values != np.floor(values))
    return np.where(outside, 0.0, values), outside


def check(condition: bool, key: str, value: Any, accepted: str) -> None:
    """Raise InputError unless the condition holds."""
    if not condition:
        raise InputError(f"{key} = {value}: expected {accepted}")


def checked_law(law: Any, key: str = "law") -> StalenessLaw:
    """Return `law` unchanged.

    Raises
    ------
    InputError
        It is not a staleness law, for example a mean or a name.
    """
    if not isinstance(law, StalenessLaw):
        raise InputError(f"{key} = {law!r}: expected a staleness law such as asgd.Geometric(0.875)")
    return law


def check_mu(mu: float, key: str = "mu") -> None:
    """Raise InputError unless 0 <= mu < 1."""
    check(0.0 <= mu < 1.0, key, mu, f"0 <= {key} < 1")


def tail_of(probabilities: Array, k: Array) -> Array:
    """Return P(tau >= k) from a table of probabilities; the sum starts at the far end."""
    tails = np.append(np.cumsum(probabilities[::-1])[::-1], 0.0)
    return np.asarray(tails[np.minimum(k, len(probabilities)).astype(np.int64)])
