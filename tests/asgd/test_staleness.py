"""Staleness: its definition, and its laws compared with scipy and with each other."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from asgd.errors import InputError
from asgd.staleness.by_name import named_law
from asgd.staleness.counts import ConwayMaxwellPoisson, NegativeBinomial, Poisson
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric, GeometricMixture
from asgd.staleness.law import StalenessLaw
from asgd.staleness.values import staleness_of
from tests.support.laws import LAWS, law_of

EXAMPLES = [
    Geometric(0.875),
    Geometric(0.0),
    GeometricMixture((0.5, 0.9, 0.9), (0.3, 0.5, 0.2)),
    NegativeBinomial(2.5, 0.6),
    NegativeBinomial(0.4, 0.9),
    Poisson(7.0),
    Poisson(0.0),
    ConwayMaxwellPoisson(28.0, 14.0),
    ConwayMaxwellPoisson(0.2, 0.1),
    ConwayMaxwellPoisson(-0.3, 0.0),
    ConstantPlusGeometric(7),
    ConstantPlusGeometric(3, 0.4),
    Empirical((0.1, 0.0, 0.5), 0.3),
    Empirical((0.25, 0.75)),
]


@pytest.fixture(params=EXAMPLES, ids=lambda law: f"{law.name}-{law.mean():.2f}")
def law(request: pytest.FixtureRequest) -> StalenessLaw:
    return request.param


def support(law: StalenessLaw) -> np.ndarray:
    return np.arange(law.support_length(1e-14) + 3)


def test_pmf_sums_to_one_and_has_the_moments(law: StalenessLaw) -> None:
    l = support(law)
    p = law.pmf(l)
    assert p.min() >= 0.0
    assert p.sum() == pytest.approx(1.0, abs=1e-10)
    assert l @ p == pytest.approx(law.mean(), abs=1e-8, rel=1e-8)
    assert (l - law.mean()) ** 2 @ p == pytest.approx(law.var(), abs=1e-6, rel=1e-8)
    assert law.std() ** 2 == pytest.approx(law.var())


def test_cdf_and_tail_are_the_sums_of_pmf(law: StalenessLaw) -> None:
    l = support(law)
    below = np.cumsum(law.pmf(l))
    np.testing.assert_allclose(law.cdf(l), below, atol=1e-9)
    np.testing.assert_allclose(law.tail(l[1:]), 1.0 - below[:-1], atol=1e-9)
    assert law.tail(0) == pytest.approx(1.0)
    assert law.cdf(-1) == 0.0
    assert law.cdf(2.7) == pytest.approx(law.cdf(2))


def test_outside_the_support_there_is_no_mass(law: StalenessLaw) -> None:
    np.testing.assert_array_equal(law.pmf([-1, -5, 0.5]), 0.0)
    np.testing.assert_array_equal(law.logpmf([-1, 1.5]), -np.inf)


def test_logpmf_is_the_logarithm_of_pmf(law: StalenessLaw) -> None:
    l = np.arange(20)
    np.testing.assert_allclose(np.exp(law.logpmf(l)), law.pmf(l), rtol=1e-10, atol=1e-300)


def test_draws_have_the_law(law: StalenessLaw) -> None:
    m = 40_000
    draws = law.rvs(m, np.random.default_rng(1))
    assert draws.dtype == np.int64
    frequencies = np.bincount(draws, minlength=12)[:12] / m
    p = law.pmf(np.arange(12))
    error = np.sqrt(p * (1.0 - p) / m)
    assert np.all(np.abs(frequencies - p) <= 4.5 * error + 1e-12)
    assert abs(draws.mean() - law.mean()) <= 4.5 * law.std() / np.sqrt(m) + 1e-12


def test_draws_repeat_by_generator_and_take_shapes(law: StalenessLaw) -> None:
    first = law.rvs((3, 4), np.random.default_rng(5))
    np.testing.assert_array_equal(first, law.rvs((3, 4), np.random.default_rng(5)))
    assert first.shape == (3, 4)
    assert np.ndim(law.rvs(rng=np.random.default_rng(5))) == 0


def test_support_length_is_the_smallest(law: StalenessLaw) -> None:
    for tail in (1e-3, 1e-6, 1e-9):
        length = law.support_length(tail)
        assert law.tail(length) < tail
        assert length == 1 or law.tail(length - 1) >= tail


def test_weights_sum_to_one_and_hazard_rebuilds_the_law(law: StalenessLaw) -> None:
    length = law.support_length()
    assert law.weights(length).sum() == pytest.approx(1.0)
    hazard = law.hazard(length + 5)
    survival = np.concatenate([[1.0], np.cumprod(1.0 - hazard)[:-1]])
    np.testing.assert_allclose(hazard * survival, law.pmf(np.arange(length + 5)), atol=1e-9)


def test_stored_and_rebuilt_law_is_the_same(law: StalenessLaw) -> None:
    assert law_of(json.loads(json.dumps(law.to_dict()))) == law


def test_every_law_has_an_example() -> None:
    assert {type(law) for law in EXAMPLES} == set(LAWS.values())


def test_laws_equal_scipy() -> None:
    l = np.arange(60)
    np.testing.assert_allclose(Geometric(0.7).pmf(l), stats.geom(0.3, loc=-1).pmf(l))
    np.testing.assert_allclose(Geometric(0.7).cdf(l), stats.geom(0.3, loc=-1).cdf(l))
    np.testing.assert_allclose(Poisson(3.5).pmf(l), stats.poisson(3.5).pmf(l))
    np.testing.assert_allclose(Poisson(3.5).cdf(l), stats.poisson(3.5).cdf(l))
    np.testing.assert_allclose(NegativeBinomial(2.3, 0.6).pmf(l), stats.nbinom(2.3, 0.4).pmf(l))
    np.testing.assert_allclose(NegativeBinomial(2.3, 0.6).cdf(l), stats.nbinom(2.3, 0.4).cdf(l))


def test_special_cases_of_laws_agree() -> None:
    l = np.arange(40)
    np.testing.assert_allclose(
        ConwayMaxwellPoisson(np.log(5.0), 1.0).pmf(l), Poisson(5.0).pmf(l), atol=1e-15
    )
    geometric = Geometric(0.75).pmf(l)
    np.testing.assert_allclose(ConwayMaxwellPoisson(np.log(0.75), 0.0).pmf(l), geometric)
    np.testing.assert_allclose(NegativeBinomial(1.0, 0.75).pmf(l), geometric)
    np.testing.assert_allclose(GeometricMixture((0.75, 0.75), (0.2, 0.8)).pmf(l), geometric)
    np.testing.assert_allclose(ConstantPlusGeometric(0, 0.75).pmf(l), geometric)
    np.testing.assert_allclose(Empirical((), 0.75).pmf(l), geometric)


def test_hazard_of_the_geometric_law_is_constant() -> None:
    np.testing.assert_allclose(Geometric(0.875).hazard(200), 0.125)


def test_empirical_law_keeps_the_mean_and_smooths_the_tail() -> None:
    sample = Geometric(0.875).rvs(2000, np.random.default_rng(3))
    law = Empirical.from_sample(sample)
    assert law.mean() == pytest.approx(sample.mean(), rel=1e-12)
    bulk = len(law.probabilities)
    np.testing.assert_allclose(law.pmf(np.arange(bulk)), np.bincount(sample)[:bulk] / 2000)
    beyond = np.arange(sample.max() + 1, sample.max() + 20)
    assert np.all(law.pmf(beyond) > 0.0)
    assert np.sum(sample >= bulk) >= 44  # sqrt(2000)


def test_empirical_law_of_a_constant_is_that_constant() -> None:
    law = Empirical.from_sample(np.full(50, 7))
    assert law.pmf(7) == 1.0
    assert law.var() == 0.0
    assert law.support_length() == 8


def test_staleness_is_update_minus_read_version() -> None:
    assert staleness_of(7, 3) == 4
    assert isinstance(staleness_of(7, 3), int)
    np.testing.assert_array_equal(staleness_of(np.arange(4), np.array([0, 0, 1, 3])), [0, 1, 1, 0])


@pytest.mark.parametrize(
    ("update", "read_version"), [(3, 4), (3, -1), (np.arange(3), np.array([0, 2, 0]))]
)
def test_an_impossible_read_version_is_refused(update: object, read_version: object) -> None:
    with pytest.raises(InputError, match=r"read_version(\[[01]\])? = "):
        staleness_of(update, read_version)


def test_named_laws_have_the_mean() -> None:
    assert named_law("geometric", 7.0) == Geometric(0.875)
    assert named_law("poisson", 7.5) == Poisson(7.5)
    assert named_law("constant", 7.0) == ConstantPlusGeometric(7)


@pytest.mark.parametrize(
    ("name", "mean"), [("cauchy", 7.0), ("geometric", -1.0), ("constant", 7.5)]
)
def test_an_unusable_named_law_is_refused(name: str, mean: float) -> None:
    with pytest.raises(InputError):
        named_law(name, mean)


@pytest.mark.parametrize(
    "description",
    [
        {"law": "geometric", "mu": 1.0},
        {"law": "geometric_mixture", "mus": [0.5, 0.6], "shares": [0.5]},
        {"law": "geometric_mixture", "mus": [0.5, 0.6], "shares": [0.5, 0.6]},
        {"law": "negative_binomial", "shape": 0.0, "mu": 0.5},
        {"law": "conway_maxwell_poisson", "log_rate": 0.1, "nu": 0.0},
        {"law": "constant_plus_geometric", "offset": -1},
        {"law": "empirical", "probabilities": [0.7, 0.7]},
        {"law": "poisson", "rate": float("nan")},
    ],
)
def test_impossible_laws_are_refused(description: dict[str, object]) -> None:
    with pytest.raises(InputError):
        law_of(description)


def test_a_table_without_mass_and_a_tail_of_zero_are_refused() -> None:
    with pytest.raises(InputError, match="no mass"):
        ConstantPlusGeometric(7).weights(5)
    with pytest.raises(InputError, match="tail"):
        Geometric(0.5).support_length(0.0)
