"""A staleness series known by the counts of its spans only, see `asgd.rundir.counts`.

The point estimates of laws are those from rows, because they need the histogram alone. The order of
the updates in a span is unknown. So intervals and tests resample whole spans, and the start-up ends
with one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import csr_array

from analysis.profile import dependence, diagnostics, goodness
from analysis.profile.cells import INTERVAL_RESAMPLES, Cells
from analysis.profile.estimators import Counts
from asgd.arrays import Array, Integers
from asgd.staleness.geometric import Geometric
from asgd.staleness.law import StalenessLaw
from asgd.streams import stream


@dataclass(frozen=True)
class CountedSample:
    """A stationary series and the settings of its resampling.

    Attributes
    ----------
    cell
        Number 0, 1, ... of the span of each row of counts, shape (r,).
    workers
        Worker 0, 1, ... of each row.
    staleness
        Staleness of each row.
    updates
        How many updates each row counts.
    cells
        Number of complete spans; the last updates may be in one more, which is not resampled.
    span
        Updates in a span, without those that are left out.
    seed
        Seed of every resampling.
    """

    cell: Integers
    workers: Integers
    staleness: Integers
    updates: Integers
    cells: int
    span: float
    seed: int

    step: ClassVar[None] = None
    steps: ClassVar[None] = None
    start_up_rule: ClassVar[str] = (
        "dropped are whole spans of updates: those with an update computed on version 0, then up "
        "to the truncation that minimises the standard error of their mean (MSER-5), at most half "
        "of the run"
    )

    @cached_property
    def size(self) -> int:
        """Number of updates."""
        return int(self.updates.sum())

    @cached_property
    def counts(self) -> Counts:
        """The histogram, as of all rows."""
        values, row = np.unique(self.staleness, return_inverse=True)
        return Counts(
            values,
            np.bincount(row, self.updates).astype(float),
            np.bincount(self.workers, self.updates).astype(float),
            np.bincount(self.workers, self.updates * self.staleness).astype(float),
        )

    @cached_property
    def block(self) -> int:
        """Length of the blocks in updates: whole spans."""
        return round(self._block * self.span)

    @property
    def blocks(self) -> float:
        """Number of disjoint blocks."""
        return self.cells / self._block

    @cached_property
    def _block(self) -> int:
        """Length of the blocks in spans."""
        means = self._means
        # Centred, because block_length takes values for lives in units of their own number.
        wanted = dependence.block_length(means - means.mean())
        life = 2.0 * (1.0 + self.counts.mean) / self.span
        return int(min(max(wanted, np.ceil(life)), max(self.cells // 4, 1)))

    @cached_property
    def _means(self) -> Array:
        """Mean staleness of each complete span, shape (cells,)."""
        return self._averages(self.counts.staleness.astype(float))

    def _averages(self, values: Array) -> Array:
        """Return the mean over each complete span of a function, given for each staleness."""
        return np.asarray(self._whole.updates.T @ values) / self._each

    @cached_property
    def _each(self) -> Array:
        """Number of updates in each complete span."""
        return np.asarray(self._whole.updates.sum(axis=0), dtype=float).ravel()

    @cached_property
    def _whole(self) -> Cells:
        inside = self.cell < self.cells
        return self._cells(*(column[inside] for column in self._columns))

    @property
    def _columns(self) -> tuple[Integers, ...]:
        return self.cell, self.workers, self.staleness, self.updates

    def _cells(
        self, cell: Integers, workers: Integers, staleness: Integers, updates: Integers
    ) -> Cells:
        """Return the cells of counts, one for each complete span."""
        values = np.unique(np.concatenate([staleness, self.counts.staleness]))
        row, number = np.searchsorted(values, staleness), int(self.workers.max()) + 1

        def table(rows: Integers, length: int, weights: Integers) -> csr_array:
            return csr_array((weights.astype(float), (rows, cell)), shape=(length, self.cells))

        return Cells(
            values,
            table(row, len(values), updates),
            table(workers, number, updates),
            table(workers, number, updates * staleness),
            1,
        )

    @cached_property
    def resampled(self) -> list[Counts]:
        """Histograms of moving-block resamples of the complete spans."""
        rng = stream(self.seed, "staleness intervals")
        return list(replace(self._whole, block=self._block).resamples(INTERVAL_RESAMPLES, rng))

    @cached_property
    def lost_variance(self) -> float:
        """Factor by which short blocks underestimate the variance of the mean, at least 1."""
        return dependence.lost_variance(self._means, self._block)

    @cached_property
    def effective_size(self) -> float:
        """Number of independent updates that would determine the mean equally well."""
        error = dependence.standard_error(self._means, self._block)
        return self.counts.var / error**2 if self.counts.var > 0.0 and error > 0.0 else self.size

    def autocorrelation(self, max_lag: int) -> Array:
        """Return nan at lags 1, ..., max_lag: the order of the updates is unknown."""
        return np.where(np.arange(max_lag + 1) == 0, 1.0, np.nan)

    def _error(self, values: Array) -> float:
        return dependence.standard_error(self._averages(values), self._block)

    def shape(self, workers: float | None) -> diagnostics.Shape:
        """See `diagnostics.shape`."""
        updates, size = self.counts.updates, self.size
        values = self.counts.staleness.astype(float)
        return diagnostics.shape_of(
            values, lambda of_each: float(of_each @ updates) / size, self._error, workers
        )

    def conservation(self, workers: float) -> diagnostics.Conservation:
        """See `diagnostics.conservation`."""
        error, largest = self._error(self.counts.staleness.astype(float)), self.counts.staleness[-1]
        mean = self.counts.mean
        return diagnostics.conservation_of(mean, error, workers, int(largest), self.size)

    def per_worker(self, names: npt.NDArray[Any]) -> pd.DataFrame:
        """See `diagnostics.per_worker`."""
        rows = []
        for worker, name in enumerate(names):
            own = self.workers == worker
            staleness, updates = self.staleness[own], self.updates[own]
            mean = float(np.average(staleness, weights=updates))
            rows.append(
                {
                    "worker": name,
                    "updates": int(updates.sum()),
                    "share": float(updates.sum()) / self.size,
                    "mean": mean,
                    "variance": float(np.average((staleness - mean) ** 2, weights=updates)),
                    "zeros": float(updates[staleness == 0].sum() / updates.sum()),
                    "mu": mean / (1.0 + mean),
                }
            )
        return pd.DataFrame(rows)

    def drift(self, start_up: int) -> diagnostics.Drift:
        """See `diagnostics.drift`; its tenths are whole spans."""
        zeros, squares = (
            self._averages((self.counts.staleness == 0).astype(float)),
            self._averages(self.counts.staleness.astype(float) ** 2),
        )
        parts = [part for part in np.array_split(np.arange(self.cells), 10) if len(part)]
        means = [float(self._means[part].mean()) for part in parts]
        table = pd.DataFrame(
            {
                "first_update": [start_up + round(part[0] * self.span) for part in parts],
                "mean": means,
                "variance": [
                    float(squares[part].mean()) - mean**2
                    for part, mean in zip(parts, means, strict=True)
                ],
                "zeros": [float(zeros[part].mean()) for part in parts],
            }
        )
        rng = stream(self.seed, "staleness drift")
        cells = replace(self._whole, block=self._block)
        return diagnostics.Drift(table, *diagnostics.drift_of_cells(cells, rng))

    def chi_square(self, law: Geometric) -> goodness.ChiSquare:
        """See `goodness.chi_square`."""
        whole = self._whole

        def seen(edges: Array) -> Array:
            member = np.searchsorted(edges, whole.staleness, "right") - 1
            rows = (np.ones(len(member)), (member, np.arange(len(member))))
            pooled = csr_array(rows, shape=(len(edges), len(member))) @ whole.updates
            return np.asarray(pooled.toarray().T)

        totals = self._means * self._each
        return goodness.chi_square_of_cells(self.counts, seen, totals, law, self.span, self._block)

    def with_law(self, law: StalenessLaw, rng: np.random.Generator) -> Cells:
        """Return the cells of a series with this law and the serial dependence of this one.

        As `goodness.with_law`, with ranks: of the updates with one staleness, as many get each
        value of the law as there are of its quantiles at their ranks, wherever they are.
        """
        inside = self.cell < self.cells
        cell, workers, staleness, updates = (column[inside] for column in self._columns)
        size = int(updates.sum())
        highest = int(law.ppf((size - 0.5) / size))
        below = np.floor(size * law.cdf(np.arange(highest + 1)) + 0.5).astype(np.int64)
        below[-1] = size  # updates with a value of the law of at most 0, 1, ..., highest
        order, moved, rank = np.argsort(staleness, kind="stable"), [], 0
        ends = np.flatnonzero(np.diff(staleness[order], append=-1)) + 1
        for rows in np.split(order, ends[:-1]):
            left, following = updates[rows].copy(), rank + int(updates[rows].sum())
            first = int(np.searchsorted(below, rank, "right"))
            last = int(np.searchsorted(below, following, "left"))
            for value in range(first, last + 1):
                part = min(int(below[value]), following) - rank
                rank += part
                taken = rng.multivariate_hypergeometric(left, part, method="marginals")
                left -= taken
                some = taken > 0
                of_value = np.full(int(some.sum()), value)
                moved.append((cell[rows][some], workers[rows][some], of_value, taken[some]))
        joined = (np.concatenate(column) for column in zip(*moved, strict=True))
        return replace(self._cells(*joined), block=self._block)
