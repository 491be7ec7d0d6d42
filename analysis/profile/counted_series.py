"""Prepares the counts of a run for a fit: leaves out stragglers and the start-up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.profile.counted import CountedSample
from analysis.profile.dependence import mser
from analysis.profile.series import DESCRIBED, Nouns, whole_number
from analysis.profile.stragglers import stragglers_among
from asgd.arrays import Array, Integers
from asgd.errors import InputError
from asgd.rundir.events import team_changes
from asgd.rundir.outline import Tally
from asgd.rundir.reader import Run

_FAR = 10.0  # interquartile ranges, as in `dependence.without_outliers`


@dataclass(frozen=True, kw_only=True)
class CountedSeries:
    """The input of a fit to counts.

    Attributes
    ----------
    sample
        The counts without stragglers and start-up.
    names
        Of workers 0, 1, ... of the sample.
    team, start_up, left_out, nouns
        As of `Series`.
    """

    sample: CountedSample
    names: npt.NDArray[Any]
    team: float | None
    start_up: int
    left_out: Mapping[Any, int]
    nouns: Nouns

    @classmethod
    def of_run(cls, run: Run) -> CountedSeries:
        """Take the updates of a run, or the gradients if an update is the mean of several.

        Raises
        ------
        InputError
            The run recorded no update.
        """
        counts, nouns = run.staleness_counts, Nouns.of_run(run)
        if not counts.updates:
            raise InputError(f"{run.path}: recorded no update to fit")
        number, columns = "updates", counts.columns
        if run.config.cluster.gradients_per_update is not None and columns["members"].any():
            number, nouns = "members", replace(nouns, rows="gradients", use=DESCRIBED)
        starts, sizes = team_changes(run.events, run.config.cluster.workers)
        left_out: dict[Any, int] = {}
        if number == "updates" and sizes.min() == sizes.max():
            left_out = stragglers_among(Tally.of_counts(counts).by_worker, int(sizes[0]))
        kept = (columns[number] > 0) & ~np.isin(columns["worker"], list(left_out))
        cell = columns["update"][kept] // counts.span
        staleness, updates = columns["staleness"][kept], columns[number][kept]
        cells = counts.updates // counts.span  # complete ones
        first = _start_up(cell, staleness, updates, cells, counts.span)
        late = cell >= first
        names, workers = np.unique(columns["worker"][kept][late], return_inverse=True)
        complete = updates[late & (cell < cells)]
        sample = CountedSample(
            cell=cell[late] - first,
            workers=workers,
            staleness=staleness[late],
            updates=updates[late],
            cells=cells - first,
            span=float(complete.sum()) / max(cells - first, 1),
            seed=run.config.run.seed,
        )
        plain = number == "updates" and not run.has_discarded
        size = _mean_size(starts, sizes - len(left_out), first * counts.span, counts.updates)
        return cls(
            sample=sample,
            names=names,
            team=whole_number(size) if plain else None,
            start_up=int(updates[~late].sum()),
            left_out=left_out,
            nouns=nouns,
        )


def _start_up(cell: Integers, staleness: Integers, updates: Integers, cells: int, span: int) -> int:
    """Return the number of spans in the start-up, see `CountedSample.start_up_rule`."""
    half = cells // 2
    order = np.argsort(staleness, kind="stable")
    below = np.cumsum(updates[order]) / updates.sum()
    low, high = (float(staleness[order][np.searchsorted(below, q)]) for q in (0.25, 0.75))
    usual = staleness <= high + _FAR * max(high - low, 1.0)
    of_version_0 = cell[usual & (staleness >= cell * span)]
    first = min(int(of_version_0.max(initial=-1)) + 1, half)
    complete = cell < cells
    means = _sums(cell, staleness * updates, complete, cells)
    means /= np.maximum(_sums(cell, updates, complete, cells), 1.0)
    return min(first + mser(means[first:]), half)


def _sums(cell: Integers, values: Integers, chosen: npt.NDArray[np.bool_], cells: int) -> Array:
    found: Array = np.bincount(cell[chosen], values[chosen], minlength=cells).astype(float)
    return found


def _mean_size(starts: Integers, sizes: Integers, first: int, updates: int) -> float:
    """Return the mean number of workers from update `first` on."""
    at = np.clip(np.append(starts, updates), first, updates)
    return float(np.average(sizes, weights=np.diff(at)))
