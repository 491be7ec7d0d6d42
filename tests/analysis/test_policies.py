"""Runs whose server discards or averages gradients: work by worker, and refused predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from analysis.planning.pace import ConfiguredPace, MeasuredPace
from analysis.prediction.predict import predict
from analysis.profile.fitting import fit_run
from analysis.profile.queueing import explains_staleness
from analysis.profile.repeats import fit_runs
from analysis.profile.work import bias, bias_in_words, work_by_worker
from analysis.report.activity import workers_table
from analysis.report.write import write_report
from analysis.study import Study
from asgd.config.make import make_config
from asgd.config.tables import BatchSchedule, RunConfig
from asgd.errors import InputError
from asgd.rundir.reader import Run, read_run
from asgd.rundir.repeats import read_runs, run_repeats
from asgd.simulation.simulate import simulate

MEANS = [0.01, 0.01, 0.01, 0.05]


def configure(updates: int = 1500, repeats: int = 1, **cluster: Any) -> RunConfig:
    return make_config(
        {
            "problem": {"kind": "quadratic"},
            "optimizer": {"learning_rate": 0.02},
            "cluster": {
                "workers": 4,
                "compute_time": {"law": "exponential", "mean": MEANS},
                **cluster,
            },
            "run": {"updates": updates, "eval_every": 50, "repeats": repeats},
        }
    )


def simulated(tmp_path: Path, **cluster: Any) -> Run:
    return read_run(simulate(configure(**cluster), tmp_path / "run"))


def test_every_gradient_counts_as_work_of_its_worker(tmp_path: Path) -> None:
    run = simulated(tmp_path, mode="sync", gradients_per_update=2)
    work = work_by_worker(run)
    assert work["applied"].sum() == len(run.members) == 2 * 1500
    assert work["discarded"].sum() == len(run.discarded) > 0
    for worker, row in work.set_index("worker").iterrows():
        delivered = row["applied"] + row["discarded"]
        last = max(
            table["sequence"][table["worker"] == worker].max()
            for table in (run.members, run.discarded)
        )
        assert delivered == last + 1  # the numbers have no gap
        assert row["discarded_share"] == row["discarded"] / delivered
        assert row["delivered_share"] == delivered / (len(run.members) + len(run.discarded))
        assert row["applied_share"] == row["applied"] / len(run.members)


def test_slow_worker_is_named_with_both_reasons(tmp_path: Path) -> None:
    run = simulated(tmp_path, discard_above=2)
    found = bias(run)
    assert found is not None
    share = run.discarded["worker"].eq(3).sum() / (
        run.discarded["worker"].eq(3).sum() + run.trace["worker"].eq(3).sum()
    )
    assert f"{100 * share:.3g} % of those of worker 3" in found["sentence"]
    assert "because it delivers less often" in found["sentence"]
    assert "because more of its gradients are discarded" in found["sentence"]
    table = workers_table(run).set_index("worker")
    assert table["discarded_share"][3] == pytest.approx(share)
    assert table["discarded"].sum() == len(run.discarded)
    study = Study.open(run.path)
    study.predict(paths=4)
    page = write_report(study).read_text()
    assert "because more of its gradients are discarded" in page
    assert "they show the fast ones" in page
    assert "Errors of each model" in page
    assert "error of the geometric prediction" not in page  # only the replay predicts it


def test_a_worker_that_delivers_often_is_not_called_rare() -> None:
    work = pd.DataFrame({"worker": [0, 1], "applied": [30, 70], "discarded": [90, 10]})
    delivered = work["applied"] + work["discarded"]
    work["discarded_share"] = work["discarded"] / delivered
    work["delivered_share"] = delivered / delivered.sum()
    work["applied_share"] = work["applied"] / work["applied"].sum()
    assert bias_in_words(work).endswith(
        "an even share is 50 %: 1.67 times less, although it delivers as often: more of its "
        "gradients are discarded."
    )


def test_worker_without_applied_gradients_is_named(tmp_path: Path) -> None:
    times = {"law": "constant", "mean": [0.01, 0.01, 0.01, 0.1]}
    run = simulated(tmp_path, mode="sync", gradients_per_update=2, compute_time=times)
    found = bias(run)
    assert found is not None
    # The first two always arrive first; the third is as fast, but comes just too late each time.
    assert found["applied"][2:] == [0, 0]
    assert "No gradient of workers 2, 3 was applied." in found["sentence"]
    table = workers_table(run).set_index("worker")
    assert table["updates"].tolist() == found["applied"]
    assert table["discarded"].tolist() == found["discarded"]
    page = write_report(run.path).read_text()
    assert "100 % of its gradients are discarded; see what slows it down" in " ".join(page.split())


def test_plain_runs_have_no_bias_to_report(tmp_path: Path) -> None:
    run = simulated(tmp_path)
    assert bias(run) is None
    assert "discarded" not in workers_table(run)


def test_staleness_of_a_buffer_is_fitted_by_gradient(tmp_path: Path) -> None:
    run = simulated(tmp_path, mode="buffered", gradients_per_update=3)
    fit = fit_run(run)
    staleness = (run.members["update"] - run.members["read_version"]).to_numpy()
    np.testing.assert_array_equal(fit.sample.staleness, staleness[fit.start_up :])
    assert fit.start_up % 3 == 0  # whole updates
    assert fit.workers is None
    assert "P - 1" not in fit.summary
    repeats = run_repeats(
        configure(400, 2, mode="buffered", gradients_per_update=3), tmp_path / "two", simulate
    )
    joined = fit_runs(read_runs(repeats)).sample.step
    assert joined is not None
    assert (np.diff(joined) >= 0).all()
    assert len(np.unique(joined)) <= 800


def test_mean_staleness_is_not_compared_with_that_of_a_pool(tmp_path: Path) -> None:
    run = simulated(tmp_path, discard_above=2)
    fit = fit_run(run)
    assert fit.workers is None
    assert "P - 1" not in fit.summary
    assert "predict with" not in fit.verdict
    assert explains_staleness(run) is None


def test_the_replay_of_averaged_gradients_refuses_a_batch_schedule(tmp_path: Path) -> None:
    config = configure(200, mode="buffered", gradients_per_update=3)
    schedule = {"at": [100], "values": [3]}
    optimizer = msgspec.structs.replace(config.optimizer, batch_schedule=BatchSchedule(**schedule))
    config = msgspec.structs.replace(config, optimizer=optimizer)
    with pytest.raises(
        InputError, match=r"batch_schedule: expected none with .*gradients_per_update = 3"
    ) as told:
        predict(read_run(simulate(config, tmp_path / "run")))
    assert "\n" not in str(told.value)


def test_laws_do_not_predict_chosen_gradients(tmp_path: Path) -> None:
    run = simulated(tmp_path, discard_above=2)
    assert predict(run, paths=4).models == ["replay"]
    for models in (["sme_law"], ["replay", "sme_sgd"]):
        with pytest.raises(
            InputError, match=r"expected 'replay' alone for .* discards gradients or mixes"
        ):
            predict(run, models=models)


@pytest.mark.parametrize(
    ("key", "cluster"),
    [
        ("discard_above", {"discard_above": 2}),
        ("gradients_per_update", {"mode": "buffered", "gradients_per_update": 3}),
        ("gradients_per_update", {"mode": "sync", "gradients_per_update": 3}),
    ],
)
def test_plans_refuse_policies(tmp_path: Path, key: str, cluster: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"cluster\.{key} = .*in mode"):
        ConfiguredPace(configure(**cluster))
    run = read_run(simulate(configure(200, **cluster), tmp_path / "run"))
    with pytest.raises(InputError, match=rf"cluster\.{key} = .*in mode"):
        MeasuredPace.of(run)
