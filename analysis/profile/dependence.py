"""Serial dependence of a staleness series: start-up, autocorrelation, blocks, effective size.

Neighbouring staleness values depend on each other because each snapshot is used exactly once; slow
workers correlate them positively. Standard errors and resampling therefore use blocks of
neighbouring updates that are longer than this dependence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.fft import irfft, next_fast_len, rfft

from asgd.arrays import Array, Integers

START_UP_RULE = (
    "dropped up to the last update computed on version 0 and one mean life of a snapshot more, "
    "then up to the truncation that minimises the standard error of the mean (MSER-5), at most "
    "half of the run; values more than ten interquartile ranges outside the middle half are clipped"
)
_BATCH = 5
_FAR = 10.0  # interquartile ranges
_CELLS = 50_000
_PIECE = 1 << 16  # updates in one Fourier transform
_FEW_LAGS = 4096  # lags tried first; the autocorrelation nearly always dies out before


def without_outliers(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the series with outliers clipped to the limit of `START_UP_RULE`.

    Otherwise one gradient of a worker that slept would dominate means, start-up and
    autocorrelation.
    """
    if not len(values):
        return values
    low, high = np.quantile(values, (0.25, 0.75))
    far = _FAR * max(high - low, 1.0)
    clipped: npt.NDArray[Any] = np.clip(values, int(low - far), int(high + far))
    return clipped


def start_up(staleness: Integers, update: Integers | None = None) -> int:
    """Return the length of the start-up, see `START_UP_RULE`.

    At first every worker holds version 0, so update k has staleness k, and right after the last of
    these reads all snapshots are young. This part of the rule applies only if the series can begin
    at update 0 (staleness <= k). It does not wait for a worker that delivers its first gradient
    long after the others have delivered many.

    Parameters
    ----------
    staleness
        In order of update, shape (m,).
    update
        Numbers of the updates, ascending, shape (m,), if they are not 0, 1, ...
    """
    update = np.arange(len(staleness)) if update is None else update
    usual = without_outliers(staleness)
    half = len(staleness) // 2
    first = 0
    if len(staleness) and np.all(update >= staleness):
        of_version_0 = np.flatnonzero((update == staleness) & (usual == staleness))
        last = int(of_version_0[-1]) if of_version_0.size else 0
        life = 1.0 + float(np.mean(usual[min(last, half) :]))
        first = min(last + 1 + int(np.ceil(life)), half)
    return min(first + mser(usual[first:]), half)


def mser(values: Integers | Array) -> int:
    """Return the MSER-5 truncation, at most half of the values (White 1997)."""
    batches = len(values) // _BATCH
    if batches < 4:
        return 0
    means = values[: batches * _BATCH].reshape(batches, _BATCH).mean(axis=1)
    means = means - means.mean()
    left = batches - np.arange(batches // 2)
    total = np.cumsum(means[::-1])[::-1][: batches // 2]
    square = np.cumsum(means[::-1] ** 2)[::-1][: batches // 2]
    # rounding errors give a constant series squares of the order of 1e-32
    spread = np.maximum(square - total**2 / left, 0.0).round(12)
    return int(np.argmin(spread / left**2)) * _BATCH


def autocorrelation(values: npt.ArrayLike, max_lag: int) -> Array:
    """Return the autocorrelation at lags 0, ..., max_lag, shape (max_lag + 1,).

    A constant series has autocorrelation 1 at lag 0 and 0 elsewhere.
    """
    series = np.asarray(values, dtype=float)
    centred = series - series.mean()
    covariance = _lagged_products(centred, min(max_lag, len(centred) - 1)) / len(centred)
    if covariance[0] <= 1e-12:
        return np.eye(1, max_lag + 1).ravel()
    return np.asarray(covariance / covariance[0], dtype=float)


def _lagged_products(x: Array, max_lag: int) -> Array:
    """Return sum_i x_i x_(i + lag) for each lag, by Fourier transforms of pieces."""
    piece = max(max_lag, _PIECE)
    size = next_fast_len(piece + max_lag, real=True)
    spectrum = np.zeros(size // 2 + 1, dtype=complex)
    for first in range(0, len(x), piece):
        ahead = rfft(x[first : first + piece + max_lag], size)
        here = rfft(x[first : first + piece], size)
        spectrum += ahead * here.conj()
    return np.asarray(irfft(spectrum, size)[: max_lag + 1])


def block_length(values: npt.NDArray[Any]) -> int:
    """Return a block length for the moving-block bootstrap.

    It is the largest of m^(1/3); four times the lag after which the autocorrelations of the series
    and of its squares stay inside a noise band (Politis and White 2004); and twice the mean number
    of updates a snapshot lives. It is at most a twentieth of the series, which may be too short:
    see `lost_variance`. Outliers are clipped, see `without_outliers`.
    """
    m = len(values)
    if m < 40:
        return 1
    values = without_outliers(values)
    longest = max(m // 20, 1)
    band = 2.0 * np.sqrt(np.log10(m) / m)
    calm = max(5, int(np.sqrt(np.log10(m))))
    centred = values - np.mean(values)
    last = 0
    for series in (centred, centred**2):
        for lags in sorted({min(longest, _FEW_LAGS), longest}):
            inside = np.abs(autocorrelation(series, lags + calm)[1:]) < band
            runs = np.convolve(inside, np.ones(calm), "valid") >= calm
            if runs.any():
                break
        last = max(last, int(np.argmax(runs)) if runs.any() else longest)
    wanted = max(m ** (1.0 / 3.0), 4.0 * last, 2.0 * (1.0 + float(np.mean(values))))
    return int(min(np.ceil(wanted), longest))


def start_up_of_steps(staleness: Integers, step: Integers) -> int:
    """Return the number of rows in the start-up, whole steps, if steps have several rows.

    Parameters
    ----------
    staleness, step
        Of each row, shape (m,); the steps do not decrease.
    """
    if not len(step):
        return 0
    number = np.unique(step)
    first = start_up(np.rint(step_means(staleness, step)).astype(np.int64), number)
    return int(np.searchsorted(step, number[first]))


def step_means(values: npt.NDArray[Any], step: Integers) -> Array:
    """Return the mean of the values of each step, shape (steps,).

    Parameters
    ----------
    values
        In order of step, shape (m,).
    step
        Number of the step of each value, shape (m,); does not decrease.
    """
    starts = np.append(0, np.flatnonzero(np.diff(step)) + 1)
    sizes = np.diff(starts, append=len(step))
    return np.asarray(np.add.reduceat(values.astype(float), starts) / sizes)


def block_of_steps(values: Integers, means: Array) -> int:
    """Return the length of blocks, in values, for steps that many values share.

    The values of a step are one cluster, so the block length comes from the means of the steps. The
    block has one step more than `block_length` of these, because blocks cut a step at their ends.
    """
    each = len(values) / len(means)
    return int(min(np.ceil((block_length(means) + 1) * each), max(len(values) // 4, 1)))


def long_run_covariance(values: npt.ArrayLike, block: int) -> Array:
    """Return lim m Cov(mean of the values), shape (q, q), from overlapping block means.

    It is nan for a single value.

    Parameters
    ----------
    values
        Shape (m, q), in order of update.
    block
        Length of the blocks.
    """
    x = np.asarray(values, dtype=float)
    x = x - x.mean(axis=0)
    m, q = x.shape
    if m < 2:
        return np.full((q, q), np.nan)
    block = max(1, min(block, m - 1))
    sums = np.cumsum(np.vstack([np.zeros((1, x.shape[1])), x]), axis=0)
    blocks = (sums[block:] - sums[:-block]) / np.sqrt(block)
    # corrects for the estimated mean; unbiased for independent values
    return np.asarray(blocks.T @ blocks / len(blocks) / (1.0 - block / m))


def standard_error(values: npt.ArrayLike, block: int) -> float:
    """Return the standard error of the mean of dependent values, shape (m,)."""
    series = np.asarray(values, dtype=float)
    if len(series) < 2:
        return float("nan")
    return float(np.sqrt(long_run_covariance(series[:, None], block)[0, 0] / len(series)))


def lost_variance(values: npt.NDArray[Any], block: int) -> float:
    """Return the factor by which short blocks underestimate the variance of the mean, >= 1.

    Blocks shorter than the dependence underestimate the variance. Filtering by the first
    autocorrelation shortens the dependence (prewhitening, Andrews and Monahan 1992).
    """
    series = without_outliers(values).astype(float)
    rho = float(np.clip(autocorrelation(series, 1)[-1], 0.0, 0.97)) if len(series) > 2 else 0.0
    blocks = float(long_run_covariance(series[:, None], block)[0, 0])
    if not rho or not blocks:
        return 1.0
    filtered = series[1:] - rho * series[:-1]
    whole = float(long_run_covariance(filtered[:, None], block)[0, 0]) / (1.0 - rho) ** 2
    return max(whole / blocks, 1.0)


def effective_size(values: npt.ArrayLike, block: int) -> float:
    """Return the number of independent values whose mean has the same standard error.

    It exceeds the number of values if neighbours are negatively correlated, as on a real server,
    where the number of workers fixes the mean staleness. For a constant series it is their number.
    """
    series = np.asarray(values, dtype=float)
    variance = float(np.var(series))
    error = standard_error(series, block)
    return variance / error**2 if variance > 0.0 and error > 0.0 else float(len(series))


def cell_size(m: int, block: int) -> int:
    """Return the number of neighbouring updates that block resampling treats as one.

    It is 1 up to 100 000 updates. Beyond, blocks start only at multiples of the cell, at least
    four times per block length.
    """
    return max(1, min(m // _CELLS, block // 4))


def block_resamples(
    m: int, block: int, resamples: int, rng: np.random.Generator
) -> Iterator[Integers]:
    """Yield index arrays of shape (m,) of random blocks of the series, closed to a circle."""
    offsets = np.arange(block)
    for _ in range(resamples):
        starts = rng.integers(0, m, -(-m // block))
        yield ((starts[:, None] + offsets) % m).ravel()[:m]
