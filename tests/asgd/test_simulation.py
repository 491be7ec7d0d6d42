"""Simulated runs: the staleness of the queue, the run directory, replays, and how runs end."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from threadpoolctl import threadpool_limits

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.delays import ComputeTime
from asgd.draws import WorkerDraws
from asgd.errors import DivergedError, InputError, RunFailedError
from asgd.problems.make import make_problem
from asgd.progress import Progress
from asgd.rundir.reader import Run, read_run
from asgd.simulation.order import server_order, simulate_staleness, unhindered_order
from asgd.simulation.simulate import simulate
from asgd.staleness.counts import Poisson
from asgd.staleness.geometric import Geometric
from asgd.streams import stream
from asgd.verify import record_findings, replay_findings
from tests.support.exact import SERVER_VALUES, server_second_moment
from tests.support.faults import Crowd
from tests.support.invariants import check_trace
from tests.support.plugins import Threaded

P = 8
MEMORYLESS = ComputeTime("exponential", np.ones(P))


@pytest.fixture(autouse=True)
def _one_blas_thread() -> Iterator[None]:
    """Compute as `simulate` does: rounding depends on the number of threads."""
    with threadpool_limits(1, user_api="blas"):
        yield


def configure(problem="quadratic", updates=400, workers=4, seed=0, law="exponential", **tables):
    cluster = {"workers": workers, "compute_time": {"law": law}, **tables.pop("cluster", {})}
    return make_config(
        {
            "problem": {"kind": problem},
            "optimizer": {"learning_rate": 0.02, "batch_size": 3},
            "cluster": cluster,
            "run": {"updates": updates, "seed": seed, "eval_every": 30},
            **tables,
        }
    )


def finished(config: RunConfig, path: Path) -> Run:
    return read_run(simulate(config, path))


def serial_replay(run: Run) -> tuple[list[float], list[np.ndarray]]:
    """Apply the trace again, one gradient after another; return the norms and all versions."""
    config = run.config
    problem = make_problem(config)
    draws = WorkerDraws(config, problem)
    versions = [problem.initial_point(stream(config.run.seed, "initial"))]
    norms = []
    rows = run.trace[["worker", "sequence", "read_version", "batch_size"]].to_numpy().tolist()
    for worker, sequence, read_version, size in rows:
        gradient = problem.gradient(versions[read_version], draws.batch(worker, sequence, size))
        versions.append(versions[-1] - config.optimizer.learning_rate * gradient)
        norms.append(float(np.sqrt(gradient @ gradient)))
    return norms, versions


# the queue


@pytest.mark.parametrize("law", ["constant", "exponential", "gamma", "lognormal"])
def test_mean_staleness_is_workers_minus_one_for_every_law(law):
    order = simulate_staleness(ComputeTime(law, np.ones(P)), 20_000, np.random.default_rng(0))
    # The mean is slightly below P - 1, because the last reads never become updates.
    assert P - 1 - 0.02 < order.staleness.mean() <= P - 1


def test_constant_times_give_constant_staleness_after_the_start():
    order = simulate_staleness(ComputeTime("constant", np.ones(P)), 200, np.random.default_rng(0))
    np.testing.assert_array_equal(order.staleness[:P], np.arange(P))
    np.testing.assert_array_equal(order.staleness[P:], P - 1)


def assert_geometric(staleness: np.ndarray, mu: float) -> None:
    """Check the share of zeros, the total variation distance and chi-square after the start.

    Two turns of a worker in a row are independent events, so the share of zeros has the binomial
    error. Chi-square uses every 50 P-th value, because these are independent.
    """
    law = Geometric(mu)
    settled = staleness[50 * P :]
    zeros = np.mean(settled == 0)
    assert abs(zeros - (1 - mu)) < 4.0 * np.sqrt(mu * (1 - mu) / len(settled))
    counts = np.bincount(settled)
    cells = law.pmf(np.arange(len(counts)))
    assert 0.5 * np.abs(counts / len(settled) - cells).sum() < 0.015
    edges = 5
    thinned = np.minimum(settled[:: 50 * P], edges)
    expected = np.append(law.pmf(np.arange(edges)), law.tail(edges)) * len(thinned)
    assert stats.chisquare(np.bincount(thinned, minlength=edges + 1), expected).pvalue > 0.01


def test_memoryless_workers_give_the_geometric_law():
    order = simulate_staleness(MEMORYLESS, 200_000, np.random.default_rng(1))
    assert_geometric(order.staleness, 1 - 1 / P)


@pytest.mark.parametrize("law", ["constant", "exponential"])
def test_uniform_turns_give_the_geometric_law_at_any_speed(law):
    compute = ComputeTime(law, np.linspace(0.1, 3.0, P))
    order = simulate_staleness(compute, 200_000, np.random.default_rng(2), schedule="uniform")
    assert_geometric(order.staleness, 1 - 1 / P)
    assert (np.diff(order.applied_seconds) >= 0).all()


@pytest.mark.parametrize("dead", [0.04, 1.0])
def test_dead_time_makes_zeros_rarer(dead):
    order = simulate_staleness(
        MEMORYLESS, 200_000, np.random.default_rng(3), message_time=dead / 4, gradient_time=dead / 2
    )
    p = (1 + dead) ** -(P - 1) / P
    assert abs(np.mean(order.staleness == 0) - p) < 4.0 * np.sqrt(p / len(order.staleness))


def test_unequal_rates_give_a_mixture_by_worker():
    mean = np.array([1.0, 1.0, 0.5, 4.0])
    order = simulate_staleness(ComputeTime("exponential", mean), 200_000, np.random.default_rng(4))
    rate = (1 / mean) / (1 / mean).sum()
    for worker, p in enumerate(rate):
        own = order.staleness[order.worker == worker]
        share = len(own) / len(order.worker)
        assert abs(share - p) < 4.0 * np.sqrt(p * (1 - p) / len(order.worker))
        # own staleness: geometric, independent from turn to turn
        assert abs(own.mean() - (1 - p) / p) < 4.0 * np.sqrt(1 - p) / p / np.sqrt(len(own))


def test_a_busy_server_serves_workers_in_turn():
    order = simulate_staleness(
        ComputeTime("exponential", np.full(P, 0.01)),
        4000,
        np.random.default_rng(5),
        service_time=1.0,
    )
    assert np.mean(order.staleness[100:] == P - 1) > 0.99
    assert order.applied_seconds[-1] == pytest.approx(4000, rel=1e-3)


def test_order_by_hand():
    times = {0: [1.0, 1.0, 1.0, 9.0], 1: [2.5, 2.0, 9.0]}
    order = server_order(lambda w, s: times[w][s], 2, 5, messages=0.5, service_time=0.5)
    # worker 0 arrives at 1.5, 3.5 and, having waited for worker 1, 5.5; worker 1 at 3 and 6
    assert order.worker.tolist() == [0, 1, 0, 0, 1]
    assert order.sequence.tolist() == [0, 0, 1, 2, 1]
    assert order.read_version.tolist() == [0, 0, 1, 3, 2]
    assert order.applied_seconds.tolist() == [2.0, 3.5, 4.0, 6.0, 6.5]
    assert order.compute_seconds.tolist() == [1.0, 2.5, 1.0, 1.0, 2.0]


@pytest.mark.parametrize("messages", [0.0, 0.6])
@pytest.mark.parametrize("mean", [np.ones(30), np.geomspace(0.02, 50.0, 5), np.ones(1)])
def test_merged_arrivals_have_the_order_of_the_queue(mean, messages):
    times = np.random.default_rng(5).exponential(size=(len(mean), 64 * 64)) * mean[:, None]
    fast = unhindered_order(
        lambda worker, first, blocks: times[worker, 64 * first : 64 * (first + blocks)],
        len(mean),
        2000,
        messages,
    )
    slow = server_order(lambda w, s: float(times[w, s]), len(mean), 2000, messages=messages)
    assert fast is not None
    for field in fields(slow):
        np.testing.assert_array_equal(getattr(fast, field.name), getattr(slow, field.name))


def test_arrivals_at_the_same_instant_are_left_to_the_queue():
    assert unhindered_order(lambda *block: np.ones(64), 2, 10) is None


def test_unknown_schedule_is_refused():
    with pytest.raises(InputError, match="schedule = 'fixed': expected free or uniform"):
        simulate_staleness(MEMORYLESS, 10, np.random.default_rng(0), schedule="fixed")


# the run directory


@pytest.mark.parametrize("law", ["none", "constant", "exponential", "lognormal"])
@pytest.mark.parametrize("schedule", ["free", "uniform"])
def test_invariants_of_a_simulated_server(tmp_path, law, schedule):
    simulation = {"gradient_time": 2e-3, "message_time": 1e-3, "service_time": 1e-4}
    config = configure(law=law, cluster={"schedule": schedule}, simulation=simulation)
    run = finished(config, tmp_path / "run")
    check_trace(run)
    assert run.config == config
    assert run.trace["compute_seconds"].min() >= 2e-3
    assert run.trace["applied_seconds"].iloc[0] >= 4.1e-3


@pytest.mark.parametrize("staleness", ["geometric", "poisson", "constant"])
def test_invariants_of_independent_staleness(tmp_path, staleness):
    run = finished(configure(simulation={"staleness": staleness}), tmp_path / "run")
    check_trace(run, server=False)
    assert run.trace["read_version"].iloc[0] == 0


def test_independent_staleness_has_its_law(tmp_path):
    for name, law in (("geometric", Geometric(2.5 / 3.5)), ("poisson", Poisson(2.5))):
        simulation = {"staleness": name, "mean_staleness": 2.5}
        config = configure(updates=6000, workers=4, simulation=simulation)
        staleness = finished(config, tmp_path / name).trace["staleness"].to_numpy()[50:]
        cells = np.append(law.pmf(np.arange(8)), law.tail(8))
        counts = np.bincount(np.minimum(staleness, 8), minlength=9)
        assert stats.chisquare(counts, cells * len(staleness)).pvalue > 0.01
    simulation = {"staleness": "constant"}
    run = finished(configure(workers=6, simulation=simulation), tmp_path / "constant")
    np.testing.assert_array_equal(run.trace["staleness"], np.minimum(np.arange(400), 5))


@pytest.mark.parametrize(
    ("problem", "workers", "staleness"),
    [
        ("softmax", 5, "server"),
        ("softmax", 5, "geometric"),
        ("softmax", 5, "constant"),
        ("softmax", 60, "server"),
        ("quadratic", 60, "server"),
        ("quadratic", 60, "constant"),
    ],
)
def test_the_trace_replays_to_the_last_bit(tmp_path, problem, workers, staleness):
    config = configure(
        problem,
        updates=150,
        workers=workers,
        simulation={"staleness": staleness},
        cluster={"compute_time": {"law": "exponential", "mean": 1.0}},
    )
    run = finished(config, tmp_path / "run")
    norms, versions = serial_replay(run)
    np.testing.assert_array_equal(run.trace["gradient_norm"], norms)
    problem = make_problem(config)
    losses = [problem.loss(versions[k]) for k in run.loss["update"]]
    np.testing.assert_array_equal(run.loss["loss"], losses)


@pytest.mark.parametrize("problem", ["quadratic", "double_well", "least_squares", "softmax"])
def test_one_worker_is_serial_sgd_to_the_last_bit(tmp_path, problem):
    run = finished(configure(problem, updates=130, workers=1, seed=3), tmp_path / "run")
    check_trace(run)
    model = make_problem(run.config)
    draws = WorkerDraws(run.config, model)
    x = model.initial_point(stream(3, "initial"))
    losses = {0: float(model.loss(x))}
    for update in range(130):
        x = x - 0.02 * model.gradient(x, draws.batch(0, update, 3))
        losses[update + 1] = float(model.loss(x))
    assert (run.trace["staleness"] == 0).all()
    assert run.loss["loss"].tolist() == [losses[k] for k in run.loss["update"]]


@pytest.mark.parametrize(
    "optimizer",
    [
        {"batch_size": 3},
        {"rule": "momentum", "momentum": 0.5, "clip_norm": 0.7},
        {"rule": "staleness_aware", "batch_schedule": {"at": [20, 21, 90], "values": [2, 9, 5]}},
        {"learning_rate_schedule": {"at": [50, 120], "values": [0.01, 0.002]}},
        {"rule": "adam"},
        {"rule": "corrected_momentum", "learning_rate": 0.005},
        {"rule": "delay_compensated", "compensation": 1e-4},
        {"rule": "tests.support.rules:Full"},
    ],
    ids=["plain", "momentum", "batches", "rates", "adam", "corrected", "compensated", "own"],
)
def test_a_simulation_in_the_uniform_schedule_equals_the_real_server(tmp_path, optimizer):
    config = configure(
        "least_squares",
        updates=300,
        workers=3,
        # the order is drawn, so compute times may be short
        cluster={"schedule": "uniform", "compute_time": {"law": "constant", "mean": 1e-6}},
        optimizer={"learning_rate": 0.02, **optimizer},
    )
    run = finished(config, tmp_path / "run")
    crowd = Crowd(config)
    crowd.join_all()
    while not crowd.server.stopping:
        crowd.push(max(crowd.at_hand))  # any order of arrival gives the same run
    record = crowd.server.drain()
    for name in ("worker", "sequence", "read_version", "batch_size", "gradient_norm"):
        np.testing.assert_array_equal(run.trace[name], record.trace[name])
    final = make_problem(config).loss(crowd.server.parameters)
    assert run.loss["loss"].iloc[-1] == final


def test_a_run_repeats_bit_for_bit(tmp_path):
    first = finished(configure("logistic", seed=5), tmp_path / "first")
    again = finished(configure("logistic", seed=5), tmp_path / "again")
    other = finished(configure("logistic", seed=6), tmp_path / "other")
    assert first.trace.equals(again.trace)
    assert first.loss.equals(again.loss)
    assert not first.trace["gradient_norm"].equals(other.trace["gradient_norm"])
    assert not first.trace["worker"].equals(other.trace["worker"])


def test_long_runs_are_written_in_parts(tmp_path):
    config = make_config(
        {
            "problem": {"kind": "quadratic"},
            "optimizer": {"learning_rate": 1e-4},
            "cluster": {"workers": 300},
            "run": {"updates": 230_000, "eval_every": 10_000},
        }
    )
    run = finished(config, tmp_path / "run")
    check_trace(run)
    assert len(list((tmp_path / "run" / "trace").iterdir())) == 3


@pytest.mark.parametrize("every", [1, 7, 1000])
@pytest.mark.parametrize(
    ("problem", "rate"),
    [
        ({"kind": "quartic", "initial": 5.0}, 1.0),
        ({"kind": "tests.support.plugins:bowl", "options": {"fault": "grow"}}, 1e20),
    ],
)
def test_divergence_ends_the_run_and_leaves_it_readable(tmp_path, every, problem, rate):
    """Gradients may also overflow between two evaluations of the loss."""
    config = make_config(
        {
            "problem": problem,
            "optimizer": {"learning_rate": rate, "batch_size": 1},
            "run": {"updates": 1000, "eval_every": every},
        }
    )
    message = r"the run diverged: loss \S+ at update \d+, \S+ at the start; learning"
    with pytest.raises(DivergedError, match=message):
        simulate(config, tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.state == "failed"
    assert 0 < len(run.trace) < 50
    assert np.isfinite(run.trace["gradient_norm"]).all()
    due = {*range(0, len(run.trace) + 1, every), len(run.trace)}
    assert run.loss["update"].tolist() == sorted(due)[: len(run.loss)]


def test_a_gradient_of_nan_is_no_divergence(tmp_path):
    problem = {"kind": "tests.support.plugins:bowl", "options": {"fault": "nan"}}
    config = configure(updates=40)
    config = msgspec.structs.replace(config, problem=make_config({"problem": problem}).problem)
    with pytest.raises(RunFailedError, match="the gradient is not finite; lower") as raised:
        simulate(config, tmp_path / "run")
    assert not isinstance(raised.value, DivergedError)


def test_interruption_leaves_the_run_readable(tmp_path):
    seen = []

    def interrupt(progress):
        seen.append(progress)
        raise KeyboardInterrupt

    config = configure("softmax", updates=50_000)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "run", interrupt)
    run = read_run(tmp_path / "run")
    assert run.state == "interrupted"
    (progress,) = seen
    assert (progress.update, progress.updates) == (len(run.trace), 50_000)
    assert progress.mean_staleness == pytest.approx(run.trace["staleness"].mean())
    assert progress.loss == run.loss["loss"].iloc[-1]


def test_bad_input_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="exists and is not empty"):
        simulate(configure(), tmp_path / "full")
    fractional = {"staleness": "constant", "mean_staleness": 2.5}
    with pytest.raises(InputError, match="a whole number for the constant law"):
        simulate(configure(simulation=fractional), tmp_path / "none")
    with pytest.raises(InputError, match='mode = "bounded": expected async, buffered or sync'):
        simulate(configure(cluster={"mode": "bounded"}), tmp_path / "none")
    with pytest.raises(InputError, match="No module named"):
        simulate(make_config({"problem": {"kind": "nowhere_at_all:make"}}), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    path = simulate(configure(updates=5))
    assert path.parent == Path("runs")
    assert read_run(path).state == "finished"


@pytest.mark.parametrize(("rate", "workers", "update", "value"), SERVER_VALUES)
def test_the_second_moment_of_the_server_has_its_known_values(rate, workers, update, value):
    assert server_second_moment(rate, workers, update)[-1] == pytest.approx(value, rel=3e-4)


def test_full_disk_ends_a_simulation_with_status_1(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("problem.kind = 'quadratic'\nrun.updates = 200000\n")
    command = ["prlimit", "--fsize=20000", sys.executable, "-m", "asgd", "simulate"]
    child = subprocess.run(
        [*command, tmp_path / "c.toml", "--out", tmp_path / "run"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 1
    assert re.fullmatch(
        r"asgd: \S+/run/trace/\S+: cannot be used \(File too large\)\n", child.stderr
    )
    found = read_run(tmp_path / "run")
    assert (found.state, child.stderr) == ("failed", f"asgd: {found.failure}\n")


def test_a_simulation_ends_at_its_target_loss(tmp_path: Path) -> None:
    whole = read_run(simulate(configure(updates=400), tmp_path / "whole"))
    losses = whole.loss["loss"].to_numpy()
    target = float(losses[6])
    config = configure(updates=400)
    settings = msgspec.structs.replace(config.run, target_loss=target)
    run = read_run(simulate(msgspec.structs.replace(config, run=settings), tmp_path / "run"))
    first = int(np.argmax(losses <= target))
    end = int(whole.loss["update"][first])
    assert run.state == "finished"
    assert run.ended_early == (
        f"loss {losses[first]:.4g} at update {end:,} reached run.target_loss = {target:g}"
    )
    pd.testing.assert_frame_equal(run.trace, whole.trace[:end])
    pd.testing.assert_frame_equal(run.loss, whole.loss[: first + 1])
    assert run.parameters_update == end
    assert not record_findings(run)


@pytest.mark.parametrize("updates", [0, 1, 77])
def test_a_simulation_ends_when_its_virtual_time_is_up(tmp_path: Path, updates: int) -> None:
    whole = read_run(simulate(configure(updates=200), tmp_path / "whole"))
    seconds = float(whole.trace["applied_seconds"][updates])
    config = configure(updates=200)
    settings = msgspec.structs.replace(config.run, max_seconds=seconds)
    run = read_run(simulate(msgspec.structs.replace(config, run=settings), tmp_path / "run"))
    assert run.ended_early == f"run.max_seconds = {seconds:g} have passed"
    pd.testing.assert_frame_equal(run.trace, whole.trace[:updates])
    assert run.loss["update"].iloc[-1] == updates
    assert not record_findings(run)


def test_metrics_of_a_problem_are_recorded_beside_its_loss(tmp_path: Path) -> None:
    problem = {"kind": "tests.support.plugins:measured"}
    settings = {"problem": problem, "run": {"updates": 100, "eval_every": 30}}
    seen: list[Progress] = []
    run = read_run(simulate(make_config(settings), tmp_path / "run", seen.append))
    assert run.metrics.index.tolist() == run.loss["update"].tolist() == [0, 30, 60, 90, 100]
    np.testing.assert_allclose(run.metrics["distance"] ** 2 / 2, run.loss["loss"])
    assert run.metrics["=first"].iloc[-1] == run.parameters[0]
    assert not record_findings(run)
    assert all(set(progress.metrics) == {"distance", "=first"} for progress in seen)


def test_simulation_and_replay_use_one_blas_thread(tmp_path: Path) -> None:
    with threadpool_limits(2, user_api="blas"):
        path = simulate(configure("tests.support.plugins:Threaded", 40), tmp_path / "run")
        assert set(Threaded.seen[-40:]) == {1}
        assert replay_findings(read_run(path), {}) == []
        assert set(Threaded.seen[-40:]) == {1}
