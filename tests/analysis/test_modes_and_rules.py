"""Predictions of runs that wait, of rules other than SGD, and of data that differ by worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from analysis.planning.plan import plan
from analysis.prediction.predict import Prediction, predict
from analysis.prediction.score import compare
from analysis.profile.queueing import config_staleness
from analysis.profile.repeats import fit_runs
from analysis.report.activity import events_table, workers_table
from analysis.report.headline import headline
from asgd.config.make import make_config
from asgd.config.tables import DataConfig, RunConfig
from asgd.errors import InputError
from asgd.local_steps import not_a_gradient
from asgd.rundir.reader import Run
from asgd.rundir.repeats import read_runs, run_repeats
from asgd.rundir.writer import RunWriter
from asgd.simulation.simulate import simulate
from tests.support.faults import Crowd

REPEATS, PATHS = 8, 64
# A right curve exceeds it with probability 0.27 %, even if all its points move together.
THREE_SIGMA = 9.0
AT_ONCE = {"compute_time": {"law": "none"}}  # workers do not wait
BUFFERED = {"mode": "buffered", "gradients_per_update": 3}
SMALL = {"problem": {"kind": "least_squares"}}
LOCAL = {"learning_rate": 0.7, "local_steps": 3, "local_learning_rate": 0.02}
KEPT = {"local_state": "keep", "local_learning_rate": 0.003}
TOP: dict[str, Any] = {"compression": "top_k", "compression_share": 0.1}
HALF = TOP | {"compression_share": 0.5}
BYTES = {"compression": "int8"}


def configure(**tables: dict[str, Any]) -> RunConfig:
    data = {
        "problem": {"kind": "logistic"},
        "data": {},
        "optimizer": {"learning_rate": 0.05},
        "cluster": {"workers": 4, "compute_time": {"law": "exponential"}},
        "run": {"updates": 160, "eval_every": 16, "repeats": REPEATS},
    }
    return make_config({name: {**table, **tables.get(name, {})} for name, table in data.items()})


def served(config: RunConfig, out: Path) -> None:
    """Record a run of a server whose workers push in random order; the clock counts messages."""
    crowd, draws = Crowd(config), np.random.default_rng(config.run.seed)
    crowd.join_all()
    while crowd.at_hand:
        crowd.push(int(draws.choice(sorted(crowd.at_hand))))
    record, writer = crowd.server.drain(), RunWriter.create(out, config)
    writer.trace(record.trace)
    writer.members(record.members)
    writer.discarded(record.discarded)
    writer.positions(record.positions)
    losses = [float(crowd.problem.loss(e.parameters)) for e in record.evaluations]
    update, seconds = ([getattr(e, n) for e in record.evaluations] for n in ("update", "seconds"))
    writer.loss({"update": update, "seconds": seconds, "loss": losses})
    writer.event("finish")


def mean_square_z(runs: list[Run], prediction: Prediction, model: str) -> float:
    """Return the mean of z^2 along a predicted mean, whose neighbouring points are correlated."""
    curve = prediction.curve(model)
    observed = np.stack([run.loss["loss"].to_numpy() for run in runs]).mean(axis=0)
    paths = prediction.paths(model) or np.inf
    scatter = curve["loss_std"].to_numpy()[1:] * np.sqrt(1 / REPEATS + 1 / paths)
    z = (curve["loss_mean"].to_numpy() - observed)[1:] / scatter
    return float(np.mean(z**2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "tables", "models"),
    [
        (simulate, {"optimizer": {"rule": "momentum", "learning_rate": 0.01}}, ["replay"]),
        (simulate, {"optimizer": {"rule": "staleness_aware"}}, ["replay"]),
        (simulate, {"optimizer": {"clip_norm": 0.3}}, ["replay"]),
        (simulate, {"optimizer": {"rule": "corrected_momentum"}}, ["replay"]),
        (simulate, {"optimizer": {"rule": "adam", "learning_rate": 0.02}}, ["replay"]),
        (simulate, {"optimizer": {"rule": "nesterov", "learning_rate": 0.01}}, ["replay"]),
        (simulate, {"optimizer": {"rule": "capped", "cap": 0.05}}, ["replay"]),
        (
            simulate,
            {"optimizer": {"rule": "delay_compensated", "compensation": 1.0}},
            ["replay"],
        ),
        (simulate, {"optimizer": {"rule": "tests.support.rules:Branches"}}, ["replay"]),
        (simulate, {"optimizer": LOCAL, **SMALL}, ["replay"]),
        (
            simulate,
            {"optimizer": LOCAL | {"local_rule": "adam", **KEPT}, **SMALL},
            ["replay"],
        ),
        (
            served,
            {
                "optimizer": LOCAL | {"local_rule": "momentum", **KEPT},
                "cluster": {"mode": "bounded", "max_staleness": 3, **AT_ONCE},
                **SMALL,
            },
            ["replay"],
        ),
        (
            simulate,
            {
                "optimizer": LOCAL | {"local_rule": "momentum", **KEPT},
                "cluster": {"mode": "buffered", "gradients_per_update": 2, "discard_above": 1},
                **SMALL,
            },
            ["replay"],
        ),
        (simulate, {"cluster": TOP}, ["replay"]),
        (simulate, {"cluster": BYTES | {"discard_above": 2}}, ["replay"]),
        (
            served,
            {
                "optimizer": LOCAL | {"local_rule": "momentum", **KEPT},
                "cluster": {"mode": "bounded", "max_staleness": 3, **HALF, **AT_ONCE},
                **SMALL,
            },
            ["replay"],
        ),
        (served, {"cluster": {"mode": "sync", **AT_ONCE}, **SMALL}, ["sme_sgd", "replay"]),
        (
            served,
            {"cluster": {"mode": "bounded", "max_staleness": 3, **AT_ONCE}, **SMALL},
            ["sme_sgd", "sme_asgd", "sme_law", "replay"],
        ),
        (simulate, {"cluster": {"discard_above": 1}, **SMALL}, ["replay"]),
        (simulate, {"cluster": {"mode": "buffered", "gradients_per_update": 3}}, ["replay"]),
        (
            simulate,
            {"cluster": {"mode": "sync", "gradients_per_update": 2, "late": "keep"}, **SMALL},
            ["replay"],
        ),
        (
            simulate,
            {"cluster": {"mode": "buffered", "gradients_per_update": 3, "discard_above": 0}},
            ["sme_sgd", "replay"],
        ),
        (
            simulate,
            {"cluster": {"mode": "sync", "gradients_per_update": 2}, **SMALL},
            ["sme_sgd", "replay"],
        ),
    ],
    ids=[
        *("momentum", "staleness_aware", "clipped", "corrected", "adam", "nesterov", "capped"),
        *("compensated", "own", "local", "local adam", "local bounded"),
        *("local buffered", "top_k", "int8", "local top_k", "sync", "bounded"),
        *("ringmaster", "fedbuff", "kept", "rennala", "fastest"),
    ],
)
def test_prediction_is_within_the_scatter_of_the_runs(
    tmp_path: Path,
    make: Callable[[RunConfig, Path], object],
    tables: dict[str, Any],
    models: list[str],
) -> None:
    runs = read_runs(run_repeats(configure(**tables), tmp_path / "runs", make))
    prediction = predict(runs, paths=PATHS)
    assert prediction.models == models
    assert ("no law predicts" in fit_runs(runs).verdict) == (models == ["replay"])
    for model in {"sme_law", "replay"} & set(models) or models:
        assert mean_square_z(runs, prediction, model) < THREE_SIGMA
    stability = prediction.settings.stability
    optimizer = runs[0].config.optimizer
    known = ("sgd", "momentum", "staleness_aware", "corrected_momentum")
    cluster = tables.get("cluster", {"mode": "bounded"})
    if feature := not_a_gradient(runs[0].config):
        assert (stability.verdict, stability.start.covered) == (None, False)
        assert f"no limit of the learning rate is known for {feature}" in stability.sentence
    elif models == ["replay"] and cluster.get("mode") != "bounded":
        assert (stability.verdict, stability.start.covered) == (None, False)
        assert "is known for this policy of the server" in stability.sentence
    elif optimizer.rule in known:
        assert stability.verdict == "stable"
    else:
        assert (stability.verdict, stability.start.covered) == (None, False)
        assert "no limit of the learning rate is known for this rule" in stability.sentence
    assert compare(runs, prediction).models[models[0]].relative_error < 0.1


@pytest.mark.parametrize(
    ("make", "tables"),
    [
        (simulate, {"data": {"shards": "by_label"}, "optimizer": {"learning_rate": 0.2}}),
        (simulate, {"data": {"shards": "partition"}, "optimizer": {"rule": "momentum"}}),
        (simulate, {"data": {"shards": "by_label"}, "optimizer": LOCAL}),
        (served, {"data": {"shards": "by_label"}, "cluster": {"mode": "sync", **AT_ONCE}}),
        (simulate, {"data": {"sampling": "epoch"}}),
        (simulate, {"data": {"sampling": "epoch", "shards": "partition"}}),
        (served, {"data": {"sampling": "epoch"}, "cluster": {"mode": "sync", **AT_ONCE}}),
        (served, {"data": {"sampling": "epoch"}, "cluster": {**BUFFERED, **AT_ONCE}}),
        (
            served,
            {
                "data": {"sampling": "epoch", "shards": "by_label"},
                "cluster": {**BUFFERED, "discard_above": 0, **AT_ONCE},
            },
        ),
    ],
    ids=[
        "by_label",
        "partition",
        "local steps",
        "sync",
        "epochs",
        "epochs of parts",
        "sync epochs",
        "buffered epochs",
        "discarded epochs",
    ],
)
def test_data_that_differ_by_worker_are_replayed_as_they_were_drawn(
    tmp_path: Path, make: Callable[[RunConfig, Path], object], tables: dict[str, Any]
) -> None:
    runs = read_runs(run_repeats(configure(**tables), tmp_path / "runs", make))
    prediction = predict(runs, paths=PATHS)
    assert prediction.models == ["replay"]
    assert prediction.paths("replay") == PATHS
    assert mean_square_z(runs, prediction, "replay") < THREE_SIGMA
    stability = prediction.settings.stability
    assert (stability.verdict, stability.start.covered) == (None, False)
    data = runs[0].config.data
    key = f"data.shards = '{data.shards}'"
    if data.shards == "shared":
        key = "data.sampling = 'epoch'"
    assert "no law predicts: the replay" in fit_runs(runs).verdict
    assert f"which does not hold with {key}" in stability.sentence
    assert compare(runs, prediction).models["replay"].relative_error < 0.1


def test_a_slow_worker_with_a_class_of_its_own_is_replayed(tmp_path: Path) -> None:
    means = [0.01, 0.01, 0.01, 0.1]
    slow = {"compute_time": {"law": "exponential", "mean": means}}
    config = configure(data={"shards": "by_label"}, cluster=slow)
    runs = read_runs(run_repeats(config, tmp_path / "runs", simulate))
    prediction = predict(runs, paths=PATHS)
    assert mean_square_z(runs, prediction, "replay") < THREE_SIGMA
    tables = workers_table(runs[0]), events_table(runs[0]).iloc[:0]
    score = compare(runs, prediction)
    facts = dict(headline(runs, fit_runs(runs), prediction, score, *tables))
    assert "each worker's from a part of the samples by class: 8" in facts["What was run"]
    assert "samples of its own, which weigh as much in the run" in facts["Who contributed"]
    assert "Worker 3 has " in facts["Who contributed"]
    assert "predict with" not in facts["Which law"]
    everything = [
        Run(run.path, msgspec.structs.replace(run.config, data=DataConfig())) for run in runs
    ]
    shared = predict(everything, paths=PATHS, models=["replay"], method="simulate")
    assert mean_square_z(runs, shared, "replay") > 20


def test_theory_is_refused_for_data_that_differ_by_worker(tmp_path: Path) -> None:
    config = configure(
        data={"shards": "by_label"}, run={"repeats": 1}, optimizer={"learning_rate": 0.2}
    )
    run = read_runs(run_repeats(config, tmp_path / "run", simulate))[0]
    for call, message in (
        (lambda: predict(run, models=("sme_law", "replay")), "expected 'replay' alone"),
        (
            lambda: predict(run, method="fast"),
            "method = 'fast': expected 'auto' or 'simulate', or the rule sgd, not data.shards",
        ),
        (lambda: plan(run), "for a plan"),
        (lambda: plan(config), "for a plan"),
    ):
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "data.shards = 'by_label'" in str(error.value)


def test_momentum_has_no_model_but_the_replay(tmp_path: Path) -> None:
    config = configure(optimizer={"rule": "momentum"}, run={"repeats": 1})
    runs = read_runs(run_repeats(config, tmp_path / "run", simulate))
    with pytest.raises(InputError, match="expected 'replay' alone"):
        predict(runs, models=("sme_law",))
    with pytest.raises(
        InputError, match="method = 'fast': expected 'auto' or 'simulate', or the rule sgd"
    ):
        predict(runs, method="fast")


@pytest.mark.parametrize("cluster", [TOP, BYTES], ids=lambda one: one["compression"])
def test_theory_of_gradients_refuses_compressed_ones(
    tmp_path: Path, cluster: dict[str, Any]
) -> None:
    config = configure(cluster=cluster, run={"repeats": 1})
    runs = read_runs(run_repeats(config, tmp_path / "run", simulate))
    named = f"cluster.compression = '{cluster['compression']}'"
    for wrong in (
        lambda: predict(runs, models=("sme_law",)),
        lambda: predict(runs, method="fast"),
        lambda: plan(config),
        lambda: plan(runs[0]),
    ):
        with pytest.raises(InputError, match=named) as refused:
            wrong()
        assert "\n" not in str(refused.value)
    assert named in fit_runs(runs).verdict
    events, workers = events_table(runs[0]).iloc[:0], workers_table(runs[0])
    said = dict(headline(runs, fit_runs(runs), None, None, workers, events, missing="no"))
    how = "the largest 10 % of the entries sent" if cluster is TOP else "sent in 8 bits a number"
    assert f"batches of 16, {how}" in said["What was run"]


def test_theory_of_gradients_refuses_local_steps(tmp_path: Path) -> None:
    config = configure(optimizer=LOCAL, run={"repeats": 1})
    runs = read_runs(run_repeats(config, tmp_path / "run", simulate))
    for wrong in (
        lambda: predict(runs, models=("sme_law",)),
        lambda: predict(runs, method="fast"),
        lambda: plan(config),
        lambda: plan(runs[0]),
        lambda: config_staleness(config),
    ):
        with pytest.raises(InputError, match=r"optimizer.local_steps = 3") as refused:
            wrong()
        assert "\n" not in str(refused.value)
    events, workers = events_table(runs[0]).iloc[:0], workers_table(runs[0])
    said = dict(headline(runs, fit_runs(runs), None, None, workers, events, missing="no"))
    assert (
        "SGD, learning rate 0.7, on the differences of 3 local steps of SGD, learning rate 0.02, "
        "batches of 16: 160 updates"
    ) in said["What was run"]
