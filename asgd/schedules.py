"""Piecewise constant schedules of the learning rate and the batch size."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from asgd.config.make import Configuration, as_config, make_config
from asgd.config.tables import OptimizerConfig, RunConfig
from asgd.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """A piecewise constant function of the update number.

    Attributes
    ----------
    first
        The value before the first change.
    at
        Update numbers of the changes, increasing.
    values
        The value from each change on.
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
    """Return the batch size in samples, by the version of the snapshot."""
    changes = optimizer.batch_schedule
    return Schedule(optimizer.batch_size, changes.at, changes.values)


def with_batch_sizes(config: Configuration, batch_sizes: npt.ArrayLike) -> RunConfig:
    """Return a configuration with a given sequence of batch sizes, such as an optimal one.

        batches = analysis.optimal_batch_schedule(curvature, noise, eta, mu, 400, budget=1600)
        cluster.run(asgd.with_batch_sizes(config, batches))

    The result stores it as `batch_size` and `batch_schedule`.

    All P workers read version 0, one worker reads each later version, and the P - 1 gradients in
    flight at the end are never applied. So an asynchronous run without lost gradients applies
    `sum(batch_sizes[:updates])` samples, less `batch_sizes[v] - batch_sizes[0]` for each gradient
    in flight, read at version v. For an increasing schedule the difference is about P - 1 times
    (last size - first size): in the example above, 4 workers apply about 1514 of 1600 samples. In
    synchronous mode, each update uses P batches.

    Parameters
    ----------
    config
        The other settings.
    batch_sizes
        Integers, shape (updates,). A gradient on a snapshot of version v uses `batch_sizes[v]`
        samples, and is applied `staleness` updates later. The last value applies to all later
        versions.

    Raises
    ------
    InputError
        The sequence is empty, or an entry is not a positive whole number.
    """
    config, sizes = as_config(config), np.asarray(batch_sizes)
    if sizes.ndim != 1 or not len(sizes) or not np.issubdtype(sizes.dtype, np.integer):
        raise InputError(
            f"batch_sizes = {sizes.dtype} of shape {sizes.shape}: expected integers, one per update"
        )
    at = np.flatnonzero(np.diff(sizes)) + 1
    data = msgspec.to_builtins(config)
    data["optimizer"] |= {
        "batch_size": int(sizes[0]),
        "batch_schedule": {"at": at.tolist(), "values": sizes[at].tolist()},
    }
    return make_config(data)
