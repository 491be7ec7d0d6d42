"""Predicted loss curves of quadratics and least squares from exact moments, without sampled noise.

Mean and spread of the loss are exact given the reads and a normal x. The quantiles of its quadratic
form are read off draws of that normal law: a shifted gamma law with the same three cumulants puts
its 5 % end at the 10 % one where curvatures differ much, as in the diabetes data.
"""

from __future__ import annotations

import numpy as np

from analysis.loss_curve import QUANTILE_LEVELS, LossCurve
from analysis.moments import Closure, asgd_moments
from analysis.noise import psd_factor
from analysis.quadratic import LARGEST_DIM, LinearGradients
from analysis.read_moments import (
    LARGEST_STATE,
    PointMoments,
    Reads,
    independent_reads,
    pool_reads,
    read_moments,
    several_reads,
    turn_reads,
)
from analysis.recorded_turns import ResampledTurns
from analysis.setting import Setting
from asgd.errors import InputError
from asgd.problems import LeastSquares, Quadratic
from asgd.problems.base import Array
from asgd.staleness import Geometric
from asgd.streams import stream

# Numbers held for all sequences of reads together: as many sequences as one update has time for.
_STATE = 2**17
_FEWEST, _MOST = 16, 512
# Draws of x behind the quantiles: the 5 % one is then at 5 +- 0.5 %.
_DRAWS = 2048


def has_closed_forms(setting: Setting, name: str) -> bool:
    """Return whether `closed_curve` can compute a model.

    Its gradients are linear, d <= 20, learning rate and batch size do not change, and the
    snapshots of one server fit. Closure "sampling" is closed for the geometric law alone.
    """
    if not setting.steady or not isinstance(setting.problem, Quadratic | LeastSquares):
        return False
    d, slots = setting.problem.dim, setting.workers + 2
    if d > LARGEST_DIM or _FEWEST * (slots * d) ** 2 > LARGEST_STATE:
        return False
    return name != "law_sampling" or isinstance(setting.law, Geometric)


def closed_curve(name: str, setting: Setting, seed: int) -> LossCurve:
    """Return the curve of one model of `analysis.prediction.MODELS`.

    Independent geometric staleness, and the pool of memoryless workers, are solved exactly;
    any other law through the moments given the reads, averaged over a few drawn sequences of
    reads; the replay given the reads of each run.

    Parameters
    ----------
    seed
        Seed of the drawn reads and of the draws behind the quantiles.
    """
    gradients = LinearGradients.of(setting.problem)
    if name == "replay":
        reads = several_reads([tau[: setting.updates] for tau in setting.staleness])
        return _of_moments(gradients, setting, _given(gradients, setting, reads), seed)
    if name in ("sme_sgd", "sme_asgd"):
        mu = setting.mu if name == "sme_asgd" else 0.0
        return _of_moments(gradients, setting, _geometric(gradients, setting, mu, "iid"), seed)
    closure = setting.closure if name == "sme_law" else name.removeprefix("law_")
    if isinstance(setting.law, Geometric):
        mu = 1 - 1 / setting.workers if closure == "pool" else setting.law.mu
        moments = _geometric(gradients, setting, mu, closure)  # type: ignore[arg-type]
        return _of_moments(gradients, setting, moments, seed)
    if closure not in ("pool", "iid"):
        raise InputError(f"closure: {closure!r} of {setting.law}; accepted: pool, iid")
    rng, pool = stream(seed, f"reads/{closure}"), closure == "pool"
    length = setting.workers if pool else setting.law.support_length()
    runs = int(np.clip(_STATE / ((length + 1) * gradients.dim) ** 2, _FEWEST, _MOST))
    if pool and name == "sme_law" and setting.turns is not None:
        reads = turn_reads(ResampledTurns(setting.turns, runs, rng), setting.updates)
    elif pool:
        reads = pool_reads(setting.law, setting.workers, setting.updates, runs, rng)
    else:
        reads = independent_reads(setting.law, setting.updates, runs, rng)
    return _of_moments(gradients, setting, _given(gradients, setting, reads), seed)


def _given(gradients: LinearGradients, setting: Setting, reads: Reads) -> PointMoments:
    return read_moments(
        gradients,
        float(setting.learning_rate),
        reads,
        batch_size=int(setting.batch_size),
        initial=setting.initial,
        record=setting.record,
    )


def _geometric(
    gradients: LinearGradients, setting: Setting, mu: float, closure: Closure
) -> PointMoments:
    with np.errstate(over="ignore", invalid="ignore"):
        moments = asgd_moments(
            setting.problem,
            setting.learning_rate,
            mu,
            setting.updates,
            batch_size=setting.batch_size,
            initial=setting.initial,
            closure=closure,
        )
        _, basis = np.linalg.eigh(gradients.curvature)
        mean = moments.mean[setting.record]
        second = moments.second_moment[setting.record]
        covariance = second - mean[:, :, None] * mean[:, None, :]
    return PointMoments((mean @ basis)[:, None], (basis.T @ covariance @ basis)[:, None])


def _of_moments(
    gradients: LinearGradients, setting: Setting, moments: PointMoments, seed: int
) -> LossCurve:
    """Return the curve of x normal given the reads, all sequences of reads alike."""
    curvature, basis = np.linalg.eigh(gradients.curvature)
    offset, dim = basis.T @ gradients.offset, gradients.dim
    with np.errstate(over="ignore", invalid="ignore"):
        mean, covariance = moments
        slope = mean * curvature - offset
        value = gradients.loss_at_zero + mean**2 @ curvature / 2 - mean @ offset
        flat = slope.reshape(-1, dim), curvature, covariance.reshape(-1, dim, dim)
        first, second, _ = (c.reshape(value.shape) for c in quadratic_cumulants(*flat))
        expected = value + first
        std = np.sqrt(np.maximum(second.mean(axis=1) + expected.var(axis=1), 0.0))
    quantiles = np.full((len(value), len(QUANTILE_LEVELS)), np.nan)
    draws = stream(seed, "quantiles").standard_normal((-(-_DRAWS // value.shape[1]), dim))
    for row in np.flatnonzero(np.isfinite(std)):
        z = draws @ psd_factor(covariance[row]).swapaxes(-1, -2)
        rise = (z @ slope[row][:, :, None])[..., 0] + z**2 @ curvature / 2
        loss = value[row][:, None] + rise
        quantiles[row] = np.quantile(loss, QUANTILE_LEVELS)
    end = basis @ mean[-1].mean(axis=0)
    return LossCurve(setting.record, expected.mean(axis=1), std, quantiles, None, end)


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
