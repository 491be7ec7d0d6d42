"""The time of a gradient as a function of its batch size: a fixed part and a part per sample."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from asgd.arrays import Array
from asgd.problems.base import Problem
from asgd.rundir.reader import Run
from asgd.streams import stream

_SECONDS = 0.2  # measuring time per batch size
_LEAST_CALLS = 5
_WIDENED = 4  # second batch size over the first, if only one is given
_LEAST_ROWS = 20  # gradients per batch size of a run for a reliable median


@dataclass(frozen=True)
class GradientCost:
    """Seconds of a gradient, fixed + per_sample b for batch size b.

    Attributes
    ----------
    fixed, per_sample
        In seconds, both at least 0.
    source
        How it was measured, as a phrase.
    """

    fixed: float
    per_sample: float
    source: str

    @classmethod
    def through(
        cls, small: tuple[int, float], large: tuple[int, float], source: str
    ) -> GradientCost:
        """Return the line through two measured points (batch size, seconds)."""
        (b, t), (wide, longer) = small, large
        per_sample = max(0.0, (longer - t) / (wide - b))
        return cls(max(0.0, t - per_sample * b), per_sample, source)

    @classmethod
    def probe(cls, problem: Problem, x: Array, batch_sizes: list[int]) -> GradientCost:
        """Time gradients at x, shape (d,), with the smallest and the largest batch, in process."""
        small, large = min(batch_sizes), max(batch_sizes)
        large = _WIDENED * small if large == small else large
        near, far = ((b, _seconds(problem, x, b)) for b in (small, large))
        return cls.through(near, far, "timed in this process")

    @classmethod
    def of_run(cls, run: Run) -> GradientCost | None:
        """Estimate the cost from a run whose batch size changed; None if it hardly changed."""
        computed = run.trace.groupby("batch_size")["compute_seconds"].agg(["median", "size"])
        computed = computed[computed["size"] >= _LEAST_ROWS]
        if len(computed) < 2:
            return None
        size, seconds = computed.index.to_numpy(), computed["median"].to_numpy()
        near, far = ((int(size[i]), float(seconds[i])) for i in (0, -1))
        return cls.through(near, far, "measured in the run")

    def seconds(self, batch_size: int) -> float:
        """Return the seconds of one gradient."""
        return self.fixed + self.per_sample * batch_size

    def __str__(self) -> str:
        return (
            f"a gradient takes {1e3 * self.fixed:.3g} ms and {1e6 * self.per_sample:.3g} us a "
            f"sample, {self.source}"
        )


def _seconds(problem: Problem, x: Array, batch_size: int) -> float:
    """Return the median time of a gradient."""
    rng = stream(0, "probe")
    taken: list[float] = []
    while len(taken) < _LEAST_CALLS or sum(taken) < _SECONDS:
        batch = rng.integers(problem.n_samples, size=batch_size)
        started = time.perf_counter()
        problem.gradient(x, batch)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken[1:]))  # the first call has a cold cache
