"""Diagnostics of a staleness series beside its law: shape, conservation, workers, drift.

The number of workers fixes the mean for any compute times, so a geometric law fitted by its mean
always has mu near 1 - 1/P. Only the shape can contradict it: the share of zeros, the variance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.profile.cells import Cells
from analysis.profile.dependence import block_resamples, standard_error
from asgd.arrays import Array, Integers


@dataclass(frozen=True)
class Shape:
    """Share of zeros and variance, measured and of the geometric law.

    Attributes
    ----------
    zeros, zeros_error, zeros_geometric
        Measured share of staleness 0, its standard error, and 1/P (1 - mu if P is unknown).
    variance, variance_geometric
        Measured, and of the geometric law with the same mean m, m (1 + m).
    variance_ratio, variance_ratio_error
        Measured over geometric, and its standard error.
    """

    zeros: float
    zeros_error: float
    zeros_geometric: float
    variance: float
    variance_geometric: float
    variance_ratio: float
    variance_ratio_error: float


@dataclass(frozen=True)
class Conservation:
    """Mean staleness compared with workers - 1, its value if every snapshot is used once.

    Attributes
    ----------
    mean, standard_error
        Measured.
    expected
        Workers - 1.
    slack
        Largest effect on the mean of the snapshots in flight at both ends.
    holds
        Whether mean and expected differ by at most three standard errors, or the slack.
    """

    mean: float
    standard_error: float
    expected: float
    slack: float
    holds: bool


@dataclass(frozen=True)
class Drift:
    """Whether the law changed over the run.

    Attributes
    ----------
    parts
        One row per tenth of the run: first_update, mean, variance, zeros.
    distance
        Total variation distance between the laws of the first and the second half.
    pvalue
        Share of block resamples of the whole run whose halves are at least as far apart.
    """

    parts: pd.DataFrame
    distance: float
    pvalue: float


def shape(staleness: Integers, workers: float | None, block: int) -> Shape:
    """Compare the series with the geometric law of the same mean."""
    return shape_of(
        staleness.astype(float),
        lambda values: float(values.mean()),
        lambda values: standard_error(values, block),
        workers,
    )


def shape_of(
    x: Array,
    mean_of: Callable[[Array], float],
    error_of: Callable[[Array], float],
    workers: float | None,
) -> Shape:
    """Return `shape` of a series.

    Parameters
    ----------
    x
        Staleness of each update, or each distinct value.
    mean_of, error_of
        Return the mean over the updates of a function of their staleness, given for each of `x`,
        and its standard error.
    workers
        P, None if it is unknown.
    """
    mean = mean_of(x)
    influence = (x - mean) ** 2
    variance = mean_of(influence)
    geometric = mean * (1.0 + mean)
    ratio, error = 1.0, 0.0
    if geometric > 0.0:
        ratio = variance / geometric
        # delta method for v / (m + m^2)
        influence = (influence - ratio * (1.0 + 2.0 * mean) * (x - mean)) / geometric
        error = error_of(influence)
    zero = (x == 0).astype(float)
    return Shape(
        zeros=mean_of(zero),
        zeros_error=error_of(zero),
        zeros_geometric=1.0 / workers if workers else 1.0 / (1.0 + mean),
        variance=variance,
        variance_geometric=geometric,
        variance_ratio=ratio,
        variance_ratio_error=error,
    )


def conservation(staleness: Integers, workers: float, block: int) -> Conservation:
    """Check mean staleness = workers - 1; `workers` is the mean number if it changed.

    Over m updates the two differ by the change of the summed age of the P snapshots in flight,
    divided by m; each age is at most the largest staleness.
    """
    mean, error = float(np.mean(staleness)), standard_error(staleness, block)
    return conservation_of(mean, error, workers, int(np.max(staleness)), len(staleness))


def conservation_of(
    mean: float, error: float, workers: float, largest: int, updates: int
) -> Conservation:
    """Return `conservation` of a series with this mean, its standard error and its maximum."""
    slack = workers * float(largest) / updates
    off = abs(mean - (workers - 1.0))
    holds = off <= slack or off <= 3.0 * error
    return Conservation(mean, error, workers - 1.0, slack, bool(holds))


def per_worker(staleness: Integers, worker_ids: npt.ArrayLike) -> pd.DataFrame:
    """Return one row per worker: updates, share, mean, variance, zeros, mu.

    For memoryless workers 1 - mu equals the share.
    """
    frame = pd.DataFrame({"worker": np.asarray(worker_ids), "staleness": staleness})
    grouped = frame.groupby("worker")["staleness"]
    table = pd.DataFrame(
        {
            "updates": grouped.size(),
            "share": grouped.size() / len(frame),
            "mean": grouped.mean(),
            "variance": grouped.var(ddof=0),
            "zeros": grouped.agg(lambda values: float((values == 0).mean())),
        }
    )
    table["mu"] = table["mean"] / (1.0 + table["mean"])
    return table.reset_index()


def drift(
    staleness: Integers,
    first_update: int,
    block: int,
    rng: np.random.Generator,
    resamples: int = 199,
) -> Drift:
    """Compare the halves of the series, and tabulate its tenths."""
    starts = np.linspace(0, len(staleness), 11).astype(np.int64)[:-1]
    parts = [part for part in np.array_split(staleness, 10) if len(part)]
    table = pd.DataFrame(
        {
            "first_update": first_update + starts[: len(parts)],
            "mean": [float(part.mean()) for part in parts],
            "variance": [float(part.var()) for part in parts],
            "zeros": [float((part == 0).mean()) for part in parts],
        }
    )
    return Drift(table, *drift_of_cells(Cells.of(staleness, block), rng, resamples))


def drift_of_cells(
    cells: Cells, rng: np.random.Generator, resamples: int = 199
) -> tuple[float, float]:
    """Return the distance between the halves of a series, and its p-value."""
    observed = _between_halves(cells, np.arange(cells.number))
    resampled = [
        _between_halves(cells, index)
        for index in block_resamples(cells.number, cells.block, resamples, rng)
    ]
    as_far = int(np.sum(np.array(resampled) >= observed - 1e-12))
    return observed, (1.0 + as_far) / (1.0 + resamples)


def _between_halves(cells: Cells, index: Integers) -> float:
    half = len(index) // 2
    if half == 0:
        return 0.0
    first, second = (cells.frequencies(part) for part in (index[:half], index[half:]))
    return 0.5 * float(np.abs(first - second).sum())
