import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.exact.stability import (
    max_stable_learning_rate,
    spectral_radius,
)
from analysis.profile.queueing import ServerTimes, server_staleness
from asgd.delays import ComputeTime
from asgd.errors import InputError
from asgd.staleness.counts import NegativeBinomial, Poisson
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric, GeometricMixture
from asgd.staleness.law import StalenessLaw
from tests.support.exact import impulse_response

LAWS = [
    Geometric(0.875),
    Poisson(7.0),
    Poisson(0.3),
    ConstantPlusGeometric(7),
    ConstantPlusGeometric(3, 0.5),
    NegativeBinomial(3.0, 0.7),
    GeometricMixture((0.9, 0.5), (0.3, 0.7)),
]


def companion_radius(law, step):
    weights = law.weights(law.support_length(1e-24))
    matrix = np.diag(np.ones(len(weights) - 1), -1)
    matrix[0] -= step * weights
    matrix[0, 0] += 1.0
    return np.abs(np.linalg.eigvals(matrix)).max()


@pytest.mark.parametrize(
    "law", [law for law in LAWS if not isinstance(law, Geometric | GeometricMixture)], ids=repr
)
def test_radius_equals_that_of_the_companion_matrix(law):
    limit = max_stable_learning_rate(law, 1.0)
    for step in np.array([0.05, 0.5, 0.99, 1.01, 1.5]) * limit:
        assert spectral_radius(law, step) == pytest.approx(companion_radius(law, step), abs=1e-9)


@pytest.mark.parametrize(
    ("mus", "shares"), [((0.875,), (1.0,)), ((0.9, 0.5), (0.3, 0.7)), ((0.6, 0.5), (0.5, 0.5))]
)
def test_radius_of_mixtures_equals_that_of_their_recursion(mus, shares):
    """x and one expected read m_i' = mu_i m_i + (1 - mu_i) x' for each component."""
    law = GeometricMixture(mus, shares)
    limit = max_stable_learning_rate(law, 1.0)
    for step in np.array([0.05, 0.5, 0.99, 1.01, 1.5]) * limit:
        point = np.array([1.0, *(-step * np.array(shares))])
        matrix = np.diag([0.0, *mus])
        matrix += np.outer([1.0, *(1.0 - np.array(mus))], point)
        exact = np.abs(np.linalg.eigvals(matrix)).max()
        found = spectral_radius(law, step)
        # a truncated law decays no faster than its tail
        assert found == pytest.approx(exact, abs=1e-7) or exact < found < max(mus) + 1e-3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=10), st.floats(0.05, 3.0))
def test_limit_is_the_first_step_of_radius_one(masses, step):
    law = Empirical(tuple(np.array(masses) / sum(masses)))
    assert spectral_radius(law, step) == pytest.approx(companion_radius(law, step), abs=1e-5)
    limit = max_stable_learning_rate(law, 1.0)
    below = [companion_radius(law, h) for h in np.linspace(1e-3, 0.999, 40) * limit]
    assert max(below) < 1.0 < companion_radius(law, 1.001 * limit)


def test_limits_of_one_mean_and_three_shapes():
    assert max_stable_learning_rate(Geometric(0.875), 1.0) == pytest.approx(30.0)
    assert max_stable_learning_rate(Poisson(7.0), 1.0) == pytest.approx(0.246, abs=5e-4)
    assert max_stable_learning_rate(ConstantPlusGeometric(7), 1.0) == pytest.approx(0.209, abs=5e-4)
    assert max_stable_learning_rate(Poisson(7.0), 4.0) == pytest.approx(0.246 / 4, abs=2e-4)


def test_closed_forms_equal_the_boundary_locus():
    # the same laws, but of classes without a closed form
    constant = Empirical((0.0,) * 7 + (1.0,))
    geometric = GeometricMixture((0.875, 0.875), (0.5, 0.5))
    assert max_stable_learning_rate(constant, 1.0) == pytest.approx(
        max_stable_learning_rate(ConstantPlusGeometric(7), 1.0), rel=1e-9
    )
    assert max_stable_learning_rate(geometric, 1.0) == pytest.approx(30.0, rel=1e-4)


def test_laws_of_thousands_of_updates_are_right():
    geometric = GeometricMixture((0.999, 0.999), (0.5, 0.5))
    assert geometric.support_length() > 10_000
    assert max_stable_learning_rate(geometric, 1.0) == pytest.approx(2 * 1999, rel=1e-4)
    # z^2 - (1 + mu - (1 - mu) h) z + mu = 0 has modulus sqrt(mu) while complex
    assert spectral_radius(geometric, 0.05) == pytest.approx(np.sqrt(0.999), abs=1e-6)
    constant = Empirical((0.0,) * 4000 + (1.0,))
    limit = max_stable_learning_rate(constant, 1.0)
    assert limit == pytest.approx(2 * np.sin(np.pi / (2 * 8001)), rel=1e-9)
    assert spectral_radius(constant, limit) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("law", [Poisson(7.0), ConstantPlusGeometric(3, 0.5)], ids=repr)
def test_the_mean_decays_below_the_limit_and_grows_above(law):
    limit = max_stable_learning_rate(law, 2.0)
    decays = np.abs(impulse_response(law, 0.95 * limit, 2.0, 2000)[-200:]).max()
    grows = np.abs(impulse_response(law, 1.05 * limit, 2.0, 2000)[-200:]).max()
    assert decays < 1e-3
    assert grows > 1e3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: max_stable_learning_rate(Poisson(1.0), 0.0), "curvature = 0.0"),
        (lambda: spectral_radius(Poisson(1.0), -1.0), "step = -1.0"),
    ],
)
def test_unusable_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("mu", [0.5, 0.875, 0.99])
@pytest.mark.parametrize("off", [-1e-6, 0.0, 1e-9, 1e-6, 1e-3])
def test_radius_at_the_double_root_of_a_geometric_law(mu: float, off: float) -> None:
    # z^2 - (1 + mu - (1 - mu) h) z + mu = 0: real roots meet at sqrt(mu) and part as a pair
    step = (1 - np.sqrt(mu)) / (1 + np.sqrt(mu)) * (1 + off)
    exact = np.abs(np.roots([1.0, -(1 + mu - (1 - mu) * step), mu])).max()
    assert spectral_radius(Geometric(mu), step) == pytest.approx(exact, abs=2e-6)


@pytest.mark.parametrize("delay", [1, 2, 7, 15])
def test_radius_at_the_double_root_of_a_constant_delay(delay: int) -> None:
    step = delay**delay / (delay + 1) ** (delay + 1)
    radius = spectral_radius(ConstantPlusGeometric(delay), step)
    assert radius == pytest.approx(delay / (delay + 1), abs=2e-6)


@pytest.mark.parametrize("seed", [107, 148, 176])
def test_a_measured_law_close_to_geometric_has_a_limit(seed: int) -> None:
    # rounding once put a crossing next to z = -1 for these samples
    rng = np.random.default_rng(seed)
    workers = int(rng.integers(2, 17))
    staleness = rng.geometric(1 / workers, size=int(rng.integers(200, 8000))) - 1
    limit = max_stable_learning_rate(Empirical.from_sample(staleness), 1.0)
    assert 0.5 < limit / (2 * (2 * workers - 1)) < 2.0


@pytest.mark.parametrize("law", [ConstantPlusGeometric(0), ConstantPlusGeometric(7)])
def test_spectral_radius_of_a_huge_step_is_found(law: StalenessLaw) -> None:
    # z^L (z - 1) = -h: for a large h the largest root is h^(1 / (L + 1)).
    root = 1e300 ** (1 / (law.mean() + 1))
    assert spectral_radius(law, 1e300) == pytest.approx(root, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("step", [0.2294646086723907, 0.3413407140752465, 0.35871301998574995])
def test_the_radius_of_a_simulated_law_is_found_where_newton_steps_diverge(
    step: float,
) -> None:
    # Newton steps from a flat point once overflowed. The tail of the law decays like 0.96^k, and
    # like 0.97^k at its end.
    times = ComputeTime("lognormal", np.ones(8), 1.0)
    law = server_staleness(ServerTimes(times), 200_000)
    assert spectral_radius(law, step) == pytest.approx(companion_radius(law, step), abs=0.02)


@pytest.mark.parametrize(
    "weights", [(0.4, 0.1, 0.1, 0.4), (0.5, 0.0, 0.0, 0.5), (0.375, 0.375, 0.125, 0.125)]
)
def test_laws_that_vanish_on_the_circle_have_their_limit(weights: tuple[float, ...]) -> None:
    """With as many even as odd lags W(-1) = 0; roots may lie on points of the transform."""
    limit = max_stable_learning_rate(Empirical(weights), 1.0)

    def largest_root(step: float) -> float:
        polynomial = np.concatenate([[1.0], step * np.array(weights)])
        polynomial[1] -= 1.0
        return float(np.abs(np.roots(polynomial)).max())

    assert largest_root(0.999 * limit) < 1.0 < largest_root(1.001 * limit)
