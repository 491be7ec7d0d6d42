"""The three limits of stability, compared with exact values and independent simulations."""

import numpy as np
import pytest

import analysis
from analysis.exact.limits import Limit, StabilityLimits
from analysis.exact.mean_square import MemorylessServer, independent_limit
from analysis.exact.stability import max_stable_learning_rate, most_workers
from asgd.delays import ComputeTime
from asgd.errors import InputError
from asgd.staleness.counts import Poisson
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric, GeometricMixture
from asgd.staleness.law import StalenessLaw
from scripts.bench_limits import header, row
from tests.support.exact import server_transition

MOMENTA = (0.0, 0.5, 0.9)


def times(law: str, workers: int, variation: float = 0.5, slow: float = 1.0) -> ComputeTime:
    mean = np.ones(workers)
    mean[0] = slow
    return ComputeTime(law, mean, variation)


# Almost-sure limits of another simulation (400 000 turns, three seeds). Their standard deviation
# was at most 0.003, and far less for small limits.
ALMOST_SURE = [
    (times("exponential", 2), (1.522, 1.112, 0.1233)),
    (times("exponential", 4), (1.098, 0.516, 0.0487)),
    (times("exponential", 8), (0.691, 0.319, 0.0275)),
    (times("exponential", 16), (0.474, 0.218, 0.0188)),
    (times("exponential", 32), (0.330, 0.151, 0.0148)),
    (times("gamma", 8, 0.5), (0.318, 0.132, 0.0175)),
    (times("gamma", 8, 0.7), (0.472, 0.191, 0.0197)),
    (times("lognormal", 8, 1.0), (0.549, 0.236, 0.0242)),
    (times("lognormal", 8, 2.0), (0.807, 0.393, 0.0443)),
    (times("exponential", 8, slow=4.0), (0.703, 0.333, 0.0294)),
]


@pytest.mark.parametrize(("server", "expected"), ALMOST_SURE)
def test_almost_sure_limits_are_those_of_another_simulation(
    server: ComputeTime, expected: tuple[float, ...]
) -> None:
    for momentum, value in zip(MOMENTA, expected, strict=True):
        limit = analysis.stability_limits(server, momentum=momentum).almost_sure
        other = min(0.003, 0.006 * value)
        assert 0 < limit.error < 0.01 * value
        assert abs(limit.value - value) < 4 * np.hypot(limit.error, other)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_one_worker_has_one_limit(momentum: float) -> None:
    limits = analysis.stability_limits(times("exponential", 1), momentum=momentum)
    assert limits.almost_sure == limits.mean_square == limits.mean
    assert limits.mean.value == pytest.approx(2 * (1 + momentum))


@pytest.mark.parametrize(
    ("momentum", "expected"),
    [
        (0.0, [2, 1, 0.6180, 0.3473, 0.2091, 0.1012]),
        (0.5, [3, 0.5, 0.28078, 0.15585, 0.09575, 0.04804]),
        (0.9, [3.8, 0.1, 0.05125, 0.02650, 0.01575, 0.00793]),
    ],
)
def test_a_fixed_order_has_one_limit(momentum: float, expected: list[float]) -> None:
    for delay, value in zip((0, 1, 2, 4, 7, 15), expected, strict=True):
        server = times("constant", delay + 1)
        limits = analysis.stability_limits(server, momentum=momentum)
        assert limits.almost_sure == limits.mean_square == limits.mean
        assert limits.mean.error == 0.0
        assert limits.mean.value == pytest.approx(value, rel=1e-3)
        law = analysis.stability_limits(ConstantPlusGeometric(delay), momentum=momentum)
        assert law == limits


def test_errors_cover_the_limits_of_other_seeds_under_a_narrow_law() -> None:
    """Paths with the same start oscillate together, which once made limits 1 to 4 % wrong."""
    server = times("gamma", 4, 0.1)
    found = [analysis.stability_limits(server, momentum=0.9, seed=seed) for seed in range(3)]
    for limits in found:
        # lags hardly vary, so all three limits agree, and that of the mean needs no paths
        for limit in (limits.almost_sure, limits.mean_square):
            assert limit is not None
            assert limit.error < 1e-3 * limit.value
            assert limit.value == pytest.approx(limits.mean.value, rel=2e-3)
    values = [limits.almost_sure.value for limits in found]
    assert np.ptp(values) < 5 * found[0].almost_sure.error


@pytest.mark.parametrize(
    "server",
    [
        times("gamma", 4, 0.1),
        times("constant", 4, slow=1.3),
    ],
)
def test_a_fixed_order_has_the_lowest_limits(server: ComputeTime) -> None:
    """A number of workers that is stable in a fixed order is stable for any compute times."""
    for momentum in (0.0, 0.9):
        lowest = max_stable_learning_rate(ConstantPlusGeometric(3), 1.0, momentum=momentum)
        limit = analysis.stability_limits(server, momentum=momentum).mean_square
        assert limit is not None
        assert limit.value + 3 * limit.error > lowest
        assert most_workers(0.9 * lowest, momentum) == 4
        assert most_workers(1.1 * lowest, momentum) == 3
        assert most_workers(1.1 * lowest, momentum, fewer_than=2) == 1
    assert most_workers(2.1) == 0


def test_memoryless_mean_square_is_exact() -> None:
    expected = {1: 2.0, 2: 1.28078, 4: 0.84307, 8: 0.56639, 16: 0.38618, 32: 0.26611}
    for workers, value in expected.items():
        limit = analysis.stability_limits(times("exponential", workers)).mean_square
        assert limit is not None
        assert limit.error == 0.0
        assert limit.value == pytest.approx(value, abs=1e-5)
    law = analysis.stability_limits(Geometric(0.875)).mean_square
    assert law == analysis.stability_limits(times("exponential", 8)).mean_square


def test_second_moments_are_those_of_the_four_term_recursion() -> None:
    for workers in (2, 3, 8):
        server = MemorylessServer.of_rates(np.ones(workers))
        for step in (0.1, 0.5, 1.0):
            exact = np.abs(np.linalg.eigvals(server_transition(step, workers))).max()
            assert server.factor(step) == pytest.approx(exact, rel=1e-12)


def brute_force_factor(rates: np.ndarray, momentum: float, step: float) -> float:
    """Return the spectral radius of E A (x) A over the state x, v, s_1, ..., s_P."""
    workers = len(rates)
    total = 0.0
    for i, chance in enumerate(rates / rates.sum()):
        one = np.eye(workers + 2)
        one[1] = 0.0
        one[1, 1], one[1, 2 + i] = momentum, -step
        one[0, 1], one[0, 2 + i] = momentum, -step
        one[2 + i] = one[0]
        total = total + chance * np.kron(one, one)
    return float(np.abs(np.linalg.eigvals(total)).max())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rates", [[1.0] * 4, [0.25, 1.0, 1.0], [1.0, 2.0, 3.0, 3.0]])
def test_second_moments_of_groups_equal_the_whole_matrix(
    rates: list[float], momentum: float
) -> None:
    server = MemorylessServer.of_rates(np.array(rates), momentum)
    for step in (0.03, 0.3, 1.1):
        whole = brute_force_factor(np.array(rates), momentum, step)
        assert server.factor(step) == pytest.approx(whole, rel=1e-7)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_populations_find_the_exact_mean_square(momentum: float) -> None:
    # a mixture of equal components is a geometric law, but its class has no closed form
    law = GeometricMixture((0.875, 0.875), (0.5, 0.5))
    limit = analysis.stability_limits(law, momentum=momentum).mean_square
    exact = analysis.stability_limits(Geometric(0.875), momentum=momentum).mean_square
    assert limit is not None
    assert exact is not None
    assert exact.error == 0.0 < limit.error < 0.01 * exact.value
    assert abs(limit.value - exact.value) < 4 * limit.error


def test_independent_lags_have_a_mean_square_limit_of_their_own() -> None:
    """The second moments of independent geometric lags close; `asgd_moments` has them."""

    def factor(h: float, mu: float) -> float:
        # E x^2, E x m, E m^2 and E n, where m and n are the means of x and x^2 over the lags
        xx = np.array([1.0, -2 * h, 0.0, h * h])
        xm = np.array([0.0, 1.0, -h, 0.0])
        matrix = [
            xx,
            mu * xm + (1 - mu) * xx,
            mu**2 * np.eye(4)[2] + 2 * mu * (1 - mu) * xm + (1 - mu) ** 2 * xx,
            mu * np.eye(4)[3] + (1 - mu) * xx,
        ]
        return float(np.abs(np.linalg.eigvals(np.array(matrix))).max())

    for mu in (0.2, 0.5, 0.875, 0.9):
        limit = analysis.stability_limits(Geometric(mu), independent=True).mean_square
        assert limit is not None
        assert limit.error == 0.0
        assert factor(limit.value, mu) == pytest.approx(1.0, abs=1e-9)
        assert factor(0.999 * limit.value, mu) < 1 < factor(1.001 * limit.value, mu)


LAGS = [
    Empirical((0.5, 0.0, 0.1, 0.0, 0.4)),
    Empirical((0.05, 0.0, 0.9, 0.05)),
    Poisson(2.0),
]


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("law", LAGS, ids=str)
def test_mean_square_limit_of_independent_lags(
    law: StalenessLaw, momentum: float, aware: bool
) -> None:
    """Compare (Y2) with the growth of the second moments of the last points."""
    weights = law.weights(law.support_length(1e-9))
    limit = independent_limit(law, momentum=momentum, staleness_aware=aware)

    def factor(step: float) -> float:
        """Return the growth of E x^2 per update, by repeated application to the covariance."""
        length = len(weights) + 1
        covariance = np.ones((length, length))
        share = step / np.arange(1, length) ** aware
        mean, growth = np.eye(length, k=-1), 0.0
        mean[0, 0], mean[0, 1] = 1.0 + momentum, -momentum
        mean[0, :-1] -= share * weights
        for k in range(6_000):
            noise = weights * share**2 @ np.diagonal(covariance)[:-1]
            noise -= (share * weights) @ covariance[:-1, :-1] @ (share * weights)
            covariance = mean @ covariance @ mean.T
            covariance[0, 0] += noise
            size = np.trace(covariance)
            covariance /= size
            growth += np.log(size) * (k >= 3_000)
        return float(np.exp(growth / 3_000))

    assert factor(0.995 * limit) < 1 < factor(1.005 * limit)
    options = {"momentum": momentum, "staleness_aware": aware, "independent": True}
    limits = analysis.stability_limits(law, curvature=2.0, **options)
    assert limits.mean_square == Limit(limit / 2.0)
    assert limit / 2.0 < limits.almost_sure.value + 4 * limits.almost_sure.error


def test_independent_lags_that_do_not_vary_have_one_limit() -> None:
    for delay in (0, 3):
        law = Empirical((0.0,) * delay + (1.0,))
        expected = 2 * np.sin(np.pi / (2 * (2 * delay + 1)))
        assert independent_limit(law) == pytest.approx(expected, rel=1e-6)


# Limits of E x from the staleness of another simulation, and their errors.
OF_THE_MEAN = [
    (times("gamma", 8, 0.7), 0.531, 0.006),
    (times("lognormal", 8, 1.0), 0.841, 0.005),
    (times("lognormal", 8, 2.0), 7.99, 0.3),
]


@pytest.mark.parametrize(("server", "expected", "error"), OF_THE_MEAN)
def test_limits_of_the_mean_of_a_queue(server: ComputeTime, expected: float, error: float) -> None:
    limit = analysis.stability_limits(server, mean_square=False).mean
    assert 0 < limit.error < 0.05 * expected
    assert abs(limit.value - expected) < 4 * np.hypot(limit.error, error)


# Limits of E x^2, checked below by an independent simulation.
SQUARES = [
    ("gamma", 0.5, 0.2941),
    ("lognormal", 1.0, 0.4581),
    ("lognormal", 2.0, 0.6746),
]


@pytest.mark.parametrize(("law", "variation", "limit"), SQUARES)
def test_mean_square_of_a_queue_lies_where_populations_change_sign(
    law: str, variation: float, limit: float
) -> None:
    """L(2) of an independently simulated population is negative below the limit, positive above."""

    def growth(step: float) -> float:
        rng = np.random.default_rng(0)
        paths, workers, updates, start = 2_500, 8, 400, 100
        sigma = np.sqrt(np.log1p(variation**2))

        def draw(number: int) -> np.ndarray:
            if law == "gamma":
                return rng.gamma(1 / variation**2, variation**2, number)
            return rng.lognormal(-(sigma**2) / 2, sigma, number)

        x, held = np.ones(paths), np.ones((paths, workers))
        due = draw(paths * workers).reshape(paths, workers)
        every, total = np.arange(paths), 0.0
        for k in range(updates):
            turn = due.argmin(axis=1)
            before = np.square(held).mean(axis=1)
            x = x - step * held[every, turn]
            held[every, turn] = x
            due[every, turn] += draw(paths)
            weight = np.square(held).mean(axis=1)
            ratio = weight / before
            total += np.log(ratio.mean()) * (k >= start)
            chosen = np.searchsorted(
                np.cumsum(ratio) / ratio.sum(), (np.arange(paths) + rng.random()) / paths
            ).clip(max=paths - 1)
            scale = np.sqrt(weight[chosen])
            x, held, due = x[chosen] / scale, held[chosen] / scale[:, None], due[chosen]
        return float(total / (updates - start))

    assert growth(0.94 * limit) < 0 < growth(1.06 * limit)
    found = analysis.stability_limits(times(law, 8, variation)).mean_square
    assert found is not None
    assert abs(found.value - limit) < 0.01 * limit + 4 * found.error


def test_limits_of_the_mean() -> None:
    for law, momentum, aware, value in [
        (Geometric(0.875), 0.0, False, 30.0),
        (Geometric(0.875), 0.5, False, 0.5 * (1 - 0.4375) / 0.4375),
        (Geometric(0.01), 0.9, False, 2 * 1.9 * 1.01 / 0.99),
        (Geometric(0.875), 0.0, True, 2 * 0.875 / (0.125 * np.log(1.875))),
        (ConstantPlusGeometric(7), 0.0, True, 8 * 0.20906),
        (Poisson(7.0), 0.0, False, 0.246),
    ]:
        rule = {"momentum": momentum, "staleness_aware": aware}
        assert max_stable_learning_rate(law, 1.0, **rule) == pytest.approx(value, rel=2e-3)


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_closed_forms_of_the_mean_equal_the_locus(momentum: float, aware: bool) -> None:
    geometric = GeometricMixture((0.875, 0.875), (0.5, 0.5))
    rule = {"momentum": momentum, "staleness_aware": aware}
    closed = max_stable_learning_rate(Geometric(0.875), 1.0, **rule)
    assert max_stable_learning_rate(geometric, 1.0, **rule) == pytest.approx(closed, rel=1e-4)


def test_the_mean_of_unequal_memoryless_workers() -> None:
    """E x and the E s_i follow a linear recursion of P + 1 terms."""
    chance = np.array([0.25] + [1.0] * 7) / 7.25

    def factor(step: float) -> float:
        point = np.concatenate([[1.0], -step * chance])
        matrix = np.diag(np.concatenate([[0.0], 1.0 - chance]))
        matrix[0] = point
        matrix[1:] += chance[:, None] * point
        return float(np.abs(np.linalg.eigvals(matrix)).max())

    limit = analysis.stability_limits(times("exponential", 8, slow=4.0)).mean
    assert limit.error == 0.0
    assert factor(0.9999 * limit.value) < 1 < factor(1.0001 * limit.value)
    assert limit.value == pytest.approx(27.73, abs=0.01)


def test_limits_scale_with_curvature_and_classify() -> None:
    one = analysis.stability_limits(times("exponential", 8))
    four = analysis.stability_limits(times("exponential", 8), curvature=4.0)
    assert four.almost_sure.value == pytest.approx(one.almost_sure.value / 4)
    assert one.classify(0.5) == "stable"
    assert one.classify(0.62) == "heavy tail"
    assert one.classify(0.75) == "diverges"
    unsure = StabilityLimits(Limit(2.0), Limit(1.0, 0.1), Limit(1.5, 0.1))
    assert unsure.classify(0.9) == unsure.classify(1.6) == "heavy tail"
    assert StabilityLimits(Limit(2.0), None, Limit(1.5)).classify(0.1) == "heavy tail"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: analysis.stability_limits(Geometric(0.6)), "expected P - 1 for a whole number"),
        (lambda: analysis.stability_limits(Poisson(9.4)), "staleness = a law of mean 9.4"),
        (lambda: analysis.stability_limits(Geometric(0.5), workers=0), "workers = 0"),
        (lambda: analysis.stability_limits(Geometric(0.5), curvature=0.0), "curvature = 0"),
        (lambda: analysis.stability_limits(Geometric(0.5), momentum=1.0), "momentum = 1"),
        (lambda: analysis.stability_limits(times("gamma", 4), workers=3), "workers = 3"),
        (lambda: analysis.stability_limits(times("gamma", 4), independent=True), "independent"),
    ],
)
def test_unusable_input_is_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_printed_limits_end_below_the_ends_of_their_headings() -> None:
    names, values = header(), row("constant", "sgd", 2)
    for name in ("P", "processor", "wall", "mean", "mean square", "almost sure"):
        end = f"{names} ".index(f" {name} ") + 1 + len(name)
        assert not values[end - 1].isspace()
        assert values[end : end + 1] in ("", " ")
