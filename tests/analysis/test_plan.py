"""Plans, compared with simulated runs, beyond the limits of stability, and for refused input."""

from __future__ import annotations

import heapq
import json
import math
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.exact.limits import stability_limits
from analysis.planning.choices import MOST_PLANNED_WORKERS, choices_of
from analysis.planning.gradient_cost import GradientCost
from analysis.planning.pace import ConfiguredPace, MeasuredPace
from analysis.planning.plan import plan
from analysis.planning.row import updates_to
from analysis.planning.turns import QueueReads, Rounds, ServerTurns
from analysis.profile.queueing import MeasuredTimes, ServerTimes
from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.errors import DivergedError, InputError, RunFailedError
from asgd.rundir.reader import Run, read_run
from asgd.rundir.repeats import read_runs, run_repeats
from asgd.simulation.simulate import simulate
from cluster.core.messages import Gradient, Snapshot
from cluster.core.server import ParameterServer
from scripts.bench_plan import QUICK, curvature, measure

REPEATS = 16


def configure(learning_rate: float = 0.1, workers: int = 4, **tables: dict[str, Any]) -> RunConfig:
    data = {
        "problem": {"kind": "logistic"},
        "optimizer": {"learning_rate": learning_rate},
        "cluster": {"workers": workers, "compute_time": {"law": "gamma", "variation": 0.3}},
        "simulation": {"message_time": 0.001, "service_time": 0.0002},
        "run": {"updates": 200, "eval_every": 4},
    }
    for name, table in tables.items():
        data[name] = {**data.get(name, {}), **table}
    return make_config(data)


@pytest.fixture(scope="module")
def repeats(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    config = configure(run={"updates": 200, "eval_every": 4, "repeats": REPEATS})
    out = tmp_path_factory.mktemp("plan") / "runs"
    return read_runs(run_repeats(config, out, simulate))


def test_time_to_the_target_is_that_of_simulated_runs(repeats: list[Run]) -> None:
    found = plan(configure(), workers=[4], learning_rates=[0.1])
    row = found.rows[0]
    losses = np.stack([run.loss["loss"].to_numpy() for run in repeats])
    seconds = np.mean([run.loss["seconds"].to_numpy() for run in repeats], axis=0)
    update = repeats[0].loss["update"].to_numpy()
    observed = updates_to(update, losses.mean(axis=0), found.target)
    assert observed is not None
    assert row.updates_to_target is not None
    assert row.updates_to_target == pytest.approx(observed, rel=0.05)
    assert row.seconds_to_target == pytest.approx(np.interp(observed, update, seconds), rel=0.07)
    predicted = np.interp(update, row.paths.update, row.mean)
    np.testing.assert_allclose(predicted[1:], losses.mean(axis=0)[1:], rtol=0.04)


def test_a_run_gives_the_plan_of_its_configuration(repeats: list[Run]) -> None:
    measured, configured = MeasuredPace.of(repeats[0]), ConfiguredPace(configure())
    for workers in (4, 8):
        assert measured(workers, 16).law.mean() == pytest.approx(workers - 1, rel=0.01)
        speed = configured(workers, 16).updates_per_second
        assert measured(workers, 16).updates_per_second == pytest.approx(speed, rel=0.03)
    kept = {"workers": [4], "learning_rates": [0.05]}
    one, other = (plan(source, **kept).rows[0] for source in (repeats[0], configure()))
    assert one.diverges_from == pytest.approx(other.diverges_from, rel=0.03)
    assert one.updates_to_target == pytest.approx(other.updates_to_target, rel=0.03)
    assert str(repeats[0].path) in plan(repeats[0], workers=[1], learning_rates=[0.1]).note


def test_an_unstable_choice_is_named_and_its_run_diverges(tmp_path: Path) -> None:
    config = configure(problem={"kind": "least_squares"})
    found = plan(config, workers=[8], learning_rates=[0.02, 0.5])
    calm, wild = found.rows
    assert (calm.stable, calm.remark, found.best) == (True, "", 0)
    assert (wild.stable, wild.seconds_to_target) == (False, None)
    assert wild.remark.startswith("unstable: ")
    assert wild.of_limit > 1 > calm.of_limit
    rate = 3 * wild.diverges_from
    with pytest.raises(DivergedError):
        simulate(configure(rate, 8, problem={"kind": "least_squares"}), tmp_path / "run")
    nothing = plan(config, workers=[8], learning_rates=[rate])
    assert nothing.best is None
    assert math.isnan(nothing.target)
    assert "No choice is stable" in nothing.sentence


def test_noise_that_grows_with_the_distance_is_unstable(tmp_path: Path) -> None:
    """The limits leave this noise out: below all of them paths diverge, and so does a run."""
    config = configure(0.3, 1, problem={"kind": "least_squares"}, run={"updates": 60})
    single = {"workers": [1], "batch_sizes": [1]}
    calm, wild = plan(config, learning_rates=[0.05, 0.3], **single).rows
    assert calm.stable
    assert not wild.stable
    assert "paths diverge" in wild.remark
    assert wild.of_limit < 1
    assert plan(config, learning_rates=[0.3], **single).best is None
    single_sample = {"learning_rate": 0.3, "batch_size": 1}
    diverging = configure(0.3, 1, problem={"kind": "least_squares"}, optimizer=single_sample)
    with pytest.raises(DivergedError):
        simulate(diverging, tmp_path / "run")


STRAGGLER = {"law": "exponential", "mean": [0.01] * 7 + [0.04]}
QUARTIC = {"kind": "quartic", "initial": 1.5, "noise": 0.5}
PHASE = {"kind": "scripts.bench_plan:PhaseRetrieval"}


def lognormal(variation: float) -> dict[str, Any]:
    return {"law": "lognormal", "mean": 0.01, "variation": variation}


def share_of_mean_limit(share: float, workers: int, variation: float) -> float:
    """Return a learning rate for phase retrieval from the limit of the mean at its minimum."""
    cluster = {"workers": workers, "compute_time": lognormal(variation)}
    server = ServerTimes.from_config(make_config({"cluster": cluster}))
    return share * stability_limits(server).mean.value / curvature("phase retrieval")


@pytest.mark.parametrize(
    ("problem", "rate", "batch", "workers", "times"),
    [
        (QUARTIC, 0.4, 4, 8, STRAGGLER),
        (QUARTIC, 0.4, 4, 8, lognormal(2.0)),
        ({"kind": "softmax"}, 2.0, 64, 8, STRAGGLER),
        (PHASE, 0.77, 20, 8, lognormal(1.0)),
        (PHASE, 0.5, 1, 6, lognormal(1.5)),
    ],
    ids=["quartic", "quartic-lognormal", "softmax", "phase", "phase-single-samples"],
)
def test_a_choice_below_the_limit_of_the_mean_whose_runs_diverge_is_never_best(
    problem: dict[str, Any],
    rate: float,
    batch: int,
    workers: int,
    times: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Single runs diverge or oscillate far below the limit of the mean, which once decided."""
    if problem is PHASE:
        rate = share_of_mean_limit(rate, workers, times["variation"])
    data = {
        "problem": problem,
        "optimizer": {"learning_rate": rate, "batch_size": batch},
        "cluster": {"workers": workers, "compute_time": times},
        "run": {"updates": 300, "eval_every": 10},
    }
    config = make_config(data)
    found = plan(config, workers=[workers], learning_rates=[rate])
    row = found.rows[0]
    assert found.best is None
    assert not row.recommendable
    assert row.remark.startswith(("unstable", "heavy tail", "above the limit at the end"))
    wild = 0
    for seed in range(4):
        run = make_config({**data, "run": {**data["run"], "seed": 100 + seed}})
        try:
            loss = read_run(simulate(run, tmp_path / str(seed))).loss["loss"].to_numpy()
            wild += bool(loss.max() > 1.5 * loss[0])
        except RunFailedError:
            wild += 1
    assert wild >= 2 or row.stable


def test_the_note_says_when_there_are_more_workers_than_cores(repeats: list[Run]) -> None:
    found = plan(repeats[0], workers=[1, 4], learning_rates=[0.1])
    assert found.cores == repeats[0].environment["cores"]
    assert (
        "There are 3 cores, and a worker that computes all the time takes one"
        in replace(found, cores=3).note
    )
    assert "computes all the time" not in replace(found, cores=4).note


def test_a_flat_start_is_refused() -> None:
    config = configure(problem={"kind": "quartic", "initial": 0.0})
    with pytest.raises(InputError, match=r"problem.initial: expected a point with a slope"):
        plan(config)


def test_default_workers_stay_in_the_accepted_range() -> None:
    choices = choices_of(configure(workers=6000), None, [0.1], None)
    assert [choice.workers for choice in choices] == [3000, 6000, MOST_PLANNED_WORKERS]


def test_the_fastest_stable_choice_is_marked() -> None:
    short = {"updates": 60}
    config = configure(0.05, 2, problem={"kind": "quadratic"}, run=short)
    found = plan(config, batch_sizes=[4, 16], target=0.1)
    assert [row.choice.workers for row in found.rows[::6]] == [1, 2, 4]
    assert [row.choice.learning_rate for row in found.rows[:6:2]] == [0.025, 0.05, 0.1]
    assert found.best is not None
    times = [row.seconds_to_target for row in found.rows]
    assert times[found.best] == min(seconds for seconds in times if seconds is not None)
    marked = [cells for cells in found.cells()[1:] if cells[0] == "*"]
    assert [cells[1] for cells in marked] == [str(found.rows[found.best].choice.workers)]
    assert found.table()["best"].sum() == 1
    assert "takes as long whatever its batch size" in found.note
    assert found.rows[found.best].paths.paths > 3 * min(row.paths.paths for row in found.rows)
    out_of_reach = plan(config, workers=[2], target=-1.0)
    assert out_of_reach.best is None
    assert "No choice reaches loss -1" in out_of_reach.sentence


def test_synchronous_rounds_have_no_staleness_and_wait_for_the_slowest() -> None:
    law = {"law": "exponential", "mean": 0.01}
    cluster = {"workers": 4, "mode": "sync", "compute_time": law}
    config = configure(cluster=cluster, simulation={"message_time": 0.0, "service_time": 0.0})
    pace = ConfiguredPace(config)(4, 16)
    assert (pace.law.mean(), pace.gradients) == (0.0, 4)
    # The largest of P exponential times has mean (1 + 1/2 + ... + 1/P) times theirs.
    assert 1 / pace.updates_per_second == pytest.approx(0.001 + 0.01 * 25 / 12, rel=0.03)
    asynchronous = configure(cluster={**cluster, "mode": "async"})
    rows = [plan(c, workers=[4], learning_rates=[0.1]).rows[0] for c in (config, asynchronous)]
    assert rows[0].diverges_from > 1.5 * rows[1].diverges_from
    assert rows[0].paths.loss[-1].std() < rows[1].paths.loss[-1].std()


def test_progress_ends_at_one() -> None:
    shares: list[float] = []
    config = configure(problem={"kind": "double_well"}, optimizer={"learning_rate": 0.01})
    plan(config, workers=[1, 2], learning_rates=[0.01], progress=lambda _, s: shares.append(s))
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": [0]}, "workers = 0: expected 1 to 10000"),
        ({"workers": [10**6]}, "workers = 1000000: expected 1 to 10000"),
        ({"learning_rates": [math.nan]}, "learning_rate = nan: expected a finite number"),
        ({"learning_rates": [-1.0]}, "learning_rate = -1.0: expected a finite number > 0"),
        ({"batch_sizes": [0]}, "batch_size = 0: expected"),
        ({"target": math.inf}, "target = inf: expected a finite loss"),
        ({"updates": 0}, "updates = 0: expected 1 to"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(configure(), **options)


def test_a_run_whose_workers_wait_is_refused(tmp_path: Path) -> None:
    config = configure(cluster={"workers": 2, "schedule": "uniform"}, run={"updates": 50})
    run = read_run(simulate(config, tmp_path / "run"))
    with pytest.raises(InputError, match=r"wait for each other; .*config.json"):
        plan(run)


def test_a_curve_is_linear_between_recorded_updates() -> None:
    update, loss = np.array([0, 10, 20]), np.array([4.0, 2.0, 0.0])
    assert updates_to(update, loss, 4.0) == 0
    assert updates_to(update, loss, 3.0) == 5
    assert updates_to(update, loss, 0.1) == 20
    assert updates_to(update, loss, -1.0) is None


def losses_of_runs(config: RunConfig, runs: int, directory: Path) -> np.ndarray:
    """Return the losses of simulated runs, shape (m, runs)."""
    repeated = make_config(
        {**json.loads(config.to_json()), "run": {"updates": 200, "eval_every": 20, "repeats": runs}}
    )
    found = read_runs(run_repeats(repeated, directory / "runs", simulate))
    return np.stack([run.loss["loss"].to_numpy() for run in found], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        {"rule": "momentum", "momentum": 0.5, "learning_rate": 0.04},
        {"rule": "staleness_aware", "learning_rate": 0.3},
        {"clip_norm": 0.5, "learning_rate": 0.1},
        {"rule": "adam", "learning_rate": 0.05},
        {"rule": "capped", "cap": 0.1, "learning_rate": 0.1},
        {"rule": "delay_compensated", "compensation": 0.3, "learning_rate": 0.05},
        {"rule": "corrected_momentum", "learning_rate": 0.04},
        {"learning_rate_schedule": {"at": [60], "values": [0.02]}, "learning_rate": 0.1},
        {"batch_schedule": {"at": [60], "values": [16]}, "learning_rate": 0.1, "batch_size": 2},
    ],
    ids=[
        *("momentum", "staleness-aware", "clipped", "adam", "capped", "compensated", "corrected"),
        *("rates", "batches"),
    ],
)
def test_rules_and_schedules_are_planned_as_they_run(
    optimizer: dict[str, Any], tmp_path: Path
) -> None:
    problem = {"kind": "double_well", "initial": 3.0}
    config = configure(problem=problem, optimizer={"batch_size": 4, **optimizer})
    row = plan(config, workers=[4], learning_rates=[config.optimizer.learning_rate]).rows[0]
    observed = losses_of_runs(config, 40, tmp_path)
    at = [np.searchsorted(row.paths.update, update) for update in (20, 60, 100, 200)]
    assert row.paths.update[at].tolist() == [20, 60, 100, 200]
    seen = observed[[1, 3, 5, 10]]
    error = np.hypot(
        seen.std(axis=1) / np.sqrt(seen.shape[1]),
        row.paths.loss[at].std(axis=1) / np.sqrt(row.paths.paths),
    )
    assert np.all(np.abs(row.mean[at] - seen.mean(axis=1)) < 4 * error)


def test_schedules_are_scaled_with_their_first_value() -> None:
    optimizer = {"learning_rate_schedule": {"at": [50], "values": [0.02]}}
    config = configure(0.1, optimizer=optimizer, problem={"kind": "quadratic"})
    once, twice = plan(config, workers=[1], learning_rates=[0.1, 0.2]).rows
    assert once.end.learning_rate == 0.02
    assert twice.end.learning_rate == pytest.approx(0.04)


@pytest.mark.parametrize("bound", [0, 1, 3, 6, 20])
def test_bounded_turns_are_those_of_the_real_server(bound: int) -> None:
    """A server with the same compute times makes each update from the same versions."""
    workers, updates, rng = 5, 80, np.random.default_rng(bound)
    times = rng.exponential(1.0, (workers, updates + 1))
    turns = QueueReads(_Given.of(times), 1, rng, bound=bound)
    expected = []
    for k in range(updates):
        reads = turns.next(k)
        expected.append((sorted(reads.version.tolist()), float(turns.seconds[0])))
    assert _versions_of_the_server(times, bound, updates) == [
        (versions, pytest.approx(seconds)) for versions, seconds in expected
    ]


class _Given(MeasuredTimes):
    """The given times of each worker, in their order."""

    @classmethod
    def of(cls, times: np.ndarray) -> ServerTimes:
        given = cls(list(times))
        object.__setattr__(given, "left", [iter(row.tolist()) for row in times])
        return ServerTimes(given)

    def draw_each(self, workers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.array([next(self.left[worker]) for worker in workers.tolist()])  # type: ignore[attr-defined]


def _versions_of_the_server(
    times: np.ndarray, bound: int, updates: int
) -> list[tuple[list[int], float]]:
    """Return the versions that each update of a `ParameterServer` reads, and its virtual time."""
    config = make_config(
        {
            "problem": {"kind": "quadratic"},
            "cluster": {"workers": len(times), "mode": "bounded", "max_staleness": bound},
            "run": {"updates": updates},
        }
    )
    server = ParameterServer(config, np.ones(1))
    left = [iter(row.tolist()) for row in times]
    arrivals: list[tuple[float, int, Snapshot]] = []
    found: list[tuple[list[int], float]] = []

    def send(replies: list[tuple[int, Any]], now: float) -> None:
        for worker, reply in replies:
            if isinstance(reply, Snapshot):
                heapq.heappush(arrivals, (now + next(left[worker]), worker, reply))

    for worker in range(len(times)):
        send(server.join(worker, 0.0), 0.0)
    while len(found) < updates:
        now, worker, snapshot = heapq.heappop(arrivals)
        answer = Gradient(
            worker, snapshot.sequence, snapshot.version, snapshot.epoch, np.zeros(1), 0.0
        )
        send(server.receive(answer, now), now)
        record = server.drain()
        shared = record.members["update"], record.members["read_version"]
        for update, version in zip(
            record.trace["update"], record.trace["read_version"], strict=True
        ):
            members = shared[1][shared[0] == update].tolist()
            found.append((sorted(members or [int(version)]), now))
    return found


def test_rounds_equal_bound_0_and_a_large_bound_equals_none() -> None:
    server = ServerTimes.from_config(configure(workers=4))
    rng = [np.random.default_rng(3) for _ in range(4)]
    rounds: ServerTurns = Rounds(server, 400, rng[0])
    bound = QueueReads(server, 400, rng[1], bound=0)
    free, loose = QueueReads(server, 400, rng[2]), QueueReads(server, 400, rng[3], bound=1000)
    for k in range(30):
        assert np.all(rounds.next(k).version == k)
        assert np.all(bound.next(k).version == k)
        one, other = free.next(k), loose.next(k)
        assert np.array_equal(one.version, other.version)
    seconds = rounds.seconds - 30 * 4 * 0.0002, bound.seconds - 30 * 0.0002
    scatter = np.hypot(seconds[0].std(), seconds[1].std()) / 20
    assert abs(seconds[0].mean() - seconds[1].mean()) < 4 * scatter
    assert np.array_equal(free.seconds, loose.seconds)


def test_bounded_mode_is_planned() -> None:
    cluster = {"workers": 8, "mode": "bounded", "max_staleness": 2}
    cluster["compute_time"] = {"law": "lognormal", "variation": 1.0}
    row = plan(configure(0.1, cluster=cluster), workers=[8], learning_rates=[0.1]).rows[0]
    loose = configure(0.1, cluster={**cluster, "mode": "async"})
    asynchronous = plan(loose, workers=[8], learning_rates=[0.1]).rows[0]
    assert row.pace.law.mean() <= 2.0
    assert row.pace.updates_per_second < 0.7 * asynchronous.pace.updates_per_second
    assert row.updates_to_target is not None


def test_a_gradient_may_take_longer_with_a_larger_batch() -> None:
    cost = GradientCost.through((8, 0.010), (40, 0.018), "said so")
    assert (cost.fixed, cost.per_sample) == (pytest.approx(0.008), pytest.approx(0.00025))
    fixed = configure(cluster={"compute_time": {"law": "constant", "mean": 0.01}})
    pace = ConfiguredPace(fixed, cost)
    cycle = 0.01 + 0.002 + cost.seconds(40)
    assert pace(1, 40).updates_per_second == pytest.approx(1 / (cycle + 0.0002), rel=1e-3)
    assert pace(1, 8).updates_per_second > pace(1, 40).updates_per_second
    config = configure(problem={"kind": "quadratic"}, run={"updates": 60})
    small = {"workers": [1], "learning_rates": [0.05], "batch_sizes": [4, 4096]}
    found = plan(config, **small, probe=True)
    assert found.cost is not None
    assert "timed in this process" in found.note
    assert found.cost.per_sample >= 0.0  # its size depends on the load of the machine
    assert found.rows[1].pace.updates_per_second <= found.rows[0].pace.updates_per_second


def test_a_run_with_several_batch_sizes_gives_the_cost_of_a_gradient(repeats: list[Run]) -> None:
    assert GradientCost.of_run(repeats[0]) is None
    trace = repeats[0].trace.assign(batch_size=np.arange(200) % 2 * 30 + 10)
    trace["compute_seconds"] = 0.004 + 0.0002 * trace["batch_size"]
    run = copy(repeats[0])
    vars(run)["trace"] = trace
    cost = GradientCost.of_run(run)
    assert cost is not None
    assert (cost.fixed, cost.per_sample) == (pytest.approx(0.004), pytest.approx(0.0002))
    measured = MeasuredPace.of(run)
    slower = 1 / measured(1, 40).updates_per_second - 1 / measured(1, 10).updates_per_second
    assert slower == pytest.approx(30 * cost.per_sample)


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK[:3], ids=str)
def test_some_cases_of_bench_plan(case: Any, tmp_path: Path) -> None:
    """They agree with the runs within their scatter."""
    row = measure(case, 96, tmp_path, simulate, "simulated")
    assert row["missed"] not in ("diverges", "false alarm", "target")
    if row["observed updates"] != "":
        off = abs(row["predicted updates"] - row["observed updates"])
        assert off <= max(0.1 * row["observed updates"], 3 * row["+-"])
