"""The empirical law: measured frequencies with a geometric tail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array
from asgd.staleness.geometric import Geometric
from asgd.staleness.law import LONGEST_SUPPORT, Size, StalenessLaw, check, check_mu, tail_of
from asgd.staleness.values import whole_numbers


@dataclass(frozen=True)
class Empirical(StalenessLaw):
    """Measured frequencies with a geometric tail.

    >>> asgd.Empirical([0.5, 0.25, 0.25]).mean()
    0.75

    `probabilities` are P(tau = l) for l < threshold = len(probabilities). The remaining mass is
    that of threshold plus a geometric variable with parameter `tail_mu`.
    """

    name: ClassVar[str] = "empirical"
    probabilities: tuple[float, ...]
    tail_mu: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "probabilities", tuple(float(p) for p in self.probabilities))
        total = math.fsum(self.probabilities)
        proper = min(self.probabilities, default=0.0) >= 0.0 and total <= 1.0 + 1e-9
        check(proper, "probabilities", f"... of sum {total}", "numbers >= 0 of sum at most one")
        check_mu(self.tail_mu, "tail_mu")

    @classmethod
    def from_sample(cls, sample: npt.ArrayLike, tail_count: int | None = None) -> Empirical:
        """Return the law of a sample; its mean equals the sample mean.

        Parameters
        ----------
        sample
            Staleness values, shape (m,).
        tail_count
            The tail starts at the largest value reached by at least this many observations; its
            parameter is the maximum-likelihood estimate from their excesses. Default sqrt(m), at
            least 10.
        """
        values, counts = np.unique(whole_numbers(sample, "sample"), return_counts=True)
        return cls.from_counts(values, counts, tail_count)

    @classmethod
    def from_counts(
        cls,
        values: npt.NDArray[np.int64],
        counts: npt.NDArray[Any],
        tail_count: int | None = None,
    ) -> Empirical:
        """Return the law of a sample, as `from_sample`, given its distinct values and counts.

        Parameters
        ----------
        values
            Distinct values, ascending, shape (l,).
        counts
            Number of observations of each value, shape (l,).

        Raises
        ------
        InputError
            The table of frequencies would have more than `LONGEST_SUPPORT` entries.
        """
        size = int(counts.sum())
        if tail_count is None:
            tail_count = max(10, math.isqrt(size))
        reach = np.cumsum(counts[::-1])[::-1]
        first = int(np.flatnonzero(reach >= min(tail_count, size))[-1])
        threshold = int(values[first])
        wide = f"most values below {LONGEST_SUPPORT:,}"
        check(threshold <= LONGEST_SUPPORT, "sample", f"... {threshold} ...", wide)
        excess = float((values[first:] - threshold) @ counts[first:] / reach[first])
        frequencies = np.zeros(threshold)
        frequencies[values[:first]] = counts[:first] / size
        return cls(tuple(frequencies.tolist()), excess / (1.0 + excess))

    @property
    def n_parameters(self) -> int:
        """Number of nonzero frequencies, plus one for the tail."""
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

    def _logpmf(self, k: Array) -> Array:
        threshold = len(self._bulk)
        with np.errstate(divide="ignore"):
            bulk, rest = np.log(np.append(self._bulk, 0.0)), np.log(self._rest)
        inside = bulk[np.minimum(k, threshold).astype(np.int64)]
        beyond = rest + Geometric(self.tail_mu).logpmf(k - threshold)
        return np.asarray(np.where(k < threshold, inside, beyond), dtype=float)

    def _tail(self, k: Array) -> Array:
        rest = self._rest * Geometric(self.tail_mu).tail(k - len(self._bulk))
        return np.asarray(tail_of(self._bulk, k) + rest)

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
