"""Points that the paper leaves open or states too broadly, each checked by independent code."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import solve_continuous_lyapunov

from analysis.exact.batch_schedule import FinalLoss, decay_rate, optimal_batch_schedule
from analysis.exact.linear_gradients import LinearGradients
from analysis.exact.moments import asgd_moments
from analysis.models.discrete import asgd_iid
from analysis.paper.fig3 import settings
from asgd.problems.scalar import Quadratic
from asgd.staleness.geometric import Geometric

HESSIAN = np.diag([1.0, 4.0])


def turned(angle: float) -> np.ndarray:
    """Return a noise covariance of eigenvalues 1 and 4, rotated against the Hessian."""
    c, s = np.cos(angle), np.sin(angle)
    basis = np.array([[c, -s], [s, c]])
    return basis @ np.diag([1.0, 4.0]) @ basis.T


def stationary_current(noise: np.ndarray, friction: float) -> np.ndarray:
    """Return the stationary E m q^T of (L1) divided by the temperature eta tr(Sigma) / (2 d)."""
    drift = np.block([[np.zeros((2, 2)), np.eye(2)], [-HESSIAN, -friction * np.eye(2)]])
    forcing = np.zeros((4, 4))
    forcing[2:, 2:] = 2 * friction * noise  # in units of eta / 2
    covariance = solve_continuous_lyapunov(drift, -forcing)
    return covariance[:2, 2:] / (np.trace(noise) / 2)


def test_density_7_needs_hessian_and_noise_that_commute() -> None:
    """If they do not, the stationary position and momentum are correlated: a current."""
    np.testing.assert_allclose(stationary_current(turned(0.0), 1.0), np.zeros((2, 2)), atol=1e-12)
    current = stationary_current(turned(0.6), 1.0)
    np.testing.assert_allclose(current, [[0, 0.1766], [-0.1766, 0]], atol=1e-4)


def test_momentum_sgd_itself_has_the_current() -> None:
    """The noise is Gaussian, the friction is 1, and position and velocity start at 0."""
    eta, mu, paths, updates = 0.02, 0.98, 4_000, 600
    rng, root = np.random.default_rng(0), np.linalg.cholesky(turned(0.6))
    m, v = np.zeros((paths, 2)), np.zeros((paths, 2))
    antisymmetric = np.zeros(paths)
    for k in range(updates):
        noise = rng.standard_normal((paths, 2)) @ root.T
        v = mu * v - (1 - mu) * eta * (m @ HESSIAN + noise)
        middle, m = m + v / 2, m + v
        if k >= updates // 2:
            antisymmetric += middle[:, 0] * v[:, 1] - middle[:, 1] * v[:, 0]
    temperature = eta * np.trace(turned(0.6)) / 4
    each = antisymmetric / (updates // 2) / np.sqrt(eta * (1 - mu)) / temperature
    error = each.std() / np.sqrt(paths)
    assert each.mean() == pytest.approx(2 * 0.1766, abs=4 * error + 0.02)
    assert each.mean() > 4 * error


def test_the_rate_of_convergence_is_not_the_temperature() -> None:
    """A hundred times the temperature gives the same rate, because (B2) contains no s."""
    eta, mu, rates = 0.02, 0.5, []
    for noise in (1.0, 10.0):
        second = asgd_moments(Quadratic(2.0, noise), eta, mu, 2_000).second_moment[:, 0, 0]
        excess = second[[150, 200]] - second[-1]
        rates.append(float(np.log(excess[0] / excess[1]) / 50))
    assert rates[0] == pytest.approx(rates[1], rel=1e-5)
    per_update = decay_rate(2.0, eta, mu) * np.sqrt(eta * (1 - mu))
    assert rates[0] == pytest.approx(per_update, rel=0.05)


def second_moment(eta: float, mu: float, batch: int, updates: int, *, divided: bool) -> float:
    """Return E x^2 on f = x^2, V = 4 x^2 + 4, with the lag noise divided by b, (18), or not."""
    a, s2 = 2.0, 4.0
    xx = xm = mm = n = 1.0
    for _ in range(updates):
        lag = a * a * (n - mm) / (batch if divided else 1)
        moved = xm - eta * a * mm
        xx = xx - 2 * eta * a * xm + eta**2 * (a * a * mm + lag + s2 / batch)
        xm = mu * moved + (1 - mu) * xx
        mm = mu**2 * mm + 2 * mu * (1 - mu) * moved + (1 - mu) ** 2 * xx
        n = mu * n + (1 - mu) * xx
    return xx


@pytest.mark.parametrize(
    ("eta", "mu", "batch", "ratio"),
    [(0.05, 0.9, 4, 0.915), (0.1, 0.9, 16, 0.520), (0.2, 0.875, 64, 0.067)],
)
def test_18_understates_the_noise_of_a_mini_batch(
    eta: float, mu: float, batch: int, ratio: float
) -> None:
    exact = second_moment(eta, mu, batch, 60, divided=False)
    assert second_moment(eta, mu, batch, 60, divided=True) / exact == pytest.approx(ratio, abs=5e-4)
    x = asgd_iid(
        Quadratic(), eta, Geometric(mu), 60, 40_000, 0, batch_size=batch, quantile_levels=()
    ).final
    error = np.std(x * x) / np.sqrt(len(x))
    assert abs(np.mean(x * x) - exact) < 4 * error
    if ratio < 0.9:
        assert ratio * exact < exact - 4 * error


def second_moment_of_sme_sgd(mu: float, *, stale: bool) -> np.ndarray:
    """Return E X^2 of (S6) on fig1's problem, its Sigma averaged over staleness or not."""
    eta, updates, a, s2 = 0.05, 80, 2.0, 4.0
    pull, relax = a + eta * a * a / 2, (1 - mu) / eta

    def flow(_: float, state: np.ndarray) -> list[float]:
        xx, xm, mm, n = state
        sigma = s2 + (a * a * (n - mm) if stale else 0.0)
        return [
            -2 * pull * xx + eta * sigma,
            -pull * xm + relax * (xx - xm),
            2 * relax * (xm - mm),
            relax * (xx - n),
        ]

    time = eta * np.arange(updates + 1)
    return solve_ivp(flow, (0, time[-1]), [1.0] * 4, t_eval=time, rtol=1e-9, atol=1e-12).y[0]


@pytest.mark.parametrize(
    ("mu", "with_it", "without"),
    [(0.5, 0.0238, 0.0233), (0.75, 0.0547, 0.0538), (0.9, 0.1304, 0.1352)],
)
def test_staleness_in_the_sigma_of_sme_sgd_does_not_help(
    mu: float, with_it: float, without: float
) -> None:
    exact = asgd_moments(Quadratic(), 0.05, mu, 80).second_moment[:, 0, 0]
    for stale, error in ((True, with_it), (False, without)):
        found = np.abs(second_moment_of_sme_sgd(mu, stale=stale) - exact).max()
        assert found == pytest.approx(error, abs=1e-4)


def test_a_schedule_that_grows_earlier_beats_the_closed_form_where_delay_oscillates() -> None:
    """The schedule grows at half the rate of (B4) and starts earlier, at equal budget."""
    ratios = {}
    for setting in settings()[:3]:
        updates, budget = setting.updates, setting.budget
        eta, mu = setting.learning_rate, setting.mu
        modes = LinearGradients.of(setting.problem).modes()
        closed = optimal_batch_schedule(*modes, eta, mu, updates, budget=budget)
        rate = decay_rate(modes[0], eta, mu) * np.sqrt(eta * (1 - mu))
        growth = np.exp(-rate * np.arange(updates, 0, -1) / 4)
        low, high = 0.0, 1e9
        for _ in range(100):
            middle = (low + high) / 2
            spent = np.maximum(1.0, middle * growth).sum()
            low, high = (middle, high) if spent < budget else (low, middle)
        earlier = np.maximum(1.0, low * growth)
        assert earlier.sum() == pytest.approx(budget)
        assert np.argmax(earlier > 1) < np.argmax(closed > 1)
        loss = FinalLoss(setting.problem, eta, mu)
        ratios[setting.name] = loss.value(earlier) / loss.value(closed)
    assert ratios["real eigenvalues"] == pytest.approx(1.22, abs=0.01)
    assert ratios["complex eigenvalues"] == pytest.approx(1.28, abs=0.01)
    assert ratios["strong oscillation"] == pytest.approx(0.76, abs=0.01)
