import numpy as np
import pytest

from analysis.exact.moments import asgd_moments
from analysis.models.discrete import asgd_iid, asgd_server
from analysis.models.replay import sme_replay
from analysis.models.sme_law import sme_law
from asgd.errors import InputError
from asgd.problems.linear import LeastSquares, digits
from asgd.problems.scalar import DoubleWell, Quadratic
from asgd.staleness.counts import Poisson
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric, GeometricMixture
from asgd.streams import stream
from tests.support.exact import SERVER_TABLE, check_quadratic, mode_moments, server_second_moment

PATHS = 20_000


def standard_score(samples, expected, rounding=0.0):
    error = samples.std(axis=0) / np.sqrt(len(samples)) + rounding
    return np.max(np.abs(samples.mean(axis=0) - expected) / error)


def final(model, *arguments, updates, paths=PATHS, seed=1, **options):
    return model(
        *arguments, updates, paths, seed, record=[updates], quantile_levels=(), **options
    ).final


def small_least_squares(dim):
    rng = stream(3, f"least squares/{dim}")
    features = rng.standard_normal((15, dim))
    return LeastSquares(features, features.sum(axis=1) + rng.standard_normal(15), 0.05)


@pytest.mark.parametrize("closure", ["pool", "iid", "sampling"])
@pytest.mark.parametrize(
    "row", SERVER_TABLE[:-1], ids=lambda row: f"eta{row[0]}-P{row[1]}-k{row[2]}"
)
def test_table_of_closures(row, closure):
    eta, workers, updates, *values = row
    expected = values[["pool", "iid", "sampling"].index(closure)]
    law = Geometric(1 - 1 / workers)
    x = final(sme_law, check_quadratic(), eta, law, updates=updates, closure=closure)
    assert standard_score(x * x, expected, 1e-4 * expected) < 4


@pytest.mark.parametrize("closure", ["pool", "iid", "sampling"])
def test_the_general_method_agrees_for_a_geometric_law(closure):
    """A mixture of one component is geometric, but takes the method with a history or ages."""
    eta, workers, updates = 0.1, 8, 100
    law = GeometricMixture((1 - 1 / workers,), (1.0,))
    exact = asgd_moments(
        Quadratic(), eta, 1 - 1 / workers, updates, closure=closure, initial=np.ones(1)
    )
    x = final(
        sme_law,
        Quadratic(),
        eta,
        law,
        updates=updates,
        closure=closure,
        paths=6_000,
        workers=workers if closure == "pool" else None,
    )
    assert standard_score(x, exact.mean[-1]) < 4
    assert standard_score(x * x, exact.second_moment[-1, 0]) < 4


@pytest.mark.parametrize("law", [Poisson(4.0), ConstantPlusGeometric(5, 0.0)])
def test_sampling_closure_against_the_impulse_response(law):
    eta, updates = 0.08, 60
    exact = mode_moments(law, eta, 2.0, 4.0, updates, batch_size=2)
    x = final(sme_law, Quadratic(), eta, law, updates=updates, closure="sampling", batch_size=2)
    assert standard_score(x, exact.mean[-1]) < 4
    assert standard_score(x * x, exact.variance[-1] + exact.mean[-1] ** 2) < 4


@pytest.mark.parametrize("dim", [2, 6])
def test_independent_staleness_of_any_law_in_several_dimensions(dim):
    """Compare (G1) with the algorithm under the same law, with matrices (2) and without (6)."""
    problem, eta, law, updates = small_least_squares(dim), 0.05, Poisson(3.0), 25
    options = {"updates": updates, "batch_size": 2, "initial": np.full(dim, 2.0)}
    model = final(sme_law, problem, eta, law, paths=6_000, closure="iid", **options)
    algorithm = final(asgd_iid, problem, eta, law, paths=20_000, **options)
    for power in (1, 2):
        a, b = model**power, algorithm**power
        error = np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b))
        assert np.max(np.abs(a.mean(axis=0) - b.mean(axis=0)) / error) < 4


@pytest.mark.parametrize("closure", ["iid", "sampling"])
@pytest.mark.parametrize("law", [Geometric(0.75), GeometricMixture((0.75,), (1.0,))])
def test_closures_without_matrices(closure, law):
    problem, eta, updates = small_least_squares(6), 0.06, 40
    exact = asgd_moments(problem, eta, 0.75, updates, closure=closure, batch_size=2)
    x = final(
        sme_law, problem, eta, law, updates=updates, paths=6_000, closure=closure, batch_size=2
    )
    assert standard_score(x, exact.mean[-1]) < 4
    assert standard_score(x * x, np.diagonal(exact.second_moment[-1])) < 4


def test_pool_is_the_memoryless_server_in_several_dimensions():
    problem, eta, workers, updates = small_least_squares(6), 0.06, 4, 40
    exact = asgd_moments(problem, eta, 0.75, updates, closure="pool", batch_size=2)
    x = final(sme_law, problem, eta, Geometric(0.75), updates=updates, paths=6_000, batch_size=2)
    assert standard_score(x, exact.mean[-1]) < 4
    assert standard_score(x * x, np.diagonal(exact.second_moment[-1])) < 4
    server = final(asgd_server, problem, eta, workers, updates=updates, batch_size=2)
    error = np.sqrt((x * x).var(axis=0) / len(x) + (server**2).var(axis=0) / len(server))
    assert np.max(np.abs((x * x).mean(axis=0) - (server**2).mean(axis=0)) / error) < 4


def test_pool_of_a_nonlinear_problem():
    """Compare the distributions of pool and server near the ridge of the double well."""
    problem, updates = DoubleWell(noise=1.0, initial=0.1), 60
    options = {"updates": updates, "batch_size": 4}
    pool = final(sme_law, problem, 0.1, Geometric(0.75), **options)
    server = final(asgd_server, problem, 0.1, 4, **options)
    assert abs(np.mean(pool > 0) - np.mean(server > 0)) < 4 * np.sqrt(0.5 / PATHS)
    from scipy.stats import ks_2samp

    assert ks_2samp(pool[:, 0], server[:, 0]).pvalue > 1e-4


@pytest.mark.parametrize(("eta", "workers"), [(0.05, 8), (0.1, 8), (0.2, 4)])
def test_moments_of_the_pool(eta, workers):
    """(P1) is exact except for paths whose variance is cut at zero, at most 1 %."""
    exact = server_second_moment(eta, workers, 100)[-1]
    law = Geometric(1 - 1 / workers)
    x = final(sme_law, Quadratic(), eta, law, updates=100, closure="pool_moments")
    assert standard_score(x * x, exact, 0.01 * exact / 4) < 4


def test_constant_staleness_uses_the_oldest_snapshot():
    """The hazard is zero before P - 1 and one from there on."""
    workers = 4
    law = ConstantPlusGeometric(workers - 1, 0.0)
    pool = final(sme_law, Quadratic(), 0.1, law, updates=60, workers=workers)
    exact = mode_moments(law, 0.1, 2.0, 4.0, 60)
    assert standard_score(pool**2, exact.variance[-1] + exact.mean[-1] ** 2) < 4


def test_replay_of_constant_staleness():
    law, updates = ConstantPlusGeometric(7, 0.0), 200
    exact = mode_moments(law, 0.05, 2.0, 4.0, updates)
    assert exact.variance[-1] == pytest.approx(0.1151, abs=1e-3)
    staleness = np.minimum(np.arange(updates), 7)
    ensemble = sme_replay(Quadratic(), 0.05, staleness, PATHS, 1, record=[updates])
    # x_0 is read eight times, each time with independent noise
    assert standard_score(ensemble.final**2, exact.variance[-1] + exact.mean[-1] ** 2) < 4


def test_replay_is_the_recursion_with_the_recorded_reads():
    """Compare with the linear map of the noise; the random reads repeat some versions."""
    rng = stream(5, "trace")
    updates, eta = 50, 0.05
    staleness = np.minimum(rng.integers(0, 9, updates), np.arange(updates))
    effect = np.zeros((updates + 1, updates + 1))  # row k: effects of x_0 and the noises on x_k
    effect[0, 0] = 1.0
    for k in range(updates):
        effect[k + 1] = effect[k] - 2 * eta * effect[k - staleness[k]]
        effect[k + 1, k + 1] -= eta
    second = effect[-1, 0] ** 2 + 4 * np.sum(effect[-1, 1:] ** 2)
    x = sme_replay(Quadratic(), eta, staleness, PATHS, 2, record=[updates]).final
    assert standard_score(x, effect[-1, 0]) < 4
    assert standard_score(x * x, second) < 4


def test_a_replay_of_several_runs_gives_each_start_its_own_staleness():
    updates, eta, starts = 20, 0.05, np.array([[1.0], [-2.0], [3.0]])
    sequences = [np.minimum(np.arange(updates), lag) for lag in (0, 3, 1)]
    ends = []
    for x, staleness in zip(starts, sequences, strict=True):
        points = [x[0]]
        for k in range(updates):
            points.append(points[k] - 2 * eta * points[k - staleness[k]])
        ends.append(points[-1])
    given = {"initial": starts, "record": [updates]}
    problem = Quadratic(noise=0.0)
    final = sme_replay(problem, eta, sequences, 30_001, 2, **given).final  # in two blocks
    expected = np.repeat(ends, [10_001, 10_000, 10_000])
    np.testing.assert_allclose(final[:, 0], expected, rtol=1e-12)
    with pytest.raises(InputError, match=r"len\(initial\) = 3: expected one point.* 2 runs"):
        sme_replay(problem, eta, sequences[:2], 6, 2, **given)


def test_replay_of_part_of_a_trace():
    staleness = np.minimum(np.arange(30), 3)
    part = sme_replay(Quadratic(), 0.05, staleness, 50, 2, updates=20)
    whole = sme_replay(Quadratic(), 0.05, staleness, 50, 2)
    np.testing.assert_array_equal(part.update, np.arange(21))
    np.testing.assert_array_equal(part.mean, whole.mean[:21])


def test_many_parameters():
    """With d = 20 000 a (d, d) array would take 3.2 GB."""
    rng = stream(6, "wide")
    problem = LeastSquares(rng.standard_normal((4, 20_000)) / 100, rng.standard_normal(4), 0.1)
    staleness = [0, 1, 2, 2, 2]
    for law in (Geometric(0.5), Poisson(2.0)):
        for closure in ("pool", "iid", "sampling"):
            ensemble = sme_law(problem, 0.1, law, 5, 3, 0, closure=closure)
            assert ensemble.final.shape == (3, 20_000)
            assert ensemble.loss_mean[-1] < ensemble.loss_mean[0]
    ensemble = sme_replay(problem, 0.1, staleness, 3, 0)
    assert ensemble.loss_mean[-1] < ensemble.loss_mean[0]


@pytest.mark.slow
def test_single_precision_on_digits():
    """The effect of float32 is below the Monte Carlo error of 60 paths."""
    single, double = (
        sme_law(
            digits(),
            0.3,
            Poisson(7.0),
            120,
            60,
            seed,
            workers=8,
            batch_size=16,
            record=np.arange(10, 121, 10),
            dtype=dtype,
        )
        for seed, dtype in ((1, np.float32), (2, np.float64))
    )
    error = np.hypot(single.loss_std, double.loss_std) / np.sqrt(60)
    assert np.all(np.abs(single.loss_mean - double.loss_mean) < 4 * error)


@pytest.mark.parametrize("closure", ["pool", "iid", "sampling", "pool_moments"])
def test_single_precision_and_threads(closure):
    law = Geometric(0.75)
    runs = [
        sme_law(
            Quadratic(), 0.1, law, 10, 25_000, 3, closure=closure, dtype=np.float32, threads=threads
        )
        for threads in (1, 2)
    ]
    assert runs[0].final.dtype == np.float32
    np.testing.assert_array_equal(runs[0].final, runs[1].final)
    np.testing.assert_array_equal(runs[0].loss_quantiles, runs[1].loss_quantiles)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: sme_law(p, 0.1, Poisson(2.0), 5, 5, 0, closure="exact"),
            "closure = 'exact': expected pool, pool_moments, iid, sampling",
        ),
        (lambda p: sme_law(p, 0.1, Poisson(2.0), 5, 5, 0, closure="pool_moments"), "geometric"),
        (lambda p: sme_law(p, 0.1, Poisson(2.0), 5, 5, 0, workers=0), "workers = 0"),
        (lambda p: sme_replay(p, 0.1, [0, 2], 5, 0), r"staleness\[1\] = 2: expected"),
        (lambda p: sme_replay(p, 0.1, [0, -1], 5, 0), r"staleness\[1\] = -1"),
        (lambda p: sme_replay(p, 0.1, [0, 0.5], 5, 0), r"staleness\[1\] = 0\.5"),
        (lambda p: sme_replay(p, 0.1, [0, 1], 5, 0, updates=3), r"staleness\.shape = "),
        (lambda p: sme_replay(p, 0.1, [], 5, 0), r"staleness\.shape = "),
    ],
)
def test_unusable_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call(Quadratic())
