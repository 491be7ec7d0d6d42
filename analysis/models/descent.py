"""The arguments that all descent models share, and the common state of their blocks of paths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.models.ensemble import PerUpdate, per_update
from asgd.arrays import Array
from asgd.problems.base import Problem


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

    def position(self) -> Array:
        """Return x, shape (paths, d)."""
        return self.x
