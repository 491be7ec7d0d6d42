"""Compute-time laws of a worker, in seconds.

A law gives the time added to a gradient computation. Under a `memoryless` law the staleness is
geometric, as in the theory.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asgd.arguments import number, shown
from asgd.config import ClusterConfig
from asgd.errors import InputError

LAWS = ("none", "constant", "exponential", "gamma", "lognormal")


@dataclass(frozen=True)
class ComputeTime:
    """Compute-time law with one mean per worker.

    Attributes
    ----------
    law
        "none", "constant", "exponential", "gamma" or "lognormal".
    mean
        Seconds, shape (workers,).
    variation
        Coefficient of variation of the gamma and lognormal laws.
    """

    law: str
    mean: npt.NDArray[np.float64]
    variation: float = 0.5

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            near = difflib.get_close_matches(str(self.law), LAWS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"law = {self.law!r}: {hint}expected {', '.join(LAWS)}")
        try:
            mean = np.asarray(self.mean, dtype=float)
        except (TypeError, ValueError):
            raise InputError(f"mean = {shown(self.mean)}: expected seconds >= 0") from None
        if mean.ndim != 1 or not mean.size or not np.all(np.isfinite(mean) & (mean >= 0.0)):
            raise InputError(
                f"mean = {shown(self.mean)}: expected seconds >= 0, one for each worker"
            )
        object.__setattr__(self, "mean", mean)
        number(self.variation, "variation", above=0.0)

    @classmethod
    def from_config(cls, cluster: ClusterConfig) -> ComputeTime:
        """Return the configured law; a scalar mean applies to every worker."""
        compute = cluster.compute_time
        mean = np.broadcast_to(np.asarray(compute.mean, dtype=float), (cluster.workers,))
        return cls(compute.law, mean * (compute.law != "none"), compute.variation)

    @property
    def memoryless(self) -> bool:
        """Whether the remaining time does not depend on the time already elapsed."""
        return self.law == "exponential"

    def draw_many(
        self, worker: int, size: int, rng: np.random.Generator
    ) -> npt.NDArray[np.float64]:
        """Return `size` independent compute times of `worker`, in seconds, shape (size,)."""
        times = self.draw_relative(size, rng)
        # An added worker has a number beyond the configured ones; workers can only be added if all
        # means are equal.
        times *= self.mean[min(worker, len(self.mean) - 1)]
        return times

    def draw_each(
        self, workers: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> npt.NDArray[np.float64]:
        """Return independent compute times of the given workers, in seconds, same shape."""
        return self.draw_relative(len(workers), rng) * self.mean[workers]

    def draw_relative(self, size: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """Return `size` independent compute times divided by their mean, shape (size,).

        All laws are scale families: a compute time is the worker's mean times such a draw.
        """
        if self.law == "exponential":
            return rng.standard_exponential(size)
        if self.law == "gamma":
            shape = self.variation**-2
            return rng.standard_gamma(shape, size) / shape
        if self.law == "lognormal":
            sigma = np.sqrt(np.log1p(self.variation**2))
            return rng.lognormal(-(sigma**2) / 2, sigma, size)
        return np.ones(size)
