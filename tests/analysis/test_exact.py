"""Closed curves, compared with known second moments, simulations and exact distributions."""

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from scipy import stats

from analysis.exact.given_reads import (
    PointMoments,
    Reads,
    independent_reads,
    live_snapshots,
    pool_reads,
    read_moments,
    recorded_reads,
)
from analysis.exact.linear_gradients import LinearGradients
from analysis.models.discrete import asgd_server
from analysis.models.replay import sme_replay
from analysis.models.sme_law import sme_law
from analysis.prediction.exact import quadratic_cumulants
from analysis.prediction.loss_curve import SCORED_LEVELS, LossCurve
from analysis.prediction.model import MODELS
from analysis.prediction.setting import RunSetting
from asgd.errors import InputError
from asgd.problems.linear import diabetes
from asgd.problems.scalar import DoubleWell, Quadratic
from asgd.staleness.counts import Poisson
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric
from tests.support.exact import server_moments

RECORD = np.arange(0, 301, 20)


def setting(**changes) -> RunSetting:
    staleness = np.minimum(np.arange(300), np.random.default_rng(0).integers(0, 7, size=300))
    return replace(
        RunSetting(
            problem=diabetes(),
            learning_rate=0.02,
            batch_size=2,
            initial=np.zeros(10),
            record=RECORD,
            staleness=(staleness,),
            mu=0.75,
            law=Poisson(3.0),
            closure="pool",
            workers=4,
        ),
        **changes,
    )


def stacked(moments: Iterator[PointMoments]) -> PointMoments:
    """Mean (m, runs, d) and covariance (m, runs, d, d)."""
    return PointMoments(*(np.stack(parts) for parts in zip(*moments, strict=True)))


def second_moment(reads: Reads, eta: float, updates: int) -> np.ndarray:
    """E x^2 at every update, shape (updates + 1, runs)."""
    moments = stacked(
        read_moments(
            LinearGradients.of(Quadratic()),
            eta,
            reads,
            batch_size=1,
            initial=np.ones(1),
            record=np.arange(updates + 1),
        )
    )
    return moments.covariance[..., 0, 0] + moments.mean[..., 0] ** 2


def test_memoryless_servers_have_the_second_moment_of_their_own_recursion() -> None:
    workers, eta, updates = 8, 0.1, 64
    reads = pool_reads(Geometric(1 - 1 / workers), workers, 4000, np.random.default_rng(1))
    values = second_moment(reads, eta, updates)
    exact = server_moments(2.0, 4.0, eta, workers, updates)
    standard_error = values[1:].std(axis=1, ddof=1) / np.sqrt(values.shape[1])
    difference = values.mean(axis=1) - exact.mean**2 - exact.variance
    assert np.all(np.abs(difference[1:]) < 4.5 * np.maximum(standard_error, 1e-12))


def test_rounding_does_not_grow_in_long_runs() -> None:
    # Unless it is kept symmetric, the covariance turns indefinite after some 700 updates here.
    problem = diabetes()
    reads = recorded_reads([np.minimum(np.arange(1000), 3)])
    moments = stacked(
        read_moments(
            LinearGradients.of(problem),
            0.1,
            reads,
            batch_size=16,
            initial=np.zeros(problem.dim),
            record=np.arange(100, 1001, 300),
        )
    )
    largest = np.linalg.eigvalsh(moments.covariance[:, 0]).max(axis=1)
    np.testing.assert_allclose(largest[2:], largest[1], rtol=0.1)


def test_independent_lags_have_the_second_moment_of_asgd() -> None:
    from analysis.exact.moments import asgd_moments

    reads = independent_reads(Geometric(0.75), 60, 4000, np.random.default_rng(2))
    values = second_moment(reads, 0.1, 60)
    exact = asgd_moments(Quadratic(), 0.1, 0.75, 60, initial=np.ones(1)).second_moment[:, 0, 0]
    standard_error = values[1:].std(axis=1, ddof=1) / np.sqrt(values.shape[1])
    difference = (values.mean(axis=1) - exact)[1:]
    assert np.all(np.abs(difference) < 4.5 * np.maximum(standard_error, 1e-12))


def test_a_constant_delay_has_a_fixed_order() -> None:
    pool = pool_reads(ConstantPlusGeometric(7, 0.0), 8, 3, np.random.default_rng(3))
    used, update = np.stack([read for read, _ in islice(pool.turns, 400)]), np.arange(400)
    # every slot is used once in eight updates, always in the same order
    assert np.array_equal(np.sort(used[:8], axis=0), np.tile(np.arange(8)[:, None], 3))
    assert np.array_equal(used, used[update % 8])
    values = second_moment(recorded_reads([np.minimum(np.arange(400), 7)]), 0.05, 400)
    assert values[400, 0] == pytest.approx(0.11511, abs=2e-5)


def test_recorded_reads_hold_the_right_versions_in_few_slots() -> None:
    rng = np.random.default_rng(4)
    staleness = np.minimum(np.arange(500), rng.geometric(0.2, size=500) - 1)
    reads = recorded_reads([staleness])
    held = np.zeros(reads.slots, dtype=int)
    for k, (read, write) in enumerate(reads.turns):
        assert held[read[0]] == k - staleness[k]
        held[write[0]] = k + 1
    versions = np.arange(500) - staleness
    last = {int(v): k for k, v in enumerate(versions)}
    live = max(sum(v <= k <= at for v, at in last.items()) for k in range(500))
    assert live_snapshots(staleness) == live
    assert reads.slots == live + 1


def test_moments_given_the_reads_are_those_of_simulated_paths() -> None:
    """Least squares: the noise depends on the point, and every snapshot has its own covariance."""
    given = setting()
    paths = 800
    ensemble = sme_replay(
        given.problem,
        given.learning_rate,
        given.staleness,
        paths,
        seed=5,
        batch_size=given.batch_size,
        initial=given.initial,
        record=RECORD,
    )
    curve = MODELS["replay"].exact(given, seed=0)
    assert curve.paths is None
    z = (curve.mean - ensemble.loss_mean)[1:] / (ensemble.loss_std[1:] / np.sqrt(paths))
    assert np.abs(z).max() < 4
    # The band assumes normal points; under multiplicative noise they are only nearly normal.
    assert np.abs(curve.std[1:] / ensemble.loss_std[1:] - 1).max() < 0.15


def test_the_band_holds_its_share_of_the_discrete_algorithm() -> None:
    """With curvatures from 0.01 to 4, three cumulants alone would put 10 % below the lower end."""
    paths, record = 3000, np.array([0, 150])
    given = setting(law=Geometric(0.75), batch_size=16, record=record)
    curve = MODELS["sme_law"].exact(given, seed=0)
    server = asgd_server(diabetes(), 0.02, 4, 150, paths, 3, batch_size=16, record=record)
    loss = np.asarray(diabetes().loss(server.final))
    # the error of the server's paths and that of the draws behind the quantiles
    assert largest_miss(curve, loss, 1 / paths + 1 / 2048) < 4


def test_the_band_holds_its_share_under_drawn_reads() -> None:
    """If staleness is not geometric, the moments differ between sequences of reads."""
    paths, record = 1000, np.array([0, 60])
    given = setting(batch_size=16, record=record)
    curve = MODELS["sme_law"].exact(given, seed=0)
    ensemble = sme_law(
        given.problem,
        given.learning_rate,
        given.law,
        60,
        paths,
        seed=3,
        closure="pool",
        workers=4,
        batch_size=16,
        initial=given.initial,
        record=record,
    )
    loss = np.asarray(given.problem.loss(ensemble.final))
    assert largest_miss(curve, loss, 1 / paths + 1 / 2048) < 4


def largest_miss(curve: LossCurve, loss: np.ndarray, weight: float) -> float:
    """Return the largest error of the shares of losses below quantiles, in standard errors."""
    misses = []
    for level in (0.05, 0.5, 0.95):
        quantile = curve.quantiles[-1, np.searchsorted(SCORED_LEVELS, level - 1e-9)]
        error = np.sqrt(level * (1 - level) * weight)
        misses.append(abs(np.mean(loss < quantile) - level) / error)
    return float(max(misses))


def test_the_pool_of_a_law_is_that_of_simulated_paths() -> None:
    given = setting(problem=Quadratic(), learning_rate=0.12, batch_size=1, initial=np.ones(1))
    paths = 20_000
    ensemble = sme_law(
        given.problem,
        given.learning_rate,
        given.law,
        300,
        paths,
        seed=6,
        closure="pool",
        workers=4,
        initial=given.initial,
        record=RECORD,
    )
    drawn = [MODELS["sme_law"].exact(given, seed) for seed in range(10)]
    loss = np.asarray(given.problem.loss(ensemble.final))
    assert max(largest_miss(curve, loss, 1 / paths + 1 / 2048) for curve in drawn) < 4
    curves = np.stack([curve.mean for curve in drawn])
    claimed = np.sqrt(np.mean([curve.mean_error**2 for curve in drawn], axis=0))
    assert 0.6 < np.mean(curves.std(axis=0, ddof=1)[1:] / claimed[1:]) < 1.4
    variance = curves.var(axis=0, ddof=1) / len(curves) + ensemble.loss_std**2 / paths
    z = (curves.mean(axis=0) - ensemble.loss_mean)[1:] / np.sqrt(variance[1:])
    assert np.abs(z).max() < 4.5
    # The drawn reads are an error of one prediction, but a far smaller one than 512 paths.
    assert np.mean(curves.std(axis=0)[1:]) < 0.3 * np.mean(ensemble.loss_std[1:]) / np.sqrt(512)


def test_which_models_are_closed() -> None:
    given = setting()
    assert MODELS["sme_law"].has_exact(given)
    assert not MODELS["law_sampling"].has_exact(given)
    assert MODELS["law_sampling"].has_exact(setting(law=Geometric(0.75)))
    assert not MODELS["sme_law"].has_exact(setting(problem=DoubleWell()))
    assert not MODELS["sme_law"].has_exact(setting(workers=1000))
    with pytest.raises(InputError, match="closure"):
        MODELS["law_sampling"].exact(given, 0)


def test_closed_forms_are_offered_only_where_they_fit() -> None:
    """Each closure has a limit of its own; beyond it a prediction simulates instead of failing."""
    wide = ConstantPlusGeometric(2, 0.995)
    assert MODELS["law_pool"].has_exact(setting(law=wide))
    assert MODELS["law_iid"].has_exact(setting(law=wide, record=np.array([0, 90])))
    given = setting(law=wide, record=np.array([0, 5000]))
    assert not MODELS["law_iid"].has_exact(given)
    with pytest.raises(InputError, match="simulate instead"):
        MODELS["law_iid"].exact(given, 0)
    assert MODELS["sme_law"].has_exact(setting(law=Geometric(0.999), workers=1000))
    constant = np.minimum(np.arange(300), 200)
    assert MODELS["replay"].has_exact(setting(staleness=(constant,) * 10))
    assert not MODELS["replay"].has_exact(setting(staleness=(constant,) * 100))


@pytest.mark.parametrize("closure", ["pool", "iid"])
def test_memory_does_not_grow_with_updates(closure: str) -> None:
    law, runs, updates, rng = Poisson(1.0), 512, 2000, np.random.default_rng(0)
    pool = closure == "pool"
    reads = pool_reads(law, 2, runs, rng) if pool else independent_reads(law, updates, runs, rng)
    gradients, record = LinearGradients.of(Quadratic()), np.array([updates])
    tracemalloc.start()
    (last,) = read_moments(gradients, 0.1, reads, batch_size=1, initial=np.ones(1), record=record)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert last.mean.shape == (runs, 1)
    assert peak < 0.8 * runs * updates * 8


def test_too_many_snapshots_are_refused() -> None:
    given = setting()
    with pytest.raises(InputError, match="live snapshots"):
        read_moments(
            LinearGradients.of(given.problem),
            0.1,
            Reads(iter(()), 2000, 1),
            batch_size=1,
            initial=given.initial,
            record=RECORD,
        )


def test_the_band_of_one_mode_is_the_exact_one() -> None:
    """(1/2) a x^2 of a normal x is chi-square with one degree of freedom."""
    cumulants = quadratic_cumulants(np.zeros((1, 1)), np.array([3.0]), np.full((1, 1, 1), 0.2))
    curve = LossCurve.of_cumulants(np.array([1]), *cumulants, end=np.zeros(1))
    assert np.allclose(curve.quantiles[0], 0.3 * stats.chi2.ppf(SCORED_LEVELS, 1))


def test_cumulants_of_a_quadratic_form_are_those_of_its_samples() -> None:
    rng = np.random.default_rng(7)
    factor, slope, curvature = rng.standard_normal((3, 3)), rng.standard_normal(3), np.arange(1, 4)
    z = rng.standard_normal((400_000, 3)) @ factor.T
    values = z @ slope + z**2 @ curvature / 2
    first, second, third = quadratic_cumulants(
        slope[None], curvature.astype(float), (factor @ factor.T)[None]
    )
    estimates = [stats.kstat(values, order) for order in (1, 2, 3)]
    errors = [
        np.std([stats.kstat(part, order) for part in np.split(values, 40)]) / np.sqrt(40)
        for order in (1, 2, 3)
    ]
    exact = np.concatenate([first, second, third])
    assert np.all(np.abs(exact - estimates) < 4 * np.array(errors))


@pytest.mark.parametrize("skew", [0.0, 0.5, -0.5, 2.0])
def test_quantiles_are_those_of_the_pearson_law(skew: float) -> None:
    curve = LossCurve.of_cumulants(
        np.array([1]), np.array([2.0]), np.array([4.0]), np.array([8.0 * skew]), end=np.zeros(1)
    )
    assert np.allclose(curve.quantiles[0], stats.pearson3.ppf(SCORED_LEVELS, skew, 2.0, 2.0))
    certain = LossCurve.of_cumulants(
        np.array([1]), np.array([2.0]), np.zeros(1), np.zeros(1), end=np.zeros(1)
    )
    assert np.all(certain.quantiles == 2.0)
