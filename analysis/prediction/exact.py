"""Predicted loss curves from exact moments, for quadratics and least squares.

Mean and spread of the loss are exact given the reads and a normal x. The quantiles of its quadratic
form come from draws of that normal law. A shifted gamma law with the same three cumulants would put
the 5 % quantile at the 10 % one if curvatures differ much, as in the diabetes data.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from analysis.exact.given_reads import PointMoments, Reads, read_moments
from analysis.exact.linear_gradients import LARGEST_DIM, LinearGradients
from analysis.exact.moments import Closure, MomentRecursion
from analysis.models.noise import psd_factor
from analysis.prediction.loss_curve import SCORED_LEVELS, LossCurve
from analysis.prediction.setting import Setting
from asgd.arrays import Array
from asgd.problems.linear import LeastSquares
from asgd.problems.scalar import Quadratic
from asgd.streams import stream

# Numbers in the state of all sequences of reads together; determines the number of sequences.
_STATE = 2**17
_FEWEST, _MOST = 16, 512
# Draws of x for the quantiles: the 5 % quantile is then at 5 +- 0.35 %, or better.
_DRAWS = 4096


def is_linear(setting: Setting) -> bool:
    """Return whether moments close: linear gradients, d <= 20, no schedules, one start."""
    known = isinstance(setting.problem, Quadratic | LeastSquares) and setting.starts == 1
    return setting.steady and known and setting.problem.dim <= LARGEST_DIM


def drawn_sequences(slots: int, dim: int) -> int:
    """Return the number of sequences of reads to draw, each with `slots` snapshots."""
    return int(np.clip(_STATE / ((slots + 1) * dim) ** 2, _FEWEST, _MOST))


def geometric_curve(setting: Setting, mu: float, closure: Closure, seed: int) -> LossCurve:
    """Return the curve of geometric staleness under a closure, from exact moments.

    Parameters
    ----------
    seed
        Seed of the draws for the quantiles.
    """
    gradients = LinearGradients.of(setting.problem)
    return _of_moments(gradients, setting, _geometric(gradients, setting, mu, closure), seed)


def given_reads(setting: Setting, reads: Reads, seed: int, *, drawn: bool = False) -> LossCurve:
    """Return the curve from the moments given the version that every update reads.

    Parameters
    ----------
    reads
        Reads of one or several runs with equal weights.
    seed
        Seed of the draws for the quantiles.
    drawn
        Whether the reads are a sample; their scatter is then an error of the mean.
    """
    gradients = LinearGradients.of(setting.problem)
    moments = read_moments(
        gradients,
        float(setting.learning_rate),
        reads,
        batch_size=int(setting.batch_size),
        initial=setting.initial,
        record=setting.record,
    )
    return _of_moments(gradients, setting, moments, seed, drawn)


def _geometric(
    gradients: LinearGradients, setting: Setting, mu: float, closure: Closure
) -> Iterator[PointMoments]:
    recursion = MomentRecursion(gradients, mu, closure)
    fixed, noise = recursion.transition(float(setting.learning_rate))
    step = fixed + noise / float(setting.batch_size)
    state, wanted = recursion.initial_state(setting.initial), set(setting.record.tolist())
    _, basis = np.linalg.eigh(gradients.curvature)
    for k in range(setting.updates + 1):
        with np.errstate(over="ignore", invalid="ignore"):
            state = step @ state if k > 0 else state
            if k not in wanted:
                continue
            _, mean, _, second, *_ = recursion.split(state)
            covariance = basis.T @ (second - np.outer(mean, mean)) @ basis
        yield PointMoments((mean @ basis)[None], covariance[None])


def _of_moments(
    gradients: LinearGradients,
    setting: Setting,
    moments: Iterator[PointMoments],
    seed: int,
    drawn_reads: bool = False,
) -> LossCurve:
    """Return the curve for x normal given the reads, with equal weights of their sequences."""
    curvature, basis = np.linalg.eigh(gradients.curvature)
    offset, size = basis.T @ gradients.offset, len(setting.record)
    loss_mean, std, mean_error = np.empty(size), np.empty(size), np.zeros(size)
    quantiles = np.full((size, len(SCORED_LEVELS)), np.nan)
    draws = np.empty(0)
    for row, (mean, covariance) in enumerate(moments):
        if row == 0:
            draws = _standard_draws(len(mean), gradients.dim, stream(seed, "quantiles"))
        with np.errstate(over="ignore", invalid="ignore"):
            slope = mean * curvature - offset
            value = gradients.loss_at_zero + mean**2 @ curvature / 2 - mean @ offset
            first, second, _ = quadratic_cumulants(slope, curvature, covariance)
            expected = value + first
            between = expected.var()
            loss_mean[row] = expected.mean()
            std[row] = np.sqrt(np.maximum(second.mean() + between, 0.0))
            if drawn_reads:
                mean_error[row] = np.sqrt(between / (len(mean) - 1))
        if np.isfinite(std[row]):
            z = draws @ psd_factor(covariance).swapaxes(-1, -2)
            rise = (z @ slope[:, :, None])[..., 0] + z**2 @ curvature / 2
            quantiles[row] = np.quantile(value[:, None] + rise, SCORED_LEVELS)
    end = basis @ mean.mean(axis=0)
    return LossCurve(
        update=setting.record,
        mean=loss_mean,
        std=std,
        quantiles=quantiles,
        paths=None,
        end=end,
        mean_error=mean_error,
    )


def _standard_draws(runs: int, dim: int, rng: np.random.Generator) -> Array:
    """Return independent standard normal draws for each run, shape (runs, m, d).

    Each coordinate takes every quantile of the normal law once, in random order, which scatters
    less than independent draws.
    """
    from scipy.special import ndtri

    count = -(-_DRAWS // runs) * runs
    levels = (np.arange(count) + 0.5) / count
    columns = [rng.permutation(ndtri(levels)) for _ in range(dim)]
    return np.stack(columns, axis=-1).reshape(runs, -1, dim)


def quadratic_cumulants(
    slope: Array, curvature: Array, covariance: Array
) -> tuple[Array, Array, Array]:
    """Return the first three cumulants of g . z + sum_i a_i z_i^2 / 2 for z ~ N(0, C).

    Parameters
    ----------
    slope
        g, shape (m, d).
    curvature
        a, shape (d,).
    covariance
        C, shape (m, d, d).

    Returns
    -------
    tuple of Array
        tr(AC)/2, tr((AC)^2)/2 + g.Cg and tr((AC)^3) + 3 g.CACg, shape (m,) each.
    """
    product = curvature[:, None] * covariance
    square = product @ product
    pushed = np.einsum("mij,mj->mi", covariance, slope)
    first = np.einsum("mii->m", product) / 2
    second = np.einsum("mii->m", square) / 2 + np.einsum("mi,mi->m", slope, pushed)
    third = np.einsum("mij,mji->m", square, product) + 3 * pushed**2 @ curvature
    return first, second, third
