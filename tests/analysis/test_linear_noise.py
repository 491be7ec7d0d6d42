"""Fast mode, compared with exact moments and simulations, and where it must refuse."""

import numpy as np
import pytest

from analysis.exact.given_reads import pool_reads
from analysis.exact.limits import stability_limits
from analysis.models.sme_law import sme_law
from analysis.prediction.lag_noise import SERVERS, DrawnReads
from analysis.prediction.linear_noise import (
    MeanPath,
    linear_noise,
)
from analysis.prediction.loss_curve import SCORED_LEVELS
from analysis.prediction.model import LAW, simulate
from analysis.prediction.response import response_power
from analysis.prediction.setting import Setting
from analysis.profile.queueing import ServerTimes, server_staleness
from asgd.errors import InputError
from asgd.problems.linear import breast_cancer, digits
from asgd.problems.scalar import DoubleWell, Quadratic, Quartic
from asgd.staleness.counts import NegativeBinomial, Poisson
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric
from asgd.staleness.law import StalenessLaw
from asgd.streams import stream
from scripts.bench_limits import compute_times
from scripts.bench_plan import PhaseRetrieval, TanhNetwork, curvature
from tests.support.exact import Diagonal, impulse_response, mode_moments, server_moments

LAWS = [Poisson(3.0), Geometric(0.75)]


def without_noise(problem, learning_rate, law, initial, record) -> np.ndarray:
    path, losses = MeanPath(problem, learning_rate, law, initial), []
    for k in range(record[-1] + 1):
        if k in record:
            losses.append(problem.loss(path.x))
        path.step()
    return np.array(losses)


@pytest.mark.parametrize("law", LAWS)
def test_the_response_power_is_that_of_the_impulse_response(law) -> None:
    curvature = np.array([0.1, 0.7, 2.0])
    response = impulse_response(law, 0.1, curvature, 40)
    power = response_power(law, 0.1, curvature, np.array([0, 1, 7, 40]))
    for row, m in enumerate((0, 1, 7, 40)):
        assert np.allclose(power[row], response[:m].T @ response[:m])


@pytest.mark.parametrize("law", LAWS)
def test_additive_noise_on_a_quadratic_is_exact(law) -> None:
    """The grid of times adds no error here: mean and variance are those of the mode."""
    record = np.array([0, 8, 200])
    curve = linear_noise(Quadratic(), 0.05, law, 0, batch_size=2, initial=np.ones(1), record=record)
    exact = mode_moments(law, 0.05, 2.0, 4.0, 200, batch_size=2)
    mean, variance = exact.mean[record], exact.variance[record]
    assert np.allclose(curve.mean, mean**2 + variance)
    assert np.allclose(curve.std**2, 2 * variance**2 + 4 * mean**2 * variance)
    assert curve.paths is None


@pytest.mark.parametrize("law", LAWS)
def test_without_noise_the_mean_path_is_the_recursion(law) -> None:
    problem = DoubleWell(initial=1.0)
    x = [1.0]
    weights = law.weights(400)
    for k in range(60):
        past = np.array([x[max(k - l, 0)] for l in range(400)])
        x.append(x[-1] - 0.1 * weights @ problem.derivative(past))
    path = MeanPath(problem, 0.1, law, np.ones(1))
    for k in range(61):
        assert path.x[0] == pytest.approx(x[k], abs=1e-5)
        path.step()


@pytest.mark.parametrize("make", [breast_cancer, DoubleWell])
def test_small_nonlinear_problems_agree_with_simulated_paths(make) -> None:
    problem, law = make(), Poisson(3.0)
    paths = 200 if make is breast_cancer else 4000
    record = np.arange(0, 201, 20)
    given = {"batch_size": 4, "initial": np.zeros(31) if make is breast_cancer else np.ones(1)}
    curve = linear_noise(problem, 0.04, law, 0, **given, record=record)
    drawn = sme_law(
        problem,
        0.04,
        law,
        200,
        paths,
        1,
        closure="pool",
        workers=4,
        record=record,
        quantile_levels=SCORED_LEVELS,
        **given,
    )
    error = (curve.mean - drawn.loss_mean)[1:]
    standard_error = drawn.loss_std[1:] / np.sqrt(paths)
    # The correction by the noise is at most a tenth off, beyond the Monte Carlo error.
    correction = curve.mean - without_noise(problem, 0.04, law, given["initial"], record)
    assert np.all(np.abs(error) < 4 * standard_error + 0.1 * correction[1:])
    assert correction[1:].mean() > 3 * standard_error.mean()
    assert np.abs(curve.std[1:] / drawn.loss_std[1:] - 1).mean() < 0.2


def test_large_problems_need_hessian_vector_products_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """On digits, d = 650, the correction by the noise comes from draws and Lanczos iterations."""
    problem, law = digits(), Poisson(3.0)
    for name in ("hessian", "gradient_covariance", "second_moment", "sample_gradients"):
        monkeypatch.setattr(type(problem), name, lambda *_: pytest.fail("a matrix was formed"))
    record = np.array([0, 30, 60])
    initial = np.zeros(problem.dim)
    curve = linear_noise(problem, 0.1, law, 0, batch_size=8, initial=initial, record=record)
    paths = 16
    drawn = sme_law(
        problem,
        0.1,
        law,
        60,
        paths,
        1,
        closure="pool",
        workers=4,
        batch_size=8,
        record=record,
        initial=initial,
    )
    correction = curve.mean - without_noise(problem, 0.1, law, initial, record)
    error = (curve.mean - drawn.loss_mean)[1:]
    standard_error = drawn.loss_std[1:] / np.sqrt(paths)
    assert np.all(np.abs(error) < 4 * standard_error + 0.1 * correction[1:])
    assert np.all(correction[1:] > 4 * standard_error)


def wide(dim: int) -> Diagonal:
    return Diagonal(1.0 / (1.0 + np.arange(dim) % 100), push=0.01)


def test_a_hundred_thousand_parameters() -> None:
    problem, law = wide(100_000), Poisson(3.0)
    record = np.array([0, 8, 10])
    initial = np.ones(problem.dim)
    curve = linear_noise(problem, 0.1, law, 0, batch_size=1, initial=initial, record=record)
    exact = mode_moments(law, 0.1, problem.curvature[:100], np.full(100, problem.push**2), 10)
    modes = exact.mean**2 + exact.variance
    assert np.allclose(curve.mean, 1000 * modes[record] @ problem.curvature[:100] / 2, rtol=1e-3)


def test_the_loss_of_a_diverging_mean_path_is_not_finite() -> None:
    curve = linear_noise(
        Quadratic(),
        5.0,
        Poisson(3.0),
        0,
        batch_size=1,
        initial=np.ones(1),
        record=np.array([0, 3000]),
    )
    assert not np.isfinite(curve.mean[1])


def test_a_record_without_an_update_is_refused() -> None:
    with pytest.raises(InputError, match="record"):
        linear_noise(
            Quadratic(),
            0.1,
            Geometric(0.5),
            0,
            batch_size=1,
            initial=np.ones(1),
            record=np.array([0]),
        )


def drawn(law: StalenessLaw, workers: int, updates: int, seed: int) -> DrawnReads:
    start_up = 8 * workers
    reads = pool_reads(law, workers, SERVERS, stream(seed, ""))
    return DrawnReads.of(reads, updates, start_up)


def test_amplification_by_random_lags_is_that_of_the_recursion_of_the_server() -> None:
    """For memoryless workers both are exact: E x^2 of the server, and E x^2 without lag noise."""
    workers, step, lags = 8, np.array([0.2]), np.array([0, 500])
    law = Geometric(1 - 1 / workers)
    server = server_moments(1.0, 1.0, 0.2, workers, 2000).variance[-1]
    without = mode_moments(law, 0.2, 1.0, 1.0, 2000).variance[-1]
    ratio, error = drawn(law, workers, 500, 0).amplification(step, lags)
    assert ratio[0, 0] == 1.0
    assert abs(ratio[1, 0] - server / without) < 4 * error[1, 0] < 0.2
    fixed, none = drawn(ConstantPlusGeometric(7), 8, 500, 0).amplification(np.array([0.15]), lags)
    assert fixed == pytest.approx(1.0)
    assert none == pytest.approx(0.0, abs=1e-12)
    assert drawn(law, workers, 500, 0).amplification(np.array([0.6]), lags)[0][1, 0] > 3


def test_lag_noise_on_a_quadratic_is_that_of_the_recursion_of_the_server() -> None:
    """The recorded updates go from the start, where the mean moves, to the stationary state."""
    record = np.array([0, 8, 20, 50, 200])
    given = {"batch_size": 2, "initial": np.array([3.0]), "record": record}
    law, reads = Geometric(7 / 8), drawn(Geometric(7 / 8), 8, 200, 0)
    curve = linear_noise(Quadratic(), 0.13, law, 0, reads=reads, **given)
    exact = server_moments(2.0, 2.0, 0.13, 8, 200, initial=3.0)
    loss = exact.mean[record] ** 2 + exact.variance[record]
    assert np.all(np.abs(curve.mean - loss) <= 4 * curve.mean_error + 1e-9)
    # Without lag noise at least a tenth of the loss is missing.
    without = linear_noise(Quadratic(), 0.13, law, 0, **given).mean
    assert np.all(without[1:] < 0.9 * loss[1:])
    assert np.all(curve.mean_error[1:] < 0.05 * loss[1:])


def test_lag_noise_in_many_dimensions_from_few_directions() -> None:
    """Two hundred modes share a hundred curvatures, and the moments of each mode are known."""
    record, problem = np.array([0, 20, 60]), wide(200)
    law, reads = Geometric(7 / 8), drawn(Geometric(7 / 8), 8, 60, 1)
    given = {"batch_size": 1, "initial": np.ones(200), "record": record}
    curve = linear_noise(problem, 0.3, law, 0, reads=reads, **given)
    without = linear_noise(problem, 0.3, law, 0, **given)
    loss = np.zeros(3)
    for each in problem.curvature[:100]:
        mode = server_moments(each, 0.01**2, 0.3, 8, 60)
        loss += each * (mode.mean[record] ** 2 + mode.variance[record])
    missing = loss - without.mean
    assert np.all(np.abs(curve.mean - loss) < 4 * curve.mean_error + 0.01 * missing + 1e-9)
    assert np.all(missing[1:] > 8 * curve.mean_error[1:])


def test_a_mean_path_that_stays_at_the_minimum() -> None:
    """The gradient never changes, so lags give no direction; only the samples add noise."""
    given = {"batch_size": 1, "initial": np.zeros(200), "record": np.array([0, 20])}
    reads, law = drawn(Geometric(7 / 8), 8, 20, 0), Geometric(7 / 8)
    curve = linear_noise(wide(200), 0.05, law, 0, reads=reads, **given)
    assert 0 < curve.mean[1] < 0.01


def test_a_mean_path_that_grows_to_infinity_raises_nothing() -> None:
    """Its Hessian is no longer finite, which once raised `Eigenvalues did not converge`."""
    record = np.array([0, 20, 100])
    problem = PhaseRetrieval()
    initial = problem.initial_point(stream(0, ""))
    law = NegativeBinomial(0.5, 0.5 / 7.5)
    curve = linear_noise(problem, 3.0, law, 0, batch_size=4, initial=initial, record=record)
    assert not np.isfinite(curve.mean[-1])


@pytest.mark.parametrize(
    ("times", "share", "refused"),
    [
        ("exponential", 0.1, False),
        ("exponential", 0.2, False),
        ("exponential", 0.4, True),
        ("exponential", 0.95, True),
        ("lognormal 1", 0.2, False),
        ("lognormal 1", 0.65, True),
    ],
)
def test_fast_is_right_or_refuses_where_lags_are_random(
    times: str, share: float, refused: bool
) -> None:
    """On a tanh network at 0.65 of the limit it was once 26 % off, and 11 % with lag noise."""
    problem, server = TanhNetwork(), compute_times(times, 8)
    limit = stability_limits(server).mean_square
    assert limit is not None
    setting = Setting(
        problem=problem,
        initial=problem.initial_point(stream(0, "")),
        learning_rate=share * limit.value / curvature("tanh network"),
        batch_size=20,
        record=np.array([0, 8, 14, 25, 50, 100, 200]),
        law=server_staleness(ServerTimes(server), 200_000),
        closure="pool",
        workers=8,
    )
    curve = LAW.fast(setting, 0)
    if refused:
        assert curve.unstable_from is not None
        assert not np.isfinite(curve.mean[-1])
        return
    paths = 400
    (simulated,) = simulate([LAW.path_model(setting, 0)], setting, paths, 0)
    error_of_mean = simulated.loss_std[1:] / np.sqrt(paths)
    off = np.abs(curve.mean - simulated.loss_mean)[1:]
    assert np.all(off < 3 * error_of_mean + 0.015 * simulated.loss_mean[1:])
    assert np.all(error_of_mean < 0.01 * simulated.loss_mean[1:])


@pytest.mark.parametrize(("share", "refused"), [(0.1, False), (0.2, False), (0.3, True)])
def test_fast_is_right_or_refuses_where_curvature_vanishes(share: float, refused: bool) -> None:
    """At the flat minimum of x^4/4 the noise is not small, though lags hardly amplify it."""
    problem, workers = Quartic(initial=1.5, noise=0.5), 8
    law = Geometric(1 - 1 / workers)
    limit = stability_limits(law).mean_square
    assert limit is not None
    eta = share * limit.value / curvature("quartic")
    given = {"batch_size": 4, "initial": np.array([1.5]), "record": np.arange(0, 601, 100)}
    curve = linear_noise(problem, eta, law, 0, **given)
    if refused:
        assert curve.unstable_from is not None
        return
    assert curve.unstable_from is None
    drawn = sme_law(problem, eta, law, 600, 1000, 1, closure="pool", workers=workers, **given)
    error = drawn.loss_std[1:] / np.sqrt(1000)
    off = np.abs(curve.mean - drawn.loss_mean)[1:]
    assert np.all(off < 3 * error + 0.08 * drawn.loss_mean[1:])
    assert np.all(error < 0.04 * drawn.loss_mean[1:])
