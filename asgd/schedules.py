"""Schedules by update number: a value and its changes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from asgd.config import Configuration, OptimizerConfig, RunConfig, as_config, make_config
from asgd.errors import InputError


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
        if not self.at or update < self.at[0]:
            return self.first
        return self.values[bisect_right(self.at, update) - 1]

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


def with_batch_sizes(config: Configuration, batch_sizes: npt.ArrayLike) -> RunConfig:
    """Return a configuration whose batch size follows a sequence, such as an optimal one.

        batches = analysis.optimal_batch_schedule(curvature, noise, eta, mu, 400, budget=1600)
        cluster.run(asgd.with_batch_sizes(config, batches))

    `config.json` of the run holds it as `batch_size` and `batch_schedule`.

    Of P workers, all read version 0 and one each later version; the P - 1 gradients under way at
    the end are never applied. So an asynchronous run that loses no gradient applies
    `sum(batch_sizes[:updates])` samples less `batch_sizes[v] - batch_sizes[0]` for each of these,
    read at v: of a growing schedule, about P - 1 times the last size minus the first. Of the 1600
    above, 4 workers spend some 1514. In synchronous mode, each update is of P batches of its size.

    Parameters
    ----------
    config
        Everything else.
    batch_sizes
        Integers, shape (updates,): `batch_sizes[v]` is for snapshots of version v, so it is applied
        as many updates later as the gradient is stale. The last one holds from there on.

    Raises
    ------
    InputError
        There is none, or one is not a whole number of samples.
    """
    config, sizes = as_config(config), np.asarray(batch_sizes)
    if sizes.ndim != 1 or not len(sizes) or not np.issubdtype(sizes.dtype, np.integer):
        raise InputError(
            f"batch_sizes: {sizes.dtype} of shape {sizes.shape}; expected integers, one per update"
        )
    at = np.flatnonzero(np.diff(sizes)) + 1
    data = msgspec.to_builtins(config)
    data["optimizer"] |= {
        "batch_size": int(sizes[0]),
        "batch_schedule": {"at": at.tolist(), "values": sizes[at].tolist()},
    }
    return make_config(data)
