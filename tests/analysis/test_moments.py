import numpy as np
import pytest

from analysis.exact.linear_gradients import LinearGradients
from analysis.exact.moments import (
    MomentRecursion,
    asgd_moments,
    expected_loss,
    stationary_variance,
)
from asgd.config.tables import ProblemConfig
from asgd.errors import InputError
from asgd.problems.linear import LeastSquares
from asgd.problems.make import make_problem
from asgd.problems.scalar import Quadratic, Quartic
from asgd.staleness.counts import NegativeBinomial, Poisson
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric
from asgd.streams import stream
from tests.support.exact import SERVER_TABLE, impulse_response, mode_moments, server_moments


@pytest.mark.parametrize(
    ("eta", "mu", "k", "mean", "second"),
    [
        (0.02, 0.75, 25, 0.3131, 0.1187),
        (0.02, 0.75, 400, 0.0, 0.02287),
        (0.05, 0.90, 25, -0.2749, 0.1879),
        (0.05, 0.90, 400, 0.0, 0.1025),
    ],
)
def test_moments_equal_independently_computed_values(eta, mu, k, mean, second):
    moments = asgd_moments(Quadratic(), eta, mu, k)
    assert moments.mean[k, 0] == pytest.approx(mean, abs=5e-5)
    assert moments.second_moment[k, 0, 0] == pytest.approx(second, abs=5e-5)


@pytest.mark.parametrize(("eta", "workers", "k", "pool", "iid", "sampling"), SERVER_TABLE)
def test_closures_equal_independently_computed_values(eta, workers, k, pool, iid, sampling):
    expected = {"pool": pool, "iid": iid, "sampling": sampling}
    for closure, value in expected.items():
        moments = asgd_moments(Quadratic(), eta, 1 - 1 / workers, k, closure=closure)
        tolerance = 2e-4 if value < 1 else 2e-3
        assert moments.second_moment[k, 0, 0] == pytest.approx(value, rel=tolerance)


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("eta", [0.05, 0.3])
def test_pool_closure_is_the_memoryless_server_exactly(workers, eta):
    pool = asgd_moments(Quadratic(), eta, 1 - 1 / workers, 300, closure="pool", initial=[1.5])
    server = server_moments(2.0, 4.0, eta, workers, 300, initial=1.5)
    np.testing.assert_allclose(pool.mean[:, 0], server.mean, rtol=1e-9, atol=1e-12)
    second = server.variance + server.mean**2
    np.testing.assert_allclose(pool.second_moment[:, 0, 0], second, rtol=1e-9)


def simulate_asgd(problem, eta, mu, updates, paths, batch, rng):
    """(A1) written out naively: one sample index and one lag for each path and update."""
    history = np.empty((updates + 1, paths, problem.dim))
    history[0] = problem.initial_point(rng)
    for k in range(updates):
        lag = np.minimum(rng.geometric(1 - mu, paths) - 1, k)
        read = history[k - lag, np.arange(paths)]
        indices = rng.integers(problem.n_samples, size=(paths, batch))
        history[k + 1] = history[k] - eta * problem.gradient(read, indices)
    return history


@pytest.mark.parametrize("batch", [1, 3])
def test_least_squares_moments_within_four_standard_errors_of_monte_carlo(batch):
    rng = stream(1, "small least squares")
    features = rng.standard_normal((12, 3)) * [1.0, 0.7, 0.4]
    targets = features @ [1.0, -2.0, 0.5] + rng.standard_normal(12)
    problem = LeastSquares(features, targets, l2=0.05)
    eta, mu, updates, paths = 0.05, 0.8, 60, 20_000
    x = simulate_asgd(problem, eta, mu, updates, paths, batch, stream(2, "paths"))
    moments = asgd_moments(problem, eta, mu, updates, batch_size=batch)
    products = x[:, :, :, None] * x[:, :, None, :]
    checks = [(x, moments.mean), (products, moments.second_moment)]
    checks += [(problem.loss(x), expected_loss(problem, moments))]
    for draws, exact in checks:
        error = np.abs(draws.mean(axis=1) - exact)
        standard_error = draws.std(axis=1) / np.sqrt(paths)
        assert np.all(error <= 4 * standard_error + 1e-12)


def test_schedules_change_the_update_they_belong_to():
    problem = Quadratic()
    rates, batches = np.full(40, 0.05), np.ones(40)
    rates[20:], batches[20:] = 0.01, 8
    mixed = asgd_moments(problem, rates, 0.5, 40, batch_size=batches)
    plain = asgd_moments(problem, 0.05, 0.5, 40)
    same = np.isclose(mixed.second_moment[:, 0, 0], plain.second_moment[:, 0, 0])
    assert same[:21].all()
    assert not same[21:].any()
    # one update by hand, no staleness: E x^2 (1 - eta a)^2 + eta^2 s^2 / b
    x = mixed.second_moment[20, 0, 0]
    fresh = asgd_moments(problem, 0.1, 0.0, 1, batch_size=4, initial=[np.sqrt(x)])
    assert fresh.second_moment[1, 0, 0] == pytest.approx(0.8**2 * x + 0.01 * 4.0 / 4)


def test_constant_delay_and_geometric_impulse_sums():
    constant = mode_moments(ConstantPlusGeometric(7), 0.05, 2.0, 4.0, 2000)
    geometric = mode_moments(Geometric(0.875), 0.05, 2.0, 4.0, 2000)
    assert constant.variance[-1] == pytest.approx(0.11511, abs=1e-5)
    assert geometric.variance[-1] == pytest.approx(0.08763, abs=1e-5)


def test_impulse_response_equals_the_sampling_closure_for_geometric_staleness():
    eta, mu, updates = 0.05, 0.8, 150
    batch = np.linspace(1, 9, updates).round()
    mode = mode_moments(Geometric(mu), eta, 2.0, 4.0, updates, batch_size=batch, initial=1.5)
    closed = asgd_moments(
        Quadratic(), eta, mu, updates, batch_size=batch, initial=[1.5], closure="sampling"
    )
    # the law is cut where its tail falls below 1e-6
    np.testing.assert_allclose(mode.mean, closed.mean[:, 0], atol=2e-5)
    variance = closed.second_moment[:, 0, 0] - closed.mean[:, 0] ** 2
    np.testing.assert_allclose(mode.variance, variance, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    "law",
    [
        Poisson(4.0),
        ConstantPlusGeometric(2, 0.6),
        NegativeBinomial(3.0, 0.6),
        Empirical((0.1, 0.0, 0.5, 0.2, 0.2)),
    ],
    ids=lambda law: law.name,
)
def test_modes_within_four_standard_errors_of_the_sampling_closure(law):
    eta, updates, paths = 0.08, 60, 20_000
    curvature, noise = np.array([1.0, 0.3]), np.array([2.0, 5.0])
    rng = stream(3, law.name)
    weights = law.weights(law.support_length())
    x = np.ones((updates + 1, paths, 2))
    for k in range(updates):
        lags = np.maximum(k - np.arange(len(weights)), 0)
        read = np.tensordot(weights, x[lags], axes=1)
        push = rng.standard_normal((paths, 2)) * np.sqrt(noise)
        x[k + 1] = x[k] - eta * (curvature * read + push)
    modes = mode_moments(law, eta, curvature, noise, updates)
    assert np.all(np.abs(x.mean(1) - modes.mean) <= 4 * x.std(1) / np.sqrt(paths) + 1e-12)
    relative = 4 * np.sqrt(2 / paths)
    np.testing.assert_allclose(x.var(axis=1), modes.variance, rtol=relative, atol=1e-12)


def test_impulse_response_without_staleness_is_a_power():
    h = impulse_response(Geometric(0.0), 0.1, [1.0, 3.0], 5)
    np.testing.assert_allclose(h, np.array([0.9, 0.7]) ** np.arange(6)[:, None])


def test_diabetes_loss_within_four_standard_errors_of_monte_carlo():
    problem = make_problem(ProblemConfig(kind="least_squares"))
    eta, mu, updates, paths = 0.02, 0.75, 40, 3_000
    x = simulate_asgd(problem, eta, mu, updates, paths, 4, stream(4, "diabetes"))
    moments = asgd_moments(problem, eta, mu, updates, batch_size=4)
    some = [1, 2, 5, 10, 20, 40]
    loss = np.stack([problem.loss(x[k]) for k in some])
    error = np.abs(loss.mean(axis=1) - expected_loss(problem, moments)[some])
    assert np.all(error <= 4 * loss.std(axis=1) / np.sqrt(paths) + 1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"problem": Quartic()}, "linear in x"),
        ({"mu": 1.0}, "mu = 1.0: expected a number >= 0 and < 1"),
        ({"closure": "exact"}, "expected one of iid, sampling, pool"),
        ({"batch_size": [1, 2]}, "batch_size"),
        ({"learning_rate": -0.1}, "learning_rate"),
    ],
)
def test_unusable_input_is_named(arguments, message):
    good = {"problem": Quadratic(), "learning_rate": 0.1, "mu": 0.5, "updates": 5}
    with pytest.raises(InputError, match=message):
        asgd_moments(**(good | arguments))


@pytest.mark.parametrize(("eta", "mu"), [(0.02, 0.75), (0.1, 0.9), (0.3, 0.0), (0.2, 0.5)])
def test_stationary_variance_is_where_the_recursion_settles(eta, mu):
    recursion = MomentRecursion(LinearGradients.of(Quadratic()), mu)
    states = recursion.run(np.zeros(1), np.full(3000, eta), np.ones(3000))
    _, _, _, iterate, _, read, _ = recursion.split(states[-1])
    exact = stationary_variance(2.0, 4.0, eta, mu)
    assert exact.iterate == pytest.approx(iterate[0, 0], rel=1e-9)
    assert exact.expected_read == pytest.approx(read[0, 0], rel=1e-9)


def test_stationary_variance_beyond_its_limit_is_refused():
    with pytest.raises(InputError, match="variance grows without bound"):
        stationary_variance(2.0, 4.0, 0.4, 0.9)
