"""Plans: against simulated runs, at the limit of stability, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.choices import MOST_WORKERS, choices_of
from analysis.pace import ConfiguredPace, MeasuredPace
from analysis.planning import plan, updates_to
from asgd.config import RunConfig, make_config
from asgd.errors import DivergedError, InputError
from asgd.experiment import read_runs, run_repeats
from asgd.simulation import simulate
from asgd.trace import Run, read_run

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
    assert row.curve is not None
    predicted = np.interp(update, row.curve.update, row.curve.mean)
    np.testing.assert_allclose(predicted[1:], losses.mean(axis=0)[1:], rtol=0.04)


def test_a_run_gives_the_plan_of_its_configuration(repeats: list[Run]) -> None:
    measured, configured = MeasuredPace.of(repeats[0]), ConfiguredPace(configure())
    for workers in (4, 8):
        assert measured(workers).law.mean() == pytest.approx(workers - 1, rel=0.01)
        speed = configured(workers).updates_per_second
        assert measured(workers).updates_per_second == pytest.approx(speed, rel=0.03)
    kept = {"workers": [4], "learning_rates": [0.05]}
    one, other = (plan(source, **kept).rows[0] for source in (repeats[0], configure()))
    assert one.largest_stable == pytest.approx(other.largest_stable, rel=0.03)
    assert one.updates_to_target == pytest.approx(other.updates_to_target, rel=0.03)
    assert str(repeats[0].path) in plan(repeats[0], workers=[1], learning_rates=[0.1]).note


def test_what_is_unstable_is_said_to_be_and_diverges(tmp_path: Path) -> None:
    config = configure(problem={"kind": "least_squares"})
    found = plan(config, workers=[8], learning_rates=[0.02, 0.5])
    calm, wild = found.rows
    assert (calm.stable, calm.remark, found.best) == (True, "", 0)
    assert (wild.stable, wild.remark, wild.seconds_to_target) == (False, "unstable", None)
    assert wild.of_limit > 1 > calm.of_limit
    rate = 3 * wild.largest_stable
    with pytest.raises(DivergedError):
        simulate(configure(rate, 8, problem={"kind": "least_squares"}), tmp_path / "run")
    nothing = plan(config, workers=[8], learning_rates=[rate])
    assert nothing.best is None
    assert math.isnan(nothing.target)
    assert "No choice is stable" in nothing.sentence


def test_noise_that_grows_with_the_distance_is_unstable(tmp_path: Path) -> None:
    """Below the limit of the mean: the exact second moment explodes, and so does a run."""
    config = configure(0.3, 1, problem={"kind": "least_squares"}, run={"updates": 60})
    single = {"workers": [1], "batch_sizes": [1]}
    calm, wild = plan(config, learning_rates=[0.05, 0.3], **single).rows
    assert (calm.stable, calm.remark) == (True, "")
    assert (wild.stable, wild.remark) == (False, "unstable: noise outgrows")
    assert wild.of_limit < 1
    assert plan(config, learning_rates=[0.3], **single).best is None
    single_sample = {"learning_rate": 0.3, "batch_size": 1}
    diverging = configure(0.3, 1, problem={"kind": "least_squares"}, optimizer=single_sample)
    with pytest.raises(DivergedError):
        simulate(diverging, tmp_path / "run")


def test_a_flat_start_tells_nothing() -> None:
    config = configure(problem={"kind": "quartic", "initial": 0.0})
    with pytest.raises(InputError, match=r"problem.initial: slope and curvature are 0"):
        plan(config)


def test_default_workers_stay_among_the_accepted_ones() -> None:
    choices = choices_of(configure(workers=6000), None, [0.1], None)
    assert [choice.workers for choice in choices] == [3000, 6000, MOST_WORKERS]


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
    out_of_reach = plan(config, workers=[2], target=-1.0)
    assert out_of_reach.best is None
    assert "No choice reaches loss -1" in out_of_reach.sentence


def test_synchronous_rounds_have_no_staleness_and_wait_for_the_slowest() -> None:
    law = {"law": "exponential", "mean": 0.01}
    cluster = {"workers": 4, "mode": "sync", "compute_time": law}
    config = configure(cluster=cluster, simulation={"message_time": 0.0, "service_time": 0.0})
    pace = ConfiguredPace(config)(4)
    assert (pace.law.mean(), pace.gradients) == (0.0, 4)
    # The largest of P exponential times has mean (1 + 1/2 + ... + 1/P) times theirs.
    assert 1 / pace.updates_per_second == pytest.approx(0.001 + 0.01 * 25 / 12, rel=0.03)
    asynchronous = configure(cluster={**cluster, "mode": "async"})
    rows = [plan(c, workers=[4], learning_rates=[0.1]).rows[0] for c in (config, asynchronous)]
    assert rows[0].largest_stable > 1.5 * rows[1].largest_stable
    assert rows[0].curve is not None
    assert rows[1].curve is not None
    assert rows[0].curve.std[-1] < rows[1].curve.std[-1]


def test_progress_reaches_the_whole() -> None:
    shares: list[float] = []
    config = configure(problem={"kind": "double_well"}, optimizer={"learning_rate": 0.01})
    plan(config, workers=[1, 2], learning_rates=[0.01], progress=lambda _, s: shares.append(s))
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("tables", "options", "message"),
    [
        ({"optimizer": {"rule": "momentum"}}, {}, "optimizer.rule = 'momentum': plans are made"),
        ({"optimizer": {"clip_norm": 1.0}}, {}, "optimizer.clip_norm = 1.0"),
        (
            {"optimizer": {"batch_schedule": {"at": [5], "values": [4]}}},
            {},
            r"optimizer.batch_schedule.at = \[5\]",
        ),
        ({"cluster": {"mode": "bounded"}}, {}, "cluster.mode = 'bounded'"),
        ({}, {"workers": [0]}, "workers = 0: expected 1 to 10000"),
        ({}, {"workers": [10**6]}, "workers = 1000000: expected 1 to 10000"),
        ({}, {"learning_rates": [math.nan]}, "learning rate = nan: expected a finite number"),
        ({}, {"learning_rates": [-1.0]}, "learning rate = -1.0: expected a finite number > 0"),
        ({}, {"batch_sizes": [0]}, "batch size = 0: expected"),
        ({}, {"target": math.inf}, "target = inf: expected a finite loss"),
        ({}, {"updates": 0}, "updates = 0: expected 1 to"),
    ],
)
def test_what_no_plan_is_made_for(
    tables: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan(configure(**tables), **options)


def test_a_run_whose_workers_wait_is_refused(tmp_path: Path) -> None:
    config = configure(cluster={"workers": 2, "schedule": "uniform"}, run={"updates": 50})
    run = read_run(simulate(config, tmp_path / "run"))
    with pytest.raises(InputError, match=r"wait for nobody; take .*config.json"):
        plan(run)


def test_between_recorded_updates_a_curve_is_straight() -> None:
    update, loss = np.array([0, 10, 20]), np.array([4.0, 2.0, 0.0])
    assert updates_to(update, loss, 4.0) == 0
    assert updates_to(update, loss, 3.0) == 5
    assert updates_to(update, loss, 0.1) == 20
    assert updates_to(update, loss, -1.0) is None
