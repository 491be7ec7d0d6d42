"""The arguments that all descent models share, and the common state of their blocks of paths."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from analysis.models.ensemble import PerUpdate, per_update
from asgd.arrays import Array
from asgd.problems.base import Indices, Problem


@dataclass(frozen=True)
class Descent:
    """A problem with learning rate and batch size of each update, shape (updates,) each."""

    problem: Problem
    learning_rate: Array
    batch_size: Array

    @classmethod
    def of(
        cls, problem: Problem, learning_rate: PerUpdate, batch_size: PerUpdate, updates: int
    ) -> Descent:
        """Expand numbers or schedules; raises the errors of `per_update`."""
        return cls(
            problem,
            per_update(learning_rate, updates, "learning_rate"),
            per_update(batch_size, updates, "batch_size"),
        )


class DescentBlock:
    """Paths of a descent that start at `x`, shape (paths, d); subclasses add `step`."""

    def __init__(self, descent: Descent, x: Array, rng: np.random.Generator) -> None:
        self.problem, self.x, self.rng = descent.problem, x, rng
        # Python floats: NumPy scalars would promote float32 paths to float64.
        self.learning_rate = descent.learning_rate.tolist()
        self.batch_size = descent.batch_size.tolist()
        self._step = np.empty_like(x)

    def descend(self, gradient: Array, k: int) -> None:
        """Subtract the step of update k along a gradient, shape (paths, d), from x, in place."""
        self.x -= np.multiply(gradient, self.learning_rate[k], out=self._step)

    def sampled_gradient(self, x: Array, k: int) -> Array:
        """Return the gradient of update k at the points x with its sampling noise, (paths, d).

        It is grad f + xi, xi ~ N(0, S/b), if `Problem.gives_noise`. Otherwise such noise would need
        all samples; then it is the gradient of one mini-batch of each path, which has the same mean
        and covariance, and the tails of a real update. The result is new memory.
        """
        if not self.problem.gives_noise:
            return self.batch_gradient(x, k)
        gradient, noise = self.problem.gradient_and_noise(x, self.rng)
        noise /= -math.sqrt(self.batch_size[k])
        noise += gradient
        return noise

    def batch_gradient(self, x: Array, k: int) -> Array:
        """Return the gradient of update k for a mini-batch of each path, shape (paths, d)."""
        return self.problem.gradient(x, self.draw_batches(x, k)).astype(x.dtype, copy=False)

    def draw_batches(self, x: Array, k: int) -> Indices:
        """Return the samples of a mini-batch for each of the points x, shape (paths, b).

        Samples are drawn uniformly with replacement.
        """
        shape = (len(x), int(self.batch_size[k]))
        return self.rng.integers(self.problem.n_samples, size=shape)

    def position(self) -> Array:
        """Return x, shape (paths, d)."""
        return self.x


class SampledDescent(DescentBlock):
    """A descent whose updates are means of sampled gradients: a `SampledBlock`."""

    @abstractmethod
    def read(self, k: int) -> list[Array]:
        """Return the points of update k, shape (paths, d) for each gradient of its mean."""

    def apply(self, gradients: Iterator[Array], k: int) -> None:
        """Descend along the one gradient of update k, shape (paths, d)."""
        self.descend(next(gradients), k)

    def step(self, k: int) -> None:
        """Advance one update."""
        self.apply((self.sampled_gradient(x, k) for x in self.read(k)), k)
