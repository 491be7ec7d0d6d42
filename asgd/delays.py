"""Compute-time laws and the other times of a worker's cycle, in seconds.

A law gives the time added to a gradient computation. Under a `memoryless` law the staleness is
geometric, as in the theory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asgd.arguments import number, shown
from asgd.config.tables import ClusterConfig, SimulationConfig
from asgd.errors import InputError, did_you_mean

LAWS = ("none", "constant", "exponential", "gamma", "lognormal")


@dataclass(frozen=True)
class ComputeTime:
    """Compute-time law with one mean per worker.

    >>> times = asgd.ComputeTime("exponential", [1.0, 1.0, 4.0])
    >>> times.memoryless
    True

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
            hint = did_you_mean(str(self.law), LAWS)
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


@dataclass(frozen=True)
class CycleTimes:
    """The fixed times of a worker's cycle, in seconds.

    Attributes
    ----------
    gradient_time
        Fixed part of each computation.
    message_time
        One-way delay between worker and server.
    service_time
        Time of the server for one push; pushes queue.
    """

    gradient_time: float = 0.0
    message_time: float = 0.0
    service_time: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number(value, name, least=0.0)

    @classmethod
    def of(cls, given: SimulationConfig) -> CycleTimes:
        """Take the `[simulation]` times of a configuration."""
        return cls(given.gradient_time, given.message_time, given.service_time)

    @property
    def messages(self) -> float:
        """The time of both messages of a cycle."""
        return 2.0 * self.message_time

    @property
    def dead_time(self) -> float:
        """The fixed time outside the server: gradient and both messages."""
        return self.gradient_time + self.messages
