"""Cuts a staleness series into cells of neighbouring updates and keeps their histograms.

A block resample is then a weighted sum of histograms; a bootstrap of five million updates need not
count each update 400 times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from analysis.profile.dependence import block_resamples, cell_size
from analysis.profile.estimators import Counts
from asgd.arrays import Array, Integers

INTERVAL_RESAMPLES = 399  # for the intervals of a law's parameters
_AT_ONCE = 16  # resamples for each pass over the sparse table


@dataclass(frozen=True)
class Cells:
    """Histograms of the cells.

    Attributes
    ----------
    staleness
        The distinct values, ascending, shape (l,).
    updates
        Count of each value in each cell, shape (l, cells), sparse.
    worker_updates, worker_staleness
        Number of updates and sum of staleness of each worker in each cell, shape (workers, cells),
        sparse; or None.
    block
        Length of a block in cells.
    """

    staleness: Integers
    updates: csr_array
    worker_updates: csr_array | None
    worker_staleness: csr_array | None
    block: int

    @classmethod
    def of(cls, staleness: Integers, block: int, workers: Integers | None = None) -> Cells:
        """Cut a series; an incomplete cell at its end is dropped.

        Parameters
        ----------
        staleness
            In order of update, shape (m,).
        block
            Length of the blocks, in updates.
        workers
            Number 0, 1, ... of the worker of each update, shape (m,), or None.
        """
        size = cell_size(len(staleness), block)
        cells = len(staleness) // size
        column = np.repeat(np.arange(cells, dtype=np.int32), size)
        values, row = _numbered(staleness[: len(column)])

        def table(rows: Integers, number: int, weights: npt.NDArray[np.float32]) -> csr_array:
            return csr_array((weights, (rows.astype(np.int32), column)), shape=(number, cells))

        ones = np.ones(len(column), dtype=np.float32)
        updates, length = table(row, len(values), ones), -(-block // size)
        if workers is None:
            return cls(values, updates, None, None, length)
        number, workers = int(workers.max()) + 1, workers[: len(column)]
        total = staleness[: len(column)].astype(np.float32)
        return cls(
            values, updates, table(workers, number, ones), table(workers, number, total), length
        )

    @property
    def number(self) -> int:
        """Number of cells."""
        return int(self.updates.shape[1])

    def resamples(self, number: int, rng: np.random.Generator) -> Iterator[Counts]:
        """Yield the histograms of `number` moving-block resamples."""
        drawn = block_resamples(self.number, self.block, number, rng)
        while some := list(islice(drawn, _AT_ONCE)):
            yield from self._chosen(np.stack([self._weights(index) for index in some], axis=1))

    def chosen(self, index: Integers) -> Counts:
        """Return the summed histogram of these cells; repeated cells count repeatedly."""
        return next(self._chosen(self._weights(index)[:, None]))

    def _chosen(self, weights: Array) -> Iterator[Counts]:
        """Yield the histogram of each column of weights, shape (cells, n)."""
        by_worker = (self.worker_updates, self.worker_staleness)
        columns = [(self.updates @ weights).T]
        columns += [(table @ weights).T for table in by_worker if table is not None]
        for updates, *of_workers in zip(*columns, strict=True):
            seen = updates > 0
            yield Counts(self.staleness[seen], updates[seen], *of_workers)

    def frequencies(self, index: Integers) -> Array:
        """Return the share of each value in these cells, shape (l,)."""
        updates = self.updates @ self._weights(index)
        return np.asarray(updates / updates.sum())

    def _weights(self, index: Integers) -> Array:
        return np.bincount(index, minlength=self.number).astype(float)


def _numbered(values: Integers) -> tuple[Integers, Integers]:
    """Return the distinct values and the index of each value; millions of small ones unsorted."""
    if not len(values) or values.min() < 0 or values.max() > len(values):
        return np.unique(values, return_inverse=True)
    seen = np.bincount(values) > 0
    return np.flatnonzero(seen), (np.cumsum(seen) - 1)[values]
