"""The queue law, compared with theory, an independent simulation and recorded runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.profile.estimators import Counts
from analysis.profile.goodness import total_variation
from analysis.profile.queueing import (
    MeasuredTimes,
    ServerTimes,
    check_queue,
    config_staleness,
    measured_cycles,
    memoryless_law,
    queue_staleness,
    simulate_queue,
)
from asgd.config.make import make_config
from asgd.delays import ComputeTime
from asgd.errors import InputError
from asgd.rundir.columns import TRACE_COLUMNS
from asgd.rundir.reader import read_run
from asgd.rundir.writer import RunWriter
from asgd.simulation.simulate import simulate
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric
from asgd.staleness.law import StalenessLaw
from tests.analysis.test_fit import timed_server


def times(law: str, workers: int, mean: float = 0.1, variation: float = 0.5) -> ComputeTime:
    return ComputeTime(law, np.full(workers, mean), variation)


def noise(law: StalenessLaw, updates: int) -> float:
    """Return the total variation distance that 99.9 % of samples of `updates` stay below."""
    rng = np.random.default_rng(0)
    draws = [total_variation(law, Counts.of(np.asarray(law.rvs(updates, rng)))) for _ in range(300)]
    return float(np.mean(draws) + 3.1 * np.std(draws))


# Theory


def test_memoryless_workers_are_geometric() -> None:
    assert queue_staleness(times("exponential", 8)) == Geometric(0.875)
    assert queue_staleness(times("exponential", 1)) == Geometric(0.0)


def test_unequal_memoryless_workers_are_a_mixture() -> None:
    law = memoryless_law([4.0, 4.0, 1.5, 0.5])
    assert law.params["mus"] == pytest.approx((0.95, 0.85, 0.6))
    assert law.params["shares"] == pytest.approx((0.05, 0.15, 0.8))
    assert law.mean() == pytest.approx(3.0)
    assert law == queue_staleness(
        ComputeTime("exponential", 1.0 / np.array([4.0, 4.0, 1.5, 0.5]), 0.5)
    )


@pytest.mark.parametrize(
    "rates", [[1.0, 1.0, 1.0, 1.0], [4.0, 4.0, 1.5, 0.5]], ids=["equal", "unequal"]
)
def test_closed_law_agrees_with_the_simulation(rates: list[float]) -> None:
    staleness = simulate_queue(
        ServerTimes(ComputeTime("exponential", 1.0 / np.array(rates), 0.5)),
        40_000,
        np.random.default_rng(1),
    )
    law = memoryless_law(rates)
    assert total_variation(law, Counts.of(staleness)) < noise(law, 40_000)


@pytest.mark.parametrize("law", ["constant", "none"])
@pytest.mark.parametrize("service_time", [0.0, 0.002, 0.1])
def test_equal_constant_times_give_staleness_p_minus_one(law: str, service_time: float) -> None:
    result = queue_staleness(
        times(law, 8), gradient_time=1e-3, service_time=service_time, updates=5000
    )
    assert result == ConstantPlusGeometric(7)


@pytest.mark.parametrize("law", ["exponential", "gamma", "lognormal", "constant"])
@pytest.mark.parametrize("workers", [2, 7])
def test_mean_is_workers_minus_one(law: str, workers: int) -> None:
    mean = np.linspace(0.05, 0.4, workers)
    result = queue_staleness(
        ComputeTime(law, mean, 0.7), message_time=1e-3, service_time=2e-3, updates=50_000
    )
    # the snapshots in flight at both ends move the mean by at most P * (largest staleness) / m
    slack = workers * result.support_length(1e-5) / 50_000
    assert abs(result.mean() - (workers - 1)) < slack


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("share", [0.04, 0.3, 1.0])
def test_dead_time_removes_zeros(workers: int, share: float) -> None:
    """P(tau = 0) = (1/P) (1 + r/c)^-(P-1), which is not (1/P) exp(-(P-1) r/c) unless r << c.

    No other cycle may end during the dead time r, which has probability c / (c + r) for each;
    after it all workers are memoryless.
    """
    mean, updates = 0.1, 400_000
    law = queue_staleness(
        times("exponential", workers, mean), message_time=share * mean / 2, updates=updates
    )
    expected = (1 + share) ** -(workers - 1) / workers
    tolerance = 4 * np.sqrt(expected / updates)
    assert law.pmf(0) == pytest.approx(expected, abs=tolerance)
    if share == 1.0:
        assert np.exp(-(workers - 1) * share) / workers < expected - 2 * tolerance


def test_laws_may_be_wider_than_the_geometric_one() -> None:
    """More variable times and slow workers widen the law; steadier times narrow it."""
    geometric = Geometric(7 / 8).var()
    slow = memoryless_law(1 / np.array([4.0, *[1.0] * 7]))
    assert slow.var() / geometric == pytest.approx(1.5625)
    for law, variation, expected in (("gamma", 0.5, 0.268), ("lognormal", 2.0, 3.64)):
        ratios = []
        for seed in range(20):
            rng, compute = np.random.default_rng(seed), times(law, 8, variation=variation)
            tau = simulate_queue(ServerTimes(compute), 20_000, rng)
            ratios.append(tau.var() / geometric)
        error = np.std(ratios, ddof=1) / np.sqrt(len(ratios))
        assert np.mean(ratios) == pytest.approx(expected, abs=4 * error)
        assert (np.mean(ratios) > 1 + 8 * error) == (variation > 1)


def test_gradient_time_and_messages_are_the_same_dead_time() -> None:
    first = queue_staleness(times("gamma", 4), gradient_time=0.02, updates=20_000)
    second = queue_staleness(times("gamma", 4), message_time=0.01, updates=20_000)
    assert first == second


def test_busy_server_makes_a_rotation() -> None:
    law = queue_staleness(times("exponential", 8, mean=1e-3), service_time=1e-2, updates=20_000)
    assert law.mean() == pytest.approx(7.0, abs=0.01)
    assert law.var() < 1.0


@pytest.mark.parametrize("variation", [0.1, 0.5, 1.5])
def test_simulation_agrees_with_an_independent_one(variation: float) -> None:
    law = queue_staleness(times("gamma", 8, variation=variation), updates=100_000)
    other = timed_server(8, 60_000, variation, np.random.default_rng(2))[0][20_000:]
    assert total_variation(law, Counts.of(other)) < noise(law, 40_000) + 0.005


def test_less_variation_means_less_spread() -> None:
    spread = [
        queue_staleness(times("gamma", 8, variation=v), updates=20_000).var()
        for v in (0.1, 0.3, 0.6, 1.0, 2.0)
    ]
    assert np.all(np.diff(spread) > 0)


def test_law_of_ten_thousand_workers_is_nearly_geometric() -> None:
    workers = 10_000
    law = queue_staleness(times("exponential", workers), message_time=1e-9)
    geometric = Geometric(1 - 1 / workers)
    l = np.arange(0, 10 * workers, 50)
    assert np.abs(law.cdf(l) - geometric.cdf(l)).max() < 0.005
    # 100 updates behind each probability: 10 % noise each, 4 % of total variation
    l = np.arange(15 * workers)
    assert 0.5 * np.abs(law.pmf(l) - geometric.pmf(l)).sum() < 0.05


def test_same_seed_same_law() -> None:
    make = [queue_staleness(times("gamma", 5), updates=2000, seed=seed) for seed in (1, 1, 2)]
    assert make[0] == make[1]
    assert make[0] != make[2]


def test_straggler_widens_the_law() -> None:
    mean = np.array([0.01] * 7 + [0.1])
    law = queue_staleness(ComputeTime("gamma", mean, 0.2), updates=50_000)
    assert law.var() > 3 * queue_staleness(times("gamma", 8, variation=0.2)).var()
    # the straggler's share of the updates, each about 70 stale
    assert law.tail(40) == pytest.approx(10 / 710, rel=0.1)


@pytest.mark.parametrize(
    "arguments",
    [{"message_time": -1.0}, {"service_time": np.inf}, {"gradient_time": float("nan")}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_impossible_times_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        queue_staleness(times("gamma", 4), **arguments)
    with pytest.raises(InputError, match="rates"):
        memoryless_law([1.0, 0.0])
    with pytest.raises(InputError, match=r"samples = \[\]: expected"):
        MeasuredTimes([])


# Configurations and runs


def test_law_of_a_configuration() -> None:
    exponential = {"law": "exponential", "mean": 0.1}
    cluster = {"workers": 4, "schedule": "uniform", "compute_time": {"law": "constant"}}
    assert config_staleness(make_config({"cluster": cluster})) == Geometric(0.75)
    cluster = {"workers": 4, "compute_time": exponential}
    free = make_config({"cluster": cluster, "simulation": {"gradient_time": 0.0}})
    assert config_staleness(free) == Geometric(0.75)
    dead = config_staleness(make_config({"cluster": cluster}))
    assert dead.pmf(0) < 0.25


def test_times_of_a_run(tmp_path: Path) -> None:
    config = make_config({"cluster": {"workers": 2}, "run": {"updates": 100}})
    writer = RunWriter.create(tmp_path / "run", config)
    columns = {key: np.zeros(100) for key in TRACE_COLUMNS} | {"batch_size": np.ones(100)}
    columns |= {"update": np.arange(100), "worker": np.arange(100) % 2}
    columns["read_version"] = np.maximum(np.arange(100) - 1, 0)
    columns["staleness"] = np.minimum(np.arange(100), 1)
    columns["applied_seconds"] = 0.5 * np.arange(100)
    columns["compute_seconds"] = np.full(100, 0.75)
    writer.trace(columns)
    run = read_run(tmp_path / "run")
    cycles = measured_cycles(run)
    np.testing.assert_allclose(cycles.mean, 1.0)
    # the start-up has updates 0 and 1, which read version 0, and two more, the life of a snapshot
    assert [len(sample) for sample in cycles.samples] == [47, 47]
    assert queue_staleness(cycles, updates=1000) == ConstantPlusGeometric(1)


def test_stalls_common_to_all_workers_are_no_independent_cycles(tmp_path: Path) -> None:
    """Four workers keep a fixed order; sometimes all of them stop for twenty cycles."""
    config = make_config({"cluster": {"workers": 4}, "run": {"updates": 2000}})
    writer = RunWriter.create(tmp_path / "run", config)
    update = np.arange(2000)
    columns = {key: np.zeros(2000) for key in TRACE_COLUMNS} | {"batch_size": np.ones(2000)}
    columns |= {"update": update, "worker": update % 4}
    columns["read_version"] = np.maximum(update - 3, 0)
    columns["staleness"] = np.minimum(update, 3)
    stalls = 20.0 * (np.random.default_rng(0).random(2000) < 0.05)
    columns["applied_seconds"] = np.cumsum(0.25 + stalls)
    writer.trace(columns)
    check = check_queue(read_run(tmp_path / "run"), updates=4000)
    assert not check.holds
    assert check.distance > 0.5
    assert "move together" in check.sentence


def test_independent_cycles_explain_a_simulated_run(tmp_path: Path) -> None:
    times = {"law": "gamma", "variation": 0.5, "mean": 1.0}
    tables = {
        "problem": {"kind": "quadratic"},
        "optimizer": {"learning_rate": 0.01},
        "cluster": {"workers": 6, "compute_time": times},
        "run": {"updates": 2000},
    }
    check = check_queue(read_run(simulate(make_config(tables), tmp_path / "run")))
    assert check.holds
    assert check.distance < 2 * check.chance
