import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.optimize import minimize

from analysis.exact.batch_schedule import (
    FinalLoss,
    decay_rate,
    minimise_final_loss,
    optimal_batch_schedule,
    stationary_loss,
    uniform_schedule,
)
from analysis.exact.linear_gradients import LinearGradients
from analysis.exact.moments import asgd_moments, expected_loss
from asgd.config.tables import ProblemConfig
from asgd.errors import InputError
from asgd.problems.linear import LeastSquares
from asgd.problems.make import make_problem
from asgd.problems.scalar import Quadratic
from asgd.streams import stream
from tests.support.exact import moment_ode


def small_least_squares():
    rng = stream(1, "small least squares")
    features = rng.standard_normal((12, 3)) * [2.0, 0.7, 0.3]
    return LeastSquares(features, features @ [1.0, -2.0, 0.5] + rng.standard_normal(12), l2=0.01)


@pytest.mark.parametrize(("eta", "mu"), [(0.01, 0.8), (0.05, 0.9)], ids=["real", "complex"])
def test_moment_equations_have_their_eigenvalues_and_stationary_solution(eta, mu):
    ode = moment_ode(2.0, 4.0, eta, mu, batch_size=3)
    found = np.poly(np.linalg.eigvals(ode.matrix))
    np.testing.assert_allclose(np.poly(ode.eigenvalues), found, rtol=1e-9)
    np.testing.assert_allclose(ode.matrix @ ode.stationary + ode.forcing, 0.0, atol=1e-12)
    # (B2) and (B3) follow from the same system
    assert decay_rate(2.0, eta, mu) == pytest.approx(-ode.eigenvalues.real.max())
    assert stationary_loss(2.0, 4.0, eta, mu) / 3 == pytest.approx(ode.stationary[0])


def test_moment_equations_approach_the_discrete_moments_at_least_as_fast_as_dt():
    errors = []
    for eta in (0.02, 0.005):
        mu, updates = 0.75, round(6 / np.sqrt(eta * 0.25))
        ode = moment_ode(2.0, 4.0, eta, mu)
        y = -np.sqrt(eta / (1 - mu)) * 2.0
        times = np.sqrt(eta * (1 - mu)) * np.arange(updates + 1)
        path = solve_ivp(
            lambda _, s, ode=ode: ode.matrix @ s + ode.forcing,
            (0, times[-1]),
            [1.0, y, y * y],
            t_eval=times,
            rtol=1e-9,
            atol=1e-12,
        ).y[0]
        exact = asgd_moments(Quadratic(), eta, mu, updates).second_moment[:, 0, 0]
        errors.append(np.abs(path - exact).max())
    # a quarter of eta is half of dt
    assert np.log2(errors[0] / errors[1]) > 0.7
    assert errors[1] < 0.02


def test_closed_schedule_equals_independently_computed_values():
    schedule = optimal_batch_schedule(2.0, 4.0, 0.01, 0.8, 400, sample_cost=1e-5)
    assert (schedule[0], schedule[-1], schedule.sum()) == (1, 33, 1659)
    final = {}
    for name, batch in {"closed": schedule, "uniform": uniform_schedule(400, 2000)}.items():
        moments = asgd_moments(Quadratic(), 0.01, 0.8, 400, batch_size=batch)
        final[name] = moments.second_moment[-1, 0, 0]
    assert final["closed"] == pytest.approx(6.8e-4, abs=0.5e-5)
    assert final["uniform"] == pytest.approx(2.2e-3, abs=0.5e-4)


def test_closed_schedule_stays_at_one_until_its_switching_time():
    eta, mu, cost = 0.01, 0.8, 1e-5
    schedule = optimal_batch_schedule(2.0, 4.0, eta, mu, 400, sample_cost=cost)
    rho = decay_rate(2.0, eta, mu)
    before_end = np.log(rho * stationary_loss(2.0, 4.0, eta, mu) / cost) / rho
    switch = 400 - before_end / np.sqrt(eta * (1 - mu))
    # rounded batch sizes grow once the schedule passes 1.5
    late = np.log(1.5) * 2 / rho / np.sqrt(eta * (1 - mu))
    assert np.flatnonzero(schedule > 1)[0] == pytest.approx(switch + late, abs=1.5)
    assert np.all(np.diff(schedule) >= 0)


def test_closed_schedule_in_many_dimensions_takes_slowest_rate_and_summed_noise():
    curvature, noise = np.array([5.0, 0.8, 2.0]), np.array([1.0, 3.0, 2.0])
    assert decay_rate(curvature, 0.02, 0.8) == decay_rate(0.8, 0.02, 0.8)
    each = [stationary_loss(a, s, 0.02, 0.8) for a, s in zip(curvature, noise, strict=True)]
    assert stationary_loss(curvature, noise, 0.02, 0.8) == pytest.approx(sum(each))
    many = optimal_batch_schedule(curvature, noise, 0.02, 0.8, 200, budget=1000)
    slowest = optimal_batch_schedule(0.8, 3.0, 0.02, 0.8, 200, budget=1000)
    np.testing.assert_array_equal(many, slowest)


SETTINGS = {
    "real": (Quadratic(), 0.01, 0.8, 400, 2000),
    "no staleness": (Quadratic(), 0.02, 0.0, 200, 1000),
    "flat": (Quadratic(0.5, 1.0, 3.0), 0.1, 0.5, 150, 1200),
    "complex": (Quadratic(), 0.05, 0.9, 200, 1000),
    "complex and slow": (Quadratic(), 0.01, 0.95, 300, 1500),
    "complex and steep": (Quadratic(10.0, 3.0), 0.05, 0.8, 100, 500),
    "complex and few": (Quadratic(), 0.1, 0.875, 100, 130),
    "least squares": (small_least_squares(), 0.05, 0.8, 100, 500),
    "diabetes": (make_problem(ProblemConfig(kind="least_squares")), 0.05, 0.75, 200, 2000),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_optimum_beats_closed_and_uniform_schedules_of_equal_budget(name):
    problem, eta, mu, updates, budget = SETTINGS[name]
    final_loss = FinalLoss(problem, eta, mu)
    plan = minimise_final_loss(final_loss, updates, budget)
    modes = LinearGradients.of(problem).modes()
    others = {
        "closed": optimal_batch_schedule(*modes, eta, mu, updates, budget=budget),
        "uniform": uniform_schedule(updates, budget),
    }
    for batch in (plan.batch_size, *others.values()):
        assert batch.sum() == budget
        assert batch.min() >= 1
    assert plan.final_loss == final_loss.value(plan.batch_size)
    # rounding to integers costs more where most batches are one
    rounding = 0.005 if budget >= 4 * updates else 0.03
    assert plan.lower_bound <= plan.final_loss <= (1 + rounding) * plan.lower_bound
    for batch in others.values():
        assert plan.final_loss < final_loss.value(batch)


def test_closed_schedule_loses_to_uniform_under_strong_oscillation():
    problem, eta, mu, updates, budget = SETTINGS["complex and steep"]
    final_loss = FinalLoss(problem, eta, mu)
    modes = LinearGradients.of(problem).modes()
    closed = optimal_batch_schedule(*modes, eta, mu, updates, budget=budget)
    ratio = final_loss.value(closed) / final_loss.value(uniform_schedule(updates, budget))
    assert ratio == pytest.approx(1.064, abs=0.005)


def test_settings_include_complex_and_real_eigenvalues():
    slowest = {
        name: moment_ode(LinearGradients.of(p).modes()[0].max(), 1.0, eta, mu).eigenvalues[2]
        for name, (p, eta, mu, _, _) in SETTINGS.items()
    }
    assert {name for name in slowest if slowest[name].imag == 0} == {"real", "no staleness", "flat"}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.floats(0.01, 0.2),
    st.floats(0.0, 0.95),
    st.integers(1, 60),
    st.floats(1.0, 6.0),
    st.sampled_from([Quadratic(), small_least_squares()]),
)
def test_optimum_is_never_worse_than_closed_or_uniform(eta, mu, updates, average, problem):
    budget = int(updates * average)
    final_loss = FinalLoss(problem, eta, mu)
    plan = minimise_final_loss(final_loss, updates, budget)
    assert plan.batch_size.sum() == budget
    modes = LinearGradients.of(problem).modes()
    closed = optimal_batch_schedule(*modes, eta, mu, updates, budget=budget)
    for batch in (closed, uniform_schedule(updates, budget)):
        assert plan.final_loss <= final_loss.value(batch) * (1 + 1e-12)


def test_final_loss_is_that_of_the_moments_and_its_weights_are_derivatives():
    problem = small_least_squares()
    final_loss = FinalLoss(problem, 0.05, 0.8)
    batch = stream(0, "batches").uniform(1, 5, 30)
    moments = asgd_moments(problem, 0.05, 0.8, 30, batch_size=batch)
    least = problem.loss(LinearGradients.of(problem).minimiser)
    value, weights = final_loss.value_and_weights(batch)
    assert value == pytest.approx(expected_loss(problem, moments)[-1] - least, rel=1e-10)
    for k in (0, 13, 29):
        up, down = 1 / batch, 1 / batch
        up[k] += 1e-5
        down[k] -= 1e-5
        slope = (final_loss.value(1 / up) - final_loss.value(1 / down)) / 2e-5
        assert weights[k] == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", ["complex and steep", "least squares"])
def test_general_optimiser_finds_the_same_loss(name):
    problem, eta, mu, _, _ = SETTINGS[name]
    final_loss, updates, budget = FinalLoss(problem, eta, mu), 25, 90
    scale = final_loss.value(uniform_schedule(updates, budget))
    found = minimize(
        lambda b: final_loss.value(b) / scale,
        np.full(updates, budget / updates),
        jac=lambda b: -final_loss.value_and_weights(b)[1] / b**2 / scale,
        method="SLSQP",
        bounds=[(1, None)] * updates,
        constraints={"type": "eq", "fun": lambda b: b.sum() - budget},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert found.success
    plan = minimise_final_loss(final_loss, updates, budget)
    assert plan.lower_bound == pytest.approx(found.fun * scale, rel=1e-6)


def test_without_noise_the_optimum_is_the_lower_bound():
    plan = minimise_final_loss(FinalLoss(Quadratic(noise=0.0), 0.05, 0.5), 10, 25)
    assert plan.batch_size.sum() == 25
    assert plan.final_loss == pytest.approx(plan.lower_bound)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 9}, "budget = 9: expected at least one gradient per update, 10"),
        ({}, "expected exactly one of them"),
        ({"budget": 20, "sample_cost": 1.0}, "expected exactly one of them"),
        ({"sample_cost": 0.0}, "sample_cost = 0.0"),
        ({"budget": 20, "mu": 1.0}, "mu = 1.0"),
        ({"budget": 20, "curvature": -1.0}, "curvature = -1.0"),
    ],
)
def test_unusable_input_is_named(arguments, message):
    good = {"curvature": 2.0, "noise_variance": 4.0, "learning_rate": 0.1, "mu": 0.5, "updates": 10}
    with pytest.raises(InputError, match=message):
        optimal_batch_schedule(**(good | arguments))


@pytest.mark.parametrize("budget", [1, 7, 49])
def test_a_single_update_gets_the_whole_budget(budget):
    plan = minimise_final_loss(FinalLoss(Quadratic(), 0.05, 0.8), 1, budget)
    assert plan.batch_size.tolist() == [budget]
    closed = optimal_batch_schedule(2.0, 4.0, 0.05, 0.8, 1, budget=budget)
    assert closed.tolist() == [budget]
