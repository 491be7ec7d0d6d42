"""The staleness fit: estimates, coverage of intervals, calibration of tests, verdicts."""

from __future__ import annotations

import heapq
import html
import json

import numpy as np
import pandas as pd
import pytest
from scipy import optimize
from scipy.stats import norm

from analysis.profile import dependence, goodness
from analysis.profile.cells import Cells
from analysis.profile.estimators import ESTIMATORS, Counts, log_likelihood
from analysis.profile.fit import StalenessFit
from analysis.profile.fitting import compare_fits, fit_run, fit_staleness
from asgd.config.make import make_config
from asgd.errors import InputError, UnreliableEstimateError
from asgd.rundir.columns import TRACE_COLUMNS
from asgd.rundir.reader import read_run
from asgd.rundir.writer import RunWriter
from asgd.staleness.counts import ConwayMaxwellPoisson, NegativeBinomial, Poisson
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric, GeometricMixture
from asgd.staleness.law import StalenessLaw
from tests.support.laws import law_of

LAWS = [
    Geometric(0.875),
    NegativeBinomial(4.0, 0.6),
    Poisson(7.0),
    ConwayMaxwellPoisson(6.0, 3.0),
    ConstantPlusGeometric(5, 0.6),
    GeometricMixture((0.5, 0.95), (0.4, 0.6)),
    Empirical((0.1, 0.2, 0.4), 0.5),
]
by_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)


def scheduled_server(
    workers: int,
    updates: int,
    rng: np.random.Generator,
    shares: list[float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Staleness and worker of each update where the next worker is drawn independently."""
    order = rng.choice(workers, updates, p=shares)
    read = [0] * workers
    staleness = np.empty(updates, dtype=np.int64)
    for k, worker in enumerate(order.tolist()):
        staleness[k] = k - read[worker]
        read[worker] = k + 1
    return staleness, order


def timed_server(
    workers: int, updates: int, variation: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The same where workers take gamma distributed times, or constant ones at variation 0."""
    shape = variation**-2 if variation else np.inf
    times = rng.gamma(shape, 1.0 / shape, updates + workers) if variation else np.ones(2 * updates)
    events = [(times[i], i) for i in range(workers)]
    heapq.heapify(events)
    read = [0] * workers
    staleness, order = np.empty((2, updates), dtype=np.int64)
    for k in range(updates):
        now, worker = events[0]
        staleness[k], order[k] = k - read[worker], worker
        read[worker] = k + 1
        heapq.heapreplace(events, (now + times[workers + k], worker))
    return staleness, order


def autoregressive_geometric(
    mu: float, correlation: float, updates: int, rng: np.random.Generator
) -> np.ndarray:
    """Geometric staleness whose normal scores are an autoregression of order one."""
    noise = np.sqrt(1.0 - correlation**2) * rng.standard_normal(updates)
    scores = np.empty(updates)
    scores[0] = rng.standard_normal()
    for k in range(1, updates):
        scores[k] = correlation * scores[k - 1] + noise[k]
    return np.floor(norm.logsf(scores) / np.log(mu)).astype(np.int64)


# Maximum likelihood


@by_law
def test_law_is_recovered(law: StalenessLaw) -> None:
    fit = fit_staleness(law.rvs(5000, np.random.default_rng(1)), start_up=0).laws[law.name]
    intervals = fit.confidence_interval(0.999)
    for key, value in law.params.items():
        low, high = np.ravel(intervals[key].low), np.ravel(intervals[key].high)
        true = np.ravel(value)[: len(low)]
        assert np.all((low[: len(true)] - 1e-12 <= true) & (true <= high[: len(true)] + 1e-12))
    assert fit.tv < 0.05


@pytest.mark.parametrize(
    "law",
    # the others have no interior maximum in continuous parameters
    [law for law in LAWS if not isinstance(law, ConstantPlusGeometric | Empirical)],
    ids=lambda law: law.name,
)
def test_estimates_maximise_the_likelihood(law: StalenessLaw) -> None:
    counts = Counts.of(law.rvs(2000, np.random.default_rng(2)))
    fitted = ESTIMATORS[law.name](counts, None)
    best = log_likelihood(fitted, counts)
    theta = np.concatenate([np.ravel(value) for value in fitted.params.values()]).astype(float)

    def rebuilt(theta: np.ndarray) -> StalenessLaw:
        if isinstance(law, GeometricMixture):
            return GeometricMixture(tuple(theta[:2]), (theta[2], 1.0 - theta[2]))
        return type(law)(*theta)

    def loss(theta: np.ndarray) -> float:
        try:
            return -log_likelihood(rebuilt(theta), counts)
        except InputError:
            return 1e9

    free = theta[:3] if isinstance(law, GeometricMixture) else theta
    found = optimize.minimize(loss, free, method="Nelder-Mead", options={"maxiter": 200})
    assert -found.fun - best < 0.01


def test_warm_start_changes_nothing() -> None:
    first, second = (
        Counts.of(ConwayMaxwellPoisson(6.0, 3.0).rvs(2000, np.random.default_rng(seed)))
        for seed in (1, 2)
    )
    for name in ("conway_maxwell_poisson", "geometric_mixture", "negative_binomial"):
        warm = ESTIMATORS[name](second, ESTIMATORS[name](first, None))
        cold = ESTIMATORS[name](second, None)
        assert log_likelihood(warm, second) == pytest.approx(log_likelihood(cold, second), abs=1e-2)


def test_edges_of_the_parameter_spaces() -> None:
    rng = np.random.default_rng(4)
    wide = Counts.of(NegativeBinomial(0.3, 0.95).rvs(1000, rng))
    assert ESTIMATORS["conway_maxwell_poisson"](wide, None).params["nu"] == 0.0
    narrow = Counts.of(ConwayMaxwellPoisson(28.0, 14.0).rvs(1000, rng))
    assert ESTIMATORS["negative_binomial"](narrow, None).var() == pytest.approx(narrow.mean, 1e-3)
    two = Counts.of(rng.integers(6, 8, 1000))
    assert goodness.total_variation(ESTIMATORS["conway_maxwell_poisson"](two, None), two) < 1e-6


def test_geometric_estimate_and_criteria_are_the_closed_forms() -> None:
    staleness = Geometric(0.8).rvs(1000, np.random.default_rng(5))
    fit = fit_staleness(staleness, start_up=0)
    mean = staleness.mean()
    llf = 1000 * (mean * np.log(mean / (1 + mean)) - np.log(1 + mean))
    assert fit.mu == pytest.approx(mean / (1 + mean))
    assert fit.geometric.llf == pytest.approx(llf)
    assert fit.geometric.aic == pytest.approx(2 - 2 * llf)
    assert fit.geometric.bic == pytest.approx(np.log(1000) - 2 * llf)


def test_interval_of_mu_has_the_width_of_theory() -> None:
    fit = fit_staleness(Geometric(0.875).rvs(20_000, np.random.default_rng(6)), start_up=0)
    for method in ("percentile", "normal"):
        low, high = fit.geometric.confidence_interval(0.95, method)["mu"]
        # (1 - mu) sqrt(mu / N); 399 resamples give a standard deviation within 15 %
        assert (high - low) / (2 * 1.96) == pytest.approx(0.125 * np.sqrt(0.875 / 20_000), rel=0.15)


@pytest.mark.slow
@by_law
def test_intervals_cover(law: StalenessLaw) -> None:
    # an estimate of one of these laws takes ten times as long as of the others
    repeats = 20 if isinstance(law, GeometricMixture | ConwayMaxwellPoisson) else 40
    rng = np.random.default_rng(7)
    covered: list[np.ndarray] = []
    for seed in range(repeats):
        fit = fit_staleness(law.rvs(1500, rng), start_up=0, seed=seed).laws[law.name]
        intervals = fit.confidence_interval(0.95)
        hits: list[bool] = []
        for key, value in law.params.items():
            low, high = np.ravel(intervals[key].low), np.ravel(intervals[key].high)
            pairs = zip(np.ravel(value), low, high, strict=False)
            hits += [bool(a - 1e-12 <= x <= b + 1e-12) for x, a, b in pairs]
        covered.append(np.array(hits[:3]))
    share = np.mean([hits[: min(map(len, covered))] for hits in covered], axis=0)
    # three binomial standard deviations at 0.95
    assert np.all(share >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / repeats))


@pytest.mark.slow
def test_intervals_cover_under_dependence() -> None:
    repeats, rng, hits = 100, np.random.default_rng(8), 0
    for seed in range(repeats):
        fit = fit_staleness(autoregressive_geometric(0.875, 0.8, 3000, rng), seed=seed)
        low, high = fit.geometric.confidence_interval(0.95)["mu"]
        hits += low <= 0.875 <= high
    # independent intervals, a third as wide, would cover half of the time
    assert hits / repeats >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / repeats)


# Goodness of fit


def chi_square_pvalues(series: list[np.ndarray]) -> np.ndarray:
    """Return the p-value of the chi-square test of each series, without its start-up."""
    pvalues = []
    for staleness in series:
        kept = staleness[dependence.start_up(staleness) :]
        law = ESTIMATORS["geometric"](Counts.of(kept), None)
        pvalues.append(goodness.chi_square(kept, law, dependence.block_length(kept)).pvalue)
    return np.array(pvalues)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["independent", "server-4", "server-8", "autoregressive"])
def test_chi_square_rejects_a_true_geometric_law_at_its_level(kind: str) -> None:
    repeats, rng = 300, np.random.default_rng(9)
    make = {
        "independent": lambda: Geometric(0.875).rvs(5000, rng),
        "server-4": lambda: scheduled_server(4, 5000, rng)[0],
        "server-8": lambda: scheduled_server(8, 5000, rng)[0],
        "autoregressive": lambda: autoregressive_geometric(0.875, 0.8, 5000, rng),
    }[kind]
    pvalues = chi_square_pvalues([make() for _ in range(repeats)])
    # the blocks leave it slightly liberal: at most 8 % and 2 %, plus three binomial errors
    for level, most in ((0.05, 0.08), (0.01, 0.02)):
        rate = float(np.mean(pvalues < level))
        assert rate <= most + 3 * np.sqrt(most * (1 - most) / repeats)
    assert np.mean(pvalues < 0.05) >= 0.05 - 3 * np.sqrt(0.05 * 0.95 / repeats)


def test_chi_square_without_dependence_is_pearsons() -> None:
    staleness = Geometric(0.875).rvs(5000, np.random.default_rng(10))
    fit = fit_staleness(staleness, start_up=0)
    test = goodness.chi_square(staleness, Geometric(fit.mu), 1)
    # blocks of one update: design effect one, one degree of freedom for the sum, one for mu
    assert test.design_effect == pytest.approx(1.0, abs=0.05)
    assert test.degrees_of_freedom == pytest.approx(test.bins - 2, abs=0.5)


@pytest.mark.parametrize("variation", [0.9, 0.5, 0.1])
def test_chi_square_has_power(variation: float) -> None:
    rng = np.random.default_rng(11)
    series = [timed_server(8, 5000, variation, rng)[0] for _ in range(10)]
    assert np.all(chi_square_pvalues(series) < 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("statistic", ["tv", "ks", "cvm"])
def test_parametric_bootstrap_is_calibrated(statistic: goodness.Statistic) -> None:
    repeats, rng = 150, np.random.default_rng(12)
    rejected = 0
    for _ in range(repeats):
        staleness = autoregressive_geometric(0.75, 0.6, 2000, rng)
        law = ESTIMATORS["geometric"](Counts.of(staleness), None)
        block = dependence.block_length(staleness)
        counts, cells = (
            Counts.of(staleness),
            Cells.of(goodness.with_law(law, staleness, rng), block),
        )
        test = goodness.parametric_bootstrap(
            law, counts, cells, statistic=statistic, resamples=79, rng=rng
        )
        rejected += test.pvalue <= 0.05
    assert rejected / repeats <= 0.08 + 3 * np.sqrt(0.08 * 0.92 / repeats)


@pytest.mark.parametrize("statistic", ["tv", "ks", "cvm"])
def test_parametric_bootstrap_accepts_the_law_and_rejects_another(
    statistic: goodness.Statistic,
) -> None:
    fit = fit_staleness(NegativeBinomial(4.0, 0.6).rvs(3000, np.random.default_rng(13)))
    assert fit.laws["negative_binomial"].goodness_of_fit(statistic).pvalue > 0.01
    wrong = fit.laws["poisson"].goodness_of_fit(statistic, resamples=99)
    assert wrong.pvalue == pytest.approx(0.01)
    assert wrong.null.shape == (99,)
    assert wrong.statistic > wrong.null.max()


# Start-up and dependence


def test_start_up_ends_after_the_reads_of_version_zero() -> None:
    staleness, _ = scheduled_server(8, 5000, np.random.default_rng(14))
    last = int(np.flatnonzero(staleness == np.arange(5000))[-1])
    dropped = dependence.start_up(staleness)
    assert last < dropped <= 2500
    assert fit_staleness(staleness, 8).start_up == dropped
    assert fit_staleness(staleness, 8, start_up=40).start_up == 40


def test_start_up_finds_a_late_change_of_level() -> None:
    rng = np.random.default_rng(15)
    slow = Poisson(2.0).rvs(400, rng)
    late = np.concatenate([slow, Poisson(7.0).rvs(4600, rng)])
    assert dependence.start_up(late) == pytest.approx(400, abs=15)


def test_start_up_of_a_series_cut_from_a_longer_one() -> None:
    staleness, _ = scheduled_server(4, 6000, np.random.default_rng(16))
    assert dependence.start_up(np.concatenate([[9], staleness[1000:]])) < 500


def test_standard_error_includes_the_dependence() -> None:
    rng = np.random.default_rng(17)
    series = np.array([autoregressive_geometric(0.8, 0.7, 4000, rng) for _ in range(200)])
    spread = series.mean(axis=1).std(ddof=1)
    errors = [dependence.standard_error(s, dependence.block_length(s)) for s in series[:50]]
    # 200 draws give the spread within 5 %; blocks of finite length lose a few percent
    assert np.mean(errors) == pytest.approx(spread, rel=0.2)
    assert dependence.effective_size(series[0], dependence.block_length(series[0])) < 1500


def test_autocorrelation_is_the_direct_sum() -> None:
    x = np.random.default_rng(18).poisson(3.0, 300)
    c = x - x.mean()
    direct = [c[: 300 - k] @ c[k:] / (c @ c) for k in range(6)]
    np.testing.assert_allclose(dependence.autocorrelation(x, 5), direct, atol=1e-12)
    np.testing.assert_array_equal(dependence.autocorrelation(np.full(50, 7), 3), [1, 0, 0, 0])


# Verdicts


def test_scheduled_order_is_geometric() -> None:
    fit = fit_staleness(*args_of(4, scheduled_server(4, 5000, np.random.default_rng(19))))
    assert fit.shape.zeros == pytest.approx(0.25, abs=0.02)
    assert fit.geometric.tv < 0.03
    assert fit.chi_square.pvalue > 0.01
    assert fit.grade == "holds"
    assert fit.recommended == Geometric(fit.mu)
    assert fit.verdict.startswith("The geometric law holds")
    low, high = fit.geometric.confidence_interval()["mu"]
    assert low <= 0.75 <= high


def args_of(workers: int, series: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, int, object]:
    return series[0], workers, series[1]


def test_nearly_memoryless_times_are_close() -> None:
    fit = fit_staleness(*args_of(8, timed_server(8, 5000, 0.9, np.random.default_rng(20))))
    assert fit.grade == "close"
    assert fit.geometric.tv < 0.08
    assert "close" in fit.verdict
    assert fit.selected.tv < fit.geometric.tv


@pytest.mark.parametrize("variation", [0.1, 0.5])
def test_regular_times_are_rejected_with_another_law(variation: float) -> None:
    fit = fit_staleness(*args_of(8, timed_server(8, 5000, variation, np.random.default_rng(21))))
    assert fit.grade == "rejected"
    assert fit.mu == pytest.approx(0.875, abs=0.005)
    assert fit.shape.variance_ratio < 0.5
    assert "does not hold" in fit.verdict
    assert "predict with the" in fit.verdict
    assert fit.selected.tv < 0.05
    assert fit.recommended.var() == pytest.approx(fit.shape.variance, rel=0.2)


@pytest.mark.parametrize("workers", [2, 8])
def test_constant_times_are_rejected_for_the_constant_law(workers: int) -> None:
    series = timed_server(workers, 5000, 0.0, np.random.default_rng(22))
    fit = fit_staleness(*args_of(workers, series))
    assert fit.grade == "rejected"
    assert fit.recommended == ConstantPlusGeometric(workers - 1)
    assert f"constant law (always {workers - 1})" in fit.verdict
    assert fit.conservation is not None
    assert fit.conservation.holds
    assert json.dumps(fit.to_dict(), allow_nan=False)


def test_two_alternating_values() -> None:
    fit = fit_staleness(np.tile([6, 8], 1000), 8)
    assert fit.grade == "rejected"
    assert fit.recommended.mean() == pytest.approx(7.0)
    assert fit.recommended.var() == pytest.approx(1.0, rel=0.05)


def test_one_worker_without_staleness_is_geometric() -> None:
    fit = fit_staleness(np.zeros(500, dtype=int), 1, np.zeros(500, dtype=int))
    assert fit.grade == "holds"
    assert fit.mu == 0.0
    assert json.dumps(fit.to_dict(), allow_nan=False)


def test_unequal_memoryless_workers_are_a_mixture() -> None:
    shares = [0.4, 0.4, 0.15, 0.05]
    series = scheduled_server(4, 5000, np.random.default_rng(23), shares)
    fit = fit_staleness(*args_of(4, series))
    assert fit.grade == "rejected"
    assert fit.selected.name == "geometric_mixture"
    assert fit.per_worker is not None
    error = np.sqrt(np.array(shares) / 5000)  # of a share; that of 1 - mu is not larger
    assert np.all(np.abs(fit.per_worker["share"] - shares) < 4 * error)
    assert np.all(np.abs(1 - fit.per_worker["mu"] - shares) < 4 * error)
    # without worker ids the mixture has two components
    anonymous = fit_staleness(series[0], 4).laws["geometric_mixture"]
    assert anonymous.law.n_parameters == 3
    assert anonymous.tv < fit.geometric.tv / 2


def test_conservation_notices_a_wrong_number_of_workers() -> None:
    series = scheduled_server(4, 3000, np.random.default_rng(24))[0]
    right, wrong = fit_staleness(series, 4).conservation, fit_staleness(series, 5).conservation
    assert right is not None
    assert right.holds
    assert wrong is not None
    assert not wrong.holds
    assert "where P - 1 = 4 is expected" in str(fit_staleness(series, 5))
    assert fit_staleness(series).conservation is None


def test_drift_is_noticed_and_its_absence_too() -> None:
    rng = np.random.default_rng(25)
    steady = fit_staleness(scheduled_server(8, 4000, rng)[0], 8)
    assert steady.drift.pvalue > 0.01
    changed = np.concatenate([Geometric(0.875).rvs(2000, rng), Poisson(7.0).rvs(2000, rng)])
    fit = fit_staleness(changed, start_up=0)
    assert fit.drift.pvalue < 0.01
    assert "drifts" in str(fit)
    assert len(fit.drift.parts) == 10
    assert fit.drift.parts["variance"].iloc[0] > 2 * fit.drift.parts["variance"].iloc[-1]


# The result object


@pytest.fixture(scope="module")
def fit() -> StalenessFit:
    return fit_staleness(*args_of(8, timed_server(8, 3000, 0.5, np.random.default_rng(26))), seed=3)


def test_result_reads_like_scipys(fit: StalenessFit) -> None:
    assert fit.selected.params == fit.selected.law.params
    assert fit.selected.goodness_of_fit().pvalue == fit.selected.pvalue
    assert fit.verdict in repr(fit)
    assert html.escape(fit.verdict) in fit._repr_html_()
    assert fit.counts.sum() == 3000 - fit.start_up
    assert fit.autocorrelation(10).shape == (11,)


def test_table_has_every_law_best_first(fit: StalenessFit) -> None:
    table = fit.table()
    assert set(table.index) == set(ESTIMATORS)
    assert table["aic"].is_monotonic_increasing
    np.testing.assert_allclose(table["mean"], fit.geometric.law.mean(), rtol=1e-3)


def test_stored_profile_gives_the_law_back(fit: StalenessFit) -> None:
    stored = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert law_of(stored["law"]) == fit.recommended
    low, high = stored["laws"]["geometric"]["confidence_interval"]["mu"]
    assert low <= stored["mu"] <= high


def test_same_seed_same_numbers(fit: StalenessFit) -> None:
    again = fit_staleness(
        *args_of(8, timed_server(8, 3000, 0.5, np.random.default_rng(26))), seed=3
    )
    assert again.to_dict() == fit.to_dict()


def test_fit_of_a_run_directory(tmp_path: object) -> None:
    config = make_config({"cluster": {"workers": 4}, "run": {"updates": 600}})
    writer = RunWriter.create(f"{tmp_path}/run", config)
    staleness, order = scheduled_server(4, 600, np.random.default_rng(27))
    columns = {key: np.ones(600) for key in TRACE_COLUMNS}
    columns |= {"update": np.arange(600), "worker": order, "staleness": staleness}
    columns["read_version"] = np.arange(600) - staleness
    writer.trace(columns)
    run = read_run(f"{tmp_path}/run")
    fit = fit_run(run)
    assert fit.workers == 4
    assert fit.mu == fit_staleness(staleness, 4).mu
    fit.save(run.path)
    stored = json.loads((run.path / "profile.json").read_text())
    assert stored["verdict"] == fit.verdict


def test_runs_side_by_side() -> None:
    rng = np.random.default_rng(28)
    fits = [
        (f"{p} workers", fit_staleness(*args_of(p, scheduled_server(p, 4000, rng))))
        for p in (2, 4, 8, 16)
    ]
    table = compare_fits(fits)
    assert isinstance(table, pd.DataFrame)
    np.testing.assert_allclose(table["mu"], table["mu_expected"], atol=0.02)
    np.testing.assert_allclose(table["mu_expected"], 1 - 1 / np.array([2, 4, 8, 16]))
    assert np.all(np.abs(table["variance_ratio"] - 1) < 0.4)
    assert set(table["grade"]) == {"holds"}


@pytest.mark.parametrize(("workers", "updates"), [(4, 60), (4, 3), (32, 280)])
def test_too_little_data_raises_and_carries_the_fit(workers: int, updates: int) -> None:
    series = scheduled_server(workers, updates, np.random.default_rng(29))
    with pytest.raises(UnreliableEstimateError, match="expected at least") as caught:
        fit_staleness(*args_of(workers, series))
    estimate = caught.value.estimate
    assert isinstance(estimate, StalenessFit)
    assert 0.0 <= estimate.mu < 1.0
    assert estimate.verdict
    assert json.dumps(estimate.to_dict())


def test_too_much_dependence_raises() -> None:
    sticky = np.repeat(Geometric(0.8).rvs(12, np.random.default_rng(30)), 100)
    with pytest.raises(UnreliableEstimateError, match="effectively independent"):
        fit_staleness(sticky, start_up=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"staleness": []},
        {"staleness": [[1, 2]]},
        {"staleness": [1, -2]},
        {"staleness": [1, 0.5]},
        {"staleness": [1, 2], "workers": 0},
        {"staleness": [1, 2], "worker_ids": [0]},
        {"staleness": [1, 2], "start_up": 2},
    ],
)
def test_bad_input_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError):
        fit_staleness(**arguments)


def test_unknown_options_are_refused(fit: StalenessFit) -> None:
    with pytest.raises(InputError, match="percentile"):
        fit.selected.confidence_interval(method="bca")
    with pytest.raises(InputError, match="level"):
        fit.selected.confidence_interval(95)
    with pytest.raises(InputError, match="cvm"):
        fit.selected.goodness_of_fit("ad")


def test_conservation_with_workers_that_come_and_go() -> None:
    sizes = np.repeat([3, 6], 1500)
    x = np.random.default_rng(5).geometric(1.0 / sizes) - 1
    fit = fit_staleness(x, sizes, start_up=0)
    assert fit.workers == 4.5
    assert fit.conservation.expected == 3.5
    assert fit.conservation.holds
    assert not fit_staleness(x, 3, start_up=0).conservation.holds
    with pytest.raises(
        InputError, match=r"workers\.shape = \(5,\): expected a number or \(3000,\)"
    ):
        fit_staleness(x, sizes[:5])
