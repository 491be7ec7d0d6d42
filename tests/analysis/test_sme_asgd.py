import os
import threading

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from analysis.exact.moments import asgd_moments
from analysis.models.descent import Descent
from analysis.models.langevin import SmeLangevin, sme_langevin, sme_msgd
from analysis.models.sme_asgd import SmeAsgd, sme_asgd
from analysis.models.sme_sgd import sme_sgd
from asgd.errors import InputError
from asgd.problems.base import Problem
from asgd.problems.linear import LeastSquares, Logistic
from asgd.problems.scalar import Quadratic
from asgd.streams import stream

PATHS = 20_000
# f = x^2, V = 4 x^2 + 4, x_0 = 1: (eta, mu, k, E x_k, E x_k^2)
CHECK_VALUES = [
    (0.02, 0.75, 25, 0.3131, 0.1187),
    (0.02, 0.75, 400, 0.0, 0.02287),
    (0.05, 0.90, 25, -0.2749, 0.1879),
    (0.05, 0.90, 400, 0.0, 0.1025),
]
SCALAR_MODELS = {
    "native": lambda *a, **k: sme_asgd(*a, noise="matrix", **k),
    "two_point": lambda *a, **k: sme_asgd(*a, noise="two_point", **k),
    "samples": lambda *a, **k: sme_asgd(*a, noise="samples", **k),
    "langevin": sme_langevin,
}


def standard_scores(samples, expected, rounding=0.0):
    error = samples.std(axis=0) / np.sqrt(len(samples)) + rounding
    return np.abs(samples.mean(axis=0) - expected) / error


def final(model, *arguments, updates, seed=1, paths=PATHS, **options):
    options = {"record": [updates], "quantile_levels": ()} | options
    return model(*arguments, updates, paths, seed, **options).final


def small_least_squares(dim):
    rng = stream(3, f"least squares/{dim}")
    features = rng.standard_normal((15, dim))
    return LeastSquares(features, features.sum(axis=1) + rng.standard_normal(15), 0.05)


def small_logistic():
    rng = stream(3, "logistic")
    return Logistic(3 * rng.standard_normal((12, 2)), rng.integers(2, size=12).astype(float), 0.1)


@pytest.mark.parametrize("name", SCALAR_MODELS)
@pytest.mark.parametrize(("eta", "mu", "k", "mean", "second_moment"), CHECK_VALUES)
def test_check_values(name, eta, mu, k, mean, second_moment):
    x = final(SCALAR_MODELS[name], Quadratic(), eta, mu, updates=k)
    assert standard_scores(x, mean, 5e-5) < 4
    assert standard_scores(x * x, second_moment, 5e-5) < 4


@pytest.mark.parametrize("noise", ["matrix", "samples", "two_point"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("updates", [6, 60])
def test_exact_moments_in_several_dimensions(noise, batch, updates):
    problem, eta, mu = small_least_squares(3), 0.08, 0.7
    start = np.array([2.0, -1.0, 0.5])
    exact = asgd_moments(problem, eta, mu, updates, batch_size=batch, initial=start)
    x = final(
        sme_asgd,
        problem,
        eta,
        mu,
        updates=updates,
        paths=4_000,
        batch_size=batch,
        noise=noise,
        initial=start,
    )
    assert standard_scores(x, exact.mean[-1]).max() < 4
    products = x[:, :, None] * x[:, None, :]
    assert standard_scores(products, exact.second_moment[-1]).max() < 4


def test_no_matrices_in_many_dimensions():
    problem, eta, mu, updates = small_least_squares(12), 0.02, 0.8, 40
    exact = asgd_moments(problem, eta, mu, updates)
    x = final(sme_asgd, problem, eta, mu, updates=updates, paths=4_000)
    assert standard_scores(x, exact.mean[-1]).max() < 4
    assert standard_scores(x * x, np.diagonal(exact.second_moment[-1])).max() < 4


def test_schedules():
    updates = 40
    eta = np.linspace(0.08, 0.01, updates)
    batch = np.repeat([1, 8], updates // 2)
    exact = asgd_moments(Quadratic(), eta, 0.8, updates, batch_size=batch, initial=np.ones(1))
    for noise in ("matrix", "samples"):
        x = final(sme_asgd, Quadratic(), eta, 0.8, updates=updates, batch_size=batch, noise=noise)
        assert standard_scores(x, exact.mean[-1]) < 4
        assert standard_scores(x * x, exact.second_moment[-1, 0]) < 4


def test_no_staleness_is_sgd():
    stale = sme_asgd(Quadratic(), 0.05, 0.0, 50, PATHS, 1)
    exact = asgd_moments(Quadratic(), 0.05, 0.0, 50, initial=np.ones(1))
    assert standard_scores(stale.final**2, exact.second_moment[-1, 0]) < 4
    native = sme_sgd(Quadratic(), 0.05, 50, PATHS, 2, native=True)
    assert standard_scores(native.final**2, exact.second_moment[-1, 0]) < 4


@pytest.mark.parametrize("substeps", [1, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_langevin_form_is_the_nonlinear_form_for_linear_gradients(batch, substeps):
    """(L1) with (L3) gives, from the same numbers z, the same iterate as (S1)-(S3)."""
    problem, updates, mu = small_least_squares(2), 50, 0.8
    schedules = np.full(updates, 0.05), np.full(updates, float(batch))
    start = np.ones((20, 2))
    descent, options = Descent(problem, *schedules), {"noise": "matrix", "substeps": substeps}
    native = SmeAsgd(descent, mu, start.copy(), stream(8, "z"), **options)
    langevin = SmeLangevin(descent, mu, start.copy(), stream(8, "z"), **options)
    for k in range(updates):
        native.step(k)
        langevin.step(k)
    assert np.abs(native.position() - start).max() > 0.1
    np.testing.assert_allclose(native.position(), langevin.position(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("substeps", [1, 5])
@pytest.mark.parametrize("problem", [small_logistic(), small_least_squares(3)])
def test_explicit_sigma_is_the_closed_one(problem, substeps):
    """(S4) and (S3) give the same paths, also for nonlinear gradients."""
    updates, mu, seed = 30, 0.8, 4
    matrix, explicit = (
        final(
            sme_asgd,
            problem,
            0.05,
            mu,
            updates=updates,
            paths=50,
            seed=seed,
            noise=noise,
            substeps=substeps,
        )
        for noise in ("matrix", "explicit")
    )
    assert matrix.std() > 0.01
    np.testing.assert_allclose(explicit, matrix, rtol=1e-9, atol=1e-10)


def test_sub_steps_approach_the_solution_of_the_moment_equations():
    """The equations are (B1), extended by h = E_l f'^2 for the noise of the random lag.

    Its noise is eta^{3/2} (1-mu)^{-1/2} (s^2 + h - (1-mu)/eta E Y^2), and
    dh = kappa (a^2 E X^2 - h) dt.
    """
    eta, mu, updates, a, s2 = 0.2, 0.5, 7, 2.0, 4.0
    kappa, dt = np.sqrt((1 - mu) / eta), np.sqrt(eta * (1 - mu))

    def flow(_, state):
        xx, xy, yy, h = state
        noise = eta**1.5 / np.sqrt(1 - mu) * (s2 + h - kappa**2 * yy)
        return [
            2 * xy + noise,
            yy - a * xx - kappa * xy,
            -2 * a * xy - 2 * kappa * yy,
            kappa * (a * a * xx - h),
        ]

    y = -a / kappa
    state = [1.0, y, y * y, a * a]
    exact = solve_ivp(flow, (0, updates * dt), state, rtol=1e-10, atol=1e-12).y[0, -1]
    runs = [
        final(sme_asgd, Quadratic(), eta, mu, updates=updates, paths=60_000, seed=m, substeps=m)
        for m in (8, 16)
    ]
    coarse, fine = ((x * x).mean() for x in runs)
    coarse_error, fine_error = ((x * x).std() / np.sqrt(len(x)) for x in runs)
    error = np.hypot(2 * fine_error, coarse_error)
    native = asgd_moments(Quadratic(), eta, mu, updates).second_moment[-1, 0, 0]
    assert abs(native - exact) > 8 * error  # the native scheme would not pass
    assert abs(2 * fine - coarse - exact) < 4 * error


@pytest.mark.parametrize("mu", [0.75, 0.9])
def test_temperatures(mu):
    """Proposition 2, f = x^2, s^2 = 4: momentum and expected read have one stationary variance."""
    eta, updates = 0.02, 400
    continuous = eta * 4 / 2 / 2  # T / a
    # with one step for each update: the stationary variance of momentum SGD
    native = continuous / (1 - (1 - mu) * eta / (1 + mu))
    momentum = (sme_msgd, Quadratic(), (1 - mu) * eta, mu)
    read = (sme_langevin, Quadratic(), eta, mu)
    options = {"lag_noise": False, "expected_read": True}
    for substeps, expected in ((1, native), (8, continuous)):
        x = final(*momentum, updates=updates, substeps=substeps)
        assert standard_scores(x * x, expected) < 4
        m = final(*read, updates=updates, substeps=substeps, **options)
        assert standard_scores(m * m, expected) < 4


def test_second_order_drift_of_sgd():
    """(S6) on f = x^2 has rate 2 + 2 eta, so its mean and variance are known at any time."""
    eta, updates = 0.1, 30
    rate = 2 + 2 * eta
    mean = np.exp(-rate * eta * updates)
    variance = 4 * eta / (2 * rate) * (1 - mean**2)
    x = final(sme_sgd, Quadratic(), eta, updates=updates, substeps=8)
    assert standard_scores(x, mean) < 4
    assert standard_scores(x * x, variance + mean**2) < 4


@pytest.mark.parametrize("general", [False, True])
def test_second_order_drift_in_several_dimensions(general):
    """The mean decays by exp(-(A + eta A^2/2) t); also with the general Hessian product."""
    problem, eta, updates = small_least_squares(3), 0.15, 12
    if general:
        problem.hessian_vector = Problem.hessian_vector.__get__(problem)
    start, hessian = np.array([2.0, -1.0, 0.5]), problem.hessian(np.zeros(3))
    rest = np.linalg.solve(hessian, -problem.gradient(np.zeros(3)))
    values, vectors = np.linalg.eigh(hessian)
    decay = np.exp(-(values + eta * values**2 / 2) * eta * updates)
    mean = rest + vectors @ (decay * (vectors.T @ (start - rest)))
    x = final(
        sme_sgd,
        problem,
        eta,
        updates=updates,
        paths=4_000,
        initial=start,
        batch_size=10,
        substeps=4,
    )
    assert standard_scores(x, mean).max() < 4


def test_float32_changes_less_than_the_standard_error():
    single, double = (
        sme_asgd(Quadratic(), 0.05, 0.8, 100, PATHS, 4, record=[100], dtype=dtype)
        for dtype in (np.float32, np.float64)
    )
    assert single.final.dtype == np.float32
    error = np.hypot(single.loss_std, double.loss_std) / np.sqrt(PATHS)
    assert np.all(np.abs(single.loss_mean - double.loss_mean) < 4 * error)


class Watched(Quadratic):
    """Records the threads that ask for gradients; none goes on before `expected` have asked."""

    def __init__(self, expected):
        super().__init__()
        self.threads = set()
        self.begin = threading.Barrier(expected, timeout=60)

    def gradient(self, x, indices=None):
        thread = threading.get_ident()
        if thread not in self.threads:
            self.threads.add(thread)
            self.begin.wait()
        return super().gradient(x, indices)


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({"noise": "two_point"}, 1),
        ({"dtype": np.float32}, 1),
        ({"noise": "two_point", "threads": 2}, 2),
        ({"dtype": np.float32, "threads": 2}, 2),
        ({}, min(2, len(os.sched_getaffinity(0)))),
    ],
)
def test_short_updates_stay_on_one_thread(options, used):
    problem = Watched(used)
    sme_asgd(problem, 0.05, 0.8, 100, 20_000, 0, quantile_levels=(), **options)
    assert len(problem.threads) == used


def test_threads_and_seed():
    runs = [
        sme_asgd(Quadratic(), 0.05, 0.8, 20, 45_000, seed, threads=threads)
        for seed, threads in ((1, 1), (1, 2), (2, 2))
    ]
    np.testing.assert_array_equal(runs[0].loss_quantiles, runs[1].loss_quantiles)
    np.testing.assert_array_equal(runs[0].final, runs[1].final)
    assert np.all(runs[1].final != runs[2].final)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: sme_asgd(p, 0.1, 1.0, 5, 5, 0), "mu = 1.0: expected a number >= 0 and < 1"),
        (lambda p: sme_asgd(p, -0.1, 0.5, 5, 5, 0), "learning_rate = -0.1: expected positive"),
        (lambda p: sme_asgd(p, 0.1, 0.5, 5, 5, 0, substeps=0), "substeps = 0"),
        (
            lambda p: sme_asgd(p, 0.1, 0.5, 5, 5, 0, batch_size=[1, 2]),
            r"batch_size\.shape = \(2,\)",
        ),
        (lambda p: sme_sgd(p, 0.1, 5, 5, 0, native=True, substeps=2), "substeps = 2"),
        (lambda p: sme_msgd(p, 0.1, 1.5, 5, 5, 0), "momentum = 1.5"),
        (lambda p: sme_langevin(p, 0.1, -0.5, 5, 5, 0), "mu = -0.5"),
    ],
)
def test_unusable_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call(Quadratic())
