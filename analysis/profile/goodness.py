"""Distances between law and data, and goodness-of-fit tests that allow for serial dependence.

Textbook tests assume independent values. Here the chi-square test takes the variance of the bin
frequencies from the series itself (Rao and Scott 1984, with Satterthwaite's degrees of freedom),
and the parametric bootstrap gives its samples the serial dependence of the measured series.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import chi2

from analysis.profile.cells import Cells
from analysis.profile.dependence import cell_size, long_run_covariance
from analysis.profile.estimators import ESTIMATORS, Counts
from asgd.arrays import Array, Integers
from asgd.errors import InputError
from asgd.staleness.geometric import Geometric
from asgd.staleness.law import StalenessLaw

Statistic = Literal["tv", "ks", "cvm"]

_BINS = 20
_SMALLEST_EXPECTED = 5.0


@dataclass(frozen=True)
class ChiSquare:
    """Chi-square test of the geometric law.

    Attributes
    ----------
    statistic
        Pearson's sum of (observed - expected)^2 / expected over the bins.
    pvalue
        Probability of a larger statistic under the geometric law with this serial dependence.
    degrees_of_freedom, design_effect
        The statistic over `design_effect` is compared with the chi-square law of
        `degrees_of_freedom`. Independent values have design effect 1 and bins - 2 degrees.
    bins
        Number of pooled bins.
    """

    statistic: float
    pvalue: float
    degrees_of_freedom: float
    design_effect: float
    bins: int


@dataclass(frozen=True)
class GoodnessOfFit:
    """Parametric-bootstrap test of a fitted law.

    Attributes
    ----------
    statistic
        Distance between the law and the measured frequencies.
    pvalue
        Share of bootstrap samples, including the measured one, at least as far from their refit.
    null
        The distances of the bootstrap samples, shape (resamples,): the null distribution.
    """

    statistic: float
    pvalue: float
    null: Array


def total_variation(law: StalenessLaw, counts: Counts) -> float:
    """Return half the sum of |frequency - pmf| over all staleness values, in [0, 1]."""
    p, frequencies = law.pmf(counts.staleness), counts.updates / counts.size
    unseen = max(1.0 - float(p.sum()), 0.0)
    return 0.5 * (float(np.abs(frequencies - p).sum()) + unseen)


def _largest_cdf_gap(law: StalenessLaw, counts: Counts) -> float:
    # the supremum is reached at a measured value or just before one
    at, before = (law.cdf(counts.staleness - step) for step in (0, 1))
    reached = np.cumsum(counts.updates) / counts.size
    short = np.append(0.0, reached[:-1])
    return float(max(np.abs(reached - at).max(), np.abs(before - short).max()))


def _cramer_von_mises(law: StalenessLaw, counts: Counts) -> float:
    reached = np.cumsum(counts.updates) / counts.size
    return float((reached - law.cdf(counts.staleness)) ** 2 @ counts.updates) / counts.size


DISTANCES: dict[str, Callable[[StalenessLaw, Counts], float]] = {
    "tv": total_variation,
    "ks": _largest_cdf_gap,
    "cvm": _cramer_von_mises,
}


def chi_square(staleness: Integers, law: Geometric, block: int) -> ChiSquare:
    """Test the maximum-likelihood geometric law of a stationary series.

    Bins are single staleness values or ranges, about equally likely, with at least five expected
    values each. The covariance of their frequencies comes from blocks of the series, less the part
    that the fit of mu explains.

    Parameters
    ----------
    staleness
        In order of update, shape (m,).
    law
        The geometric law fitted to it.
    block
        Length of a block, longer than the serial dependence.
    """
    size = cell_size(len(staleness), block)
    cells = len(staleness) // size
    column = np.repeat(np.arange(cells), size)

    def seen(edges: Array) -> Integers:
        member = np.searchsorted(edges, staleness[: len(column)], "right") - 1
        bins = len(edges)
        return np.bincount(column * bins + member, minlength=cells * bins).reshape(cells, bins)

    totals = staleness[: len(column)].reshape(cells, size).sum(axis=1)
    return chi_square_of_cells(Counts.of(staleness), seen, totals, law, size, -(-block // size))


def chi_square_of_cells(
    counts: Counts,
    seen: Callable[[Array], Array | Integers],
    totals: Array | Integers,
    law: Geometric,
    size: float,
    block: int,
) -> ChiSquare:
    """Return `chi_square` of a series that is known by its cells.

    Parameters
    ----------
    counts
        The histogram.
    seen
        Returns for bins, given the first staleness of each, shape (bins,), the number of updates in
        each cell and bin, shape (cells, bins).
    totals
        Sum of staleness in each cell, shape (cells,).
    law
        The geometric law fitted to it.
    size
        Updates in a cell, on average.
    block
        Length of a block in cells.
    """
    edges = _bin_edges(law, counts.size)
    tail = np.append(law.tail(edges), 0.0)
    p = tail[:-1] - tail[1:]
    bins = len(p)
    if bins < 2:
        fits = bool(np.all(counts.staleness == 0)) == (law.mu == 0.0)
        return ChiSquare(0.0, 1.0 if fits else 0.0, 0.0, 1.0, bins)
    member = np.searchsorted(edges, counts.staleness, "right") - 1
    shares = np.bincount(member, counts.updates, minlength=bins) / counts.size
    statistic = float(counts.size * np.sum((shares - p) ** 2 / p))
    slope = np.append(edges * law.mu ** np.maximum(edges - 1.0, 0.0), 0.0)
    updates = seen(edges)
    each = updates.sum(axis=1)  # `size`, or nearly so
    influence = (1.0 - law.mu) ** 2 * (totals - each * law.mean())
    residual = updates - each[:, None] * p
    residual -= influence[:, None] * (slope[:-1] - slope[1:])
    covariance = long_run_covariance(residual / np.sqrt(p), block) / size
    trace, square = float(np.trace(covariance)), float(np.sum(covariance**2))
    if trace < 1e-9:
        return ChiSquare(statistic, 0.0 if statistic > 1e-9 else 1.0, bins - 2.0, 0.0, bins)
    effect, freedom = square / trace, trace**2 / square
    return ChiSquare(statistic, float(chi2.sf(statistic / effect, freedom)), freedom, effect, bins)


def _bin_edges(law: Geometric, m: int) -> Array:
    """Return the first staleness of each bin."""
    least = max(_SMALLEST_EXPECTED / m, 1.0 / _BINS)
    edges = [0]
    while (left := float(law.tail(edges[-1]))) >= 2.0 * least and law.mu > 0.0:
        # the smallest l such that the bin edges[-1]..l-1 holds at least `least`
        width = np.ceil(np.log1p(-least / left) / np.log(law.mu) - 1e-12)
        following = edges[-1] + max(int(width), 1)
        if law.tail(following) < least:
            break
        edges.append(following)
    return np.array(edges, dtype=float)


def parametric_bootstrap(
    law: StalenessLaw,
    measured: Counts,
    cells: Cells,
    *,
    statistic: Statistic = "tv",
    resamples: int = 199,
    rng: np.random.Generator,
) -> GoodnessOfFit:
    """Test a fitted law of any kind; every bootstrap sample is refitted.

    The bootstrap samples follow the law and keep the serial dependence: they are drawn in blocks
    from a series with this law and the ranks of the measured one.

    Parameters
    ----------
    law
        The fitted law.
    measured
        The histogram of the fitted series.
    cells
        The cells of the series with this law; see `with_law`.
    """
    if statistic not in DISTANCES:
        raise InputError(f"statistic = {statistic!r}: expected one of {', '.join(DISTANCES)}")
    distance, estimate = DISTANCES[statistic], ESTIMATORS[law.name]
    observed = distance(law, measured)
    null = np.zeros(resamples)
    for i, counts in enumerate(cells.resamples(resamples, rng)):
        with suppress(InputError):  # the law cannot be fitted to this resample
            null[i] = distance(estimate(counts, law), counts)
    # both sides of an exact fit have distances of the order of rounding errors
    as_far = int(np.sum(null >= observed - 1e-9))
    return GoodnessOfFit(observed, (1.0 + as_far) / (1.0 + resamples), null)


def with_law(law: StalenessLaw, staleness: Integers, rng: np.random.Generator) -> Integers:
    """Return a series with this law and with the ranks of `staleness`, ties in random order."""
    m = len(staleness)
    order = np.argsort(staleness + rng.random(m))
    level = np.empty(m)
    level[order] = (np.arange(m) + 0.5) / m
    return law.ppf(level)
