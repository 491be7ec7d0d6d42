import numpy as np
import pytest

from analysis.exact.moments import asgd_moments, expected_loss
from analysis.models.discrete import asgd_iid, asgd_server, momentum_sgd, sgd
from analysis.models.history import ReadPoints
from analysis.models.sme_asgd import sme_asgd
from asgd.config.tables import ProblemConfig
from asgd.errors import InputError
from asgd.problems.linear import LeastSquares
from asgd.problems.make import make_problem
from asgd.problems.scalar import DoubleWell, Quadratic
from asgd.staleness.counts import Poisson
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric
from asgd.streams import stream
from tests.support.exact import mode_moments, server_moments

PATHS = 10_000


def small_least_squares():
    rng = stream(1, "small least squares")
    features = rng.standard_normal((12, 3)) * [2.0, 0.7, 0.3]
    return LeastSquares(features, features @ [1.0, -2.0, 0.5] + rng.standard_normal(12), l2=0.05)


def assert_moments(ensemble, mean, second):
    """Compare runs on f = x^2 with exact E x and E x^2, shape (m, 1), at four standard errors."""
    some = [1, 2, 4, 8, 16, 32, 64, -1]  # so few that four standard errors hold at each
    error = np.sqrt(np.maximum(second - mean**2, 0) / ensemble.paths)
    assert np.all(np.abs(ensemble.mean - mean)[some] <= 4 * error[some])
    error = ensemble.loss_std[:, None] / np.sqrt(ensemble.paths)
    assert np.all(np.abs(ensemble.second_moment - second)[some] <= 4 * error[some])


@pytest.mark.parametrize(("eta", "mu"), [(0.02, 0.75), (0.05, 0.9), (0.1, 0.0)])
def test_iid_asgd_has_the_closed_moments(eta, mu):
    ensemble = asgd_iid(Quadratic(), eta, Geometric(mu), 120, PATHS, 0)
    exact = asgd_moments(Quadratic(), eta, mu, 120)
    assert_moments(ensemble, exact.mean, exact.second_moment[:, :, 0])


def test_iid_asgd_has_the_closed_moments_of_least_squares():
    problem = small_least_squares()
    batch = np.repeat([1, 4], 40)
    ensemble = asgd_iid(problem, 0.03, Geometric(0.8), 80, PATHS, 1, batch_size=batch)
    exact = asgd_moments(problem, 0.03, 0.8, 80, batch_size=batch)
    error = np.abs(ensemble.loss_mean - expected_loss(problem, exact))
    assert np.all(error <= 4 * ensemble.loss_std / np.sqrt(PATHS) + 1e-9)


def test_iid_asgd_runs_on_diabetes():
    problem = make_problem(ProblemConfig(kind="least_squares"))
    ensemble = asgd_iid(problem, 0.02, Geometric(0.75), 15, 500, 2, batch_size=4)
    exact = expected_loss(problem, asgd_moments(problem, 0.02, 0.75, 15, batch_size=4))
    assert np.all(np.abs(ensemble.loss_mean - exact) <= 4 * ensemble.loss_std / np.sqrt(500) + 1e-9)


@pytest.mark.parametrize(
    "law", [Poisson(7.0), ConstantPlusGeometric(2, 0.6), Empirical((0.2, 0.1, 0.3, 0.4))], ids=repr
)
def test_iid_asgd_of_any_law_has_the_mean_of_its_impulse_response(law):
    ensemble = asgd_iid(Quadratic(), 0.05, law, 100, PATHS, 3)
    mean = mode_moments(law, 0.05, 2.0, 4.0, 100).mean[:, None]
    variance = ensemble.second_moment - ensemble.mean**2
    assert np.all(np.abs(ensemble.mean - mean) <= 4 * np.sqrt(variance / PATHS) + 1e-5)


def test_constant_delay_has_no_lag_noise():
    ensemble = asgd_iid(Quadratic(), 0.05, ConstantPlusGeometric(7), 200, PATHS, 4)
    exact = mode_moments(ConstantPlusGeometric(7), 0.05, 2.0, 4.0, 200)
    assert_moments(ensemble, exact.mean[:, None], (exact.variance + exact.mean**2)[:, None])
    assert exact.variance[-1] == pytest.approx(0.11511, abs=1e-4)


@pytest.mark.parametrize(("eta", "workers"), [(0.1, 8), (0.2, 4), (0.1, 1)])
def test_server_has_the_moments_of_its_own_recursion_and_not_of_independent_lags(eta, workers):
    ensemble = asgd_server(Quadratic(), eta, workers, 150, PATHS, 5)
    exact = server_moments(2.0, 4.0, eta, workers, 150)
    second = exact.variance + exact.mean**2
    assert_moments(ensemble, exact.mean[:, None], second[:, None])
    if workers > 1:
        iid = asgd_moments(Quadratic(), eta, 1 - 1 / workers, 150).second_moment[-1, 0, 0]
        assert abs(ensemble.second_moment[-1, 0] - iid) > 4 * np.sqrt(2 / PATHS) * iid


def test_momentum_has_its_stationary_variance():
    eta, zeta, a, s2 = 0.02, 0.5, 2.0, 4.0
    ensemble = momentum_sgd(Quadratic(), eta, zeta, 150, PATHS, 6)
    transition = np.array([[1 - eta * a, zeta], [-eta * a, zeta]])
    noise = eta**2 * s2 * np.ones(4)
    exact = np.linalg.solve(np.eye(4) - np.kron(transition, transition), noise)[0]
    assert ensemble.second_moment[-1, 0] == pytest.approx(exact, rel=4 * np.sqrt(2 / PATHS))


def test_sgd_is_asgd_without_staleness():
    exact = asgd_moments(Quadratic(), 0.05, 0.0, 100, batch_size=2)
    ensemble = sgd(Quadratic(), 0.05, 100, PATHS, 7, batch_size=2)
    assert_moments(ensemble, exact.mean, exact.second_moment[:, :, 0])


def test_samples_are_drawn_and_not_gaussian():
    # two samples: after one update from x_0 = 1 there are two possible points
    ensemble = asgd_iid(Quadratic(), 0.1, Geometric(0.5), 1, 1_000, 8)
    assert set(ensemble.final[:, 0].round(12)) == {0.6, 1.0}
    assert np.mean(ensemble.final[:, 0] > 0.8) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(1_000))


@pytest.mark.parametrize("model", [asgd_iid, asgd_server, momentum_sgd, sgd])
def test_results_depend_on_the_seed_alone(model):
    third = {asgd_iid: [Poisson(3.0)], asgd_server: [4], momentum_sgd: [0.5], sgd: []}[model]
    runs = [
        model(DoubleWell(), 0.05, *third, 20, 25_000, seed, threads=threads, quantile_levels=())
        for seed, threads in ((1, 1), (1, 2), (2, 2))
    ]
    np.testing.assert_array_equal(runs[0].final, runs[1].final)
    assert not np.array_equal(runs[0].final, runs[2].final)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sgd(Quadratic(), 0.1, 5, 10, 0, batch_size=1.5), "whole numbers"),
        (lambda: asgd_server(Quadratic(), 0.1, 0, 5, 10, 0), "workers = 0"),
        (lambda: momentum_sgd(Quadratic(), 0.1, 1.0, 5, 10, 0), "zeta = 1.0"),
        (lambda: asgd_iid(Quadratic(), -0.1, Geometric(0.5), 5, 10, 0), "learning_rate"),
    ],
)
def test_unusable_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_points_are_kept_until_their_last_read():
    """Compare with the whole history; some versions are read several times, some never."""
    rng = np.random.default_rng(0)
    updates, paths, dim = 60, 5, 3
    version = np.maximum(np.arange(updates)[:, None] - rng.geometric(0.2, (updates, paths)), 0)
    history = rng.standard_normal((updates + 1, paths, dim))
    past = ReadPoints(version, history[0])
    for update in range(updates):
        expected = history[version[update], np.arange(paths)]
        np.testing.assert_array_equal(past.read(update), expected)
        past.keep(update + 1, history[update + 1])


def test_batch_noise_with_substeps_is_refused():
    problem = Quadratic()
    with pytest.raises(InputError, match="expected one step"):
        sme_asgd(problem, 0.1, 0.5, 10, 2, 0, noise="batch", substeps=2)
