"""Schedules by update number: a value and its changes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asgd.config import OptimizerConfig


@dataclass(frozen=True)
class Schedule:
    """A piecewise constant function of the update number.

    Attributes
    ----------
    first
        The value before the first change.
    at
        Update numbers from which on the next value holds, growing.
    values
        As many values.
    """

    first: float
    at: Sequence[int] = ()
    values: Sequence[float] = ()

    def __call__(self, update: int) -> float:
        """Return the value at an update."""
        number = bisect_right(self.at, update)
        return self.values[number - 1] if number else self.first

    def array(self, updates: int) -> npt.NDArray[np.float64]:
        """Return the values at the updates 0, 1, ..., shape (updates,)."""
        number = np.searchsorted(np.asarray(self.at, dtype=int), np.arange(updates), "right")
        return np.array([self.first, *self.values], dtype=float)[number]


def learning_rate_schedule(optimizer: OptimizerConfig) -> Schedule:
    """Return the learning rate of each update."""
    changes = optimizer.learning_rate_schedule
    return Schedule(optimizer.learning_rate, changes.at, changes.values)


def batch_schedule(optimizer: OptimizerConfig) -> Schedule:
    """Return the batch size of snapshots by their version, in samples."""
    changes = optimizer.batch_schedule
    return Schedule(optimizer.batch_size, changes.at, changes.values)
