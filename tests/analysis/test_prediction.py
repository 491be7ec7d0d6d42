"""Predictions of runs in virtual time: their models, their inputs and their errors."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.models import memory
from analysis.prediction.model import LABELS, MODELS
from analysis.prediction.predict import (
    has_prediction,
    predict,
    quantile_column,
    read_prediction,
)
from analysis.prediction.score import compare, relative_error_interval
from analysis.prediction.setting import RunSetting, closure_of
from analysis.profile.fitting import fit_run
from analysis.profile.repeats import fit_runs
from analysis.report.activity import events_table, workers_table
from analysis.report.headline import headline
from analysis.report.judgement import verdict
from asgd.config.make import make_config
from asgd.errors import InputError, UnreliableEstimateError
from asgd.problems.scalar import Quadratic
from asgd.rundir.reader import Run, read_run
from asgd.rundir.repeats import read_runs, run_repeats
from asgd.rundir.writer import RunWriter
from asgd.simulation.simulate import simulate

DEFAULT_MODELS = ["sme_sgd", "sme_asgd", "sme_law", "replay"]

QUADRATIC = {"kind": "quadratic"}


def simulated(path: Path, **tables: Any) -> Run:
    defaults: dict[str, Any] = {
        "problem": QUADRATIC,
        "optimizer": {"learning_rate": 0.05, "batch_size": 1},
        "cluster": {"workers": 4, "compute_time": {"law": "gamma", "variation": 0.3}},
        "run": {"updates": 400, "eval_every": 20},
    }
    for table, values in tables.items():
        defaults[table] = defaults.get(table, {}) | values
    return read_run(simulate(make_config(defaults), path / "run"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return simulated(tmp_path_factory.mktemp("predict"))


def test_every_model_starts_at_the_loss_of_x_0_and_is_recorded_where_the_run_was(run: Run) -> None:
    prediction = predict(run, paths=8, models=tuple(MODELS))
    assert prediction.models == list(MODELS)
    for name in MODELS:
        curve = prediction.curve(name)
        assert curve["update"].tolist() == run.loss["update"].tolist()
        assert curve["loss_mean"][0] == Quadratic().loss(np.ones(1))
        assert curve["loss_std"][0] == 0.0
        bands = curve[[quantile_column(level) for level in (0.05, 0.5, 0.95)]].to_numpy()
        assert np.all(np.diff(bands, axis=1) >= 0)


def test_the_default_models_are_the_baselines_the_law_and_the_replay(run: Run) -> None:
    prediction = predict(run, paths=2, method="simulate")
    assert prediction.models == DEFAULT_MODELS
    assert prediction.settings.closure == "pool"
    assert prediction.settings.models["replay"].paths == 2


def test_the_law_of_a_server_is_the_pool_closure_and_that_of_independent_lags_is_iid(
    run: Run, tmp_path: Path
) -> None:
    assert closure_of(run) == "pool"
    curves = predict(run, paths=4, models=("sme_law", "law_pool"))
    assert curves.settings.turns == "by law"
    assert np.array_equal(
        curves.curve("sme_law")["loss_mean"], curves.curve("law_pool")["loss_mean"]
    )
    independent = simulated(tmp_path, simulation={"staleness": "geometric"})
    assert closure_of(independent) == "iid"
    curves = predict(independent, paths=4, models=("sme_law", "law_iid"))
    assert np.array_equal(
        curves.curve("sme_law")["loss_mean"], curves.curve("law_iid")["loss_mean"]
    )


def test_independent_constant_staleness_is_no_pool(run: Run, tmp_path: Path) -> None:
    """It reads no version twice, but a pool of 4 would have mean staleness 3."""
    table = {"staleness": "constant", "mean_staleness": 10}
    independent = simulated(tmp_path, simulation=table)
    assert closure_of(independent) == "iid"
    curves = predict(independent, models=("sme_law", "law_iid"))
    assert np.array_equal(*(curves.curve(name)["loss_mean"] for name in curves.models))
    queue = with_turns(tmp_path / "queue", run, np.arange(400) % 4)
    assert closure_of(queue) == "pool"


def test_a_team_smaller_from_the_start_is_a_pool_and_one_that_shrinks_is_not(
    run: Run, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    three = with_turns(tmp_path / "three", run, rng.integers(3, size=400))
    RunWriter(three.path).event("worker_removed", worker=3, update=0)
    three = read_run(three.path)
    assert closure_of(three) == "pool"
    assert RunSetting.of(three, fit_run(three)).workers == 3
    turns = np.concatenate([rng.integers(4, size=200), rng.integers(2, size=200)])
    halved = with_turns(tmp_path / "halved", run, turns)
    for worker in (2, 3):
        RunWriter(halved.path).event("worker_removed", worker=worker, update=200)
    assert closure_of(read_run(halved.path)) == "iid"


def with_turns(path: Path, run: Run, turns: np.ndarray) -> Run:
    """Return a copy of a run in which other workers delivered the updates."""
    trace = {name: column.to_numpy().copy() for name, column in run.trace.items()}
    held = np.zeros(run.config.cluster.workers, dtype=int)
    for k, worker in enumerate(turns):
        trace["read_version"][k] = held[worker]
        held[worker] = k + 1
    trace["worker"], trace["staleness"] = turns, trace["update"] - trace["read_version"]
    writer = RunWriter.create(path, run.config)
    writer.trace(trace)
    writer.loss({name: column.to_numpy() for name, column in run.loss.items()})
    return read_run(path)


def test_turns_that_come_in_spells_are_resampled(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    orders = [np.arange(400) % 4, rng.integers(4, size=400)]
    runs = [with_turns(tmp_path / str(i), run, order) for i, order in enumerate(orders)]
    curves = predict(runs, models=("sme_law", "law_pool"))
    assert curves.settings.turns == "recorded"
    law, pool = (curves.curve(name)["loss_mean"] for name in ("sme_law", "law_pool"))
    assert 0 < np.abs(law / pool - 1)[1:].max() < 0.05
    called = ["SME with recorded turns", LABELS["law_pool"]]
    assert [curves.label(name) for name in curves.models] == called
    assert curves.table().index.tolist() == called
    assert compare(runs, curves).table().index.tolist() == called
    law_itself = predict(runs, models=("sme_law",), method="fast")
    assert law_itself.settings.turns == "by law"
    assert law_itself.label("sme_law") == LABELS["sme_law"]


def test_a_prediction_is_read_back_as_it_was_stored(run: Run) -> None:
    prediction = predict(run, paths=4, models=("sme_law",))
    prediction.save(run.path)
    assert has_prediction(run.path)
    stored = read_prediction(run.path)
    assert stored.curves.equals(prediction.curves)
    assert stored.settings == prediction.settings


@pytest.mark.parametrize("optimizer", [{}, {"rule": "momentum"}, {"clip_norm": 1.0}], ids=str)
def test_a_prediction_is_shown_under_every_rule(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    optimizer = {"learning_rate": 0.01, "batch_size": 1} | optimizer
    prediction = predict(simulated(tmp_path, optimizer=optimizer), paths=2, models=("replay",))
    for text in (repr(prediction), prediction._repr_html_()):
        assert text.startswith(("Predicted loss after 400", "<p>Predicted loss after 400"))
        assert LABELS["replay"] in text
        assert "the largest stable learning rate" in text
        assert ("with momentum 0.9 is" in text) == ("rule" in optimizer)


def test_the_seed_decides_the_prediction(run: Run) -> None:
    first, same, other = (
        predict(run, paths=4, models=("replay",), method="simulate", seed=seed).curves["loss_mean"]
        for seed in (1, 1, 2)
    )
    assert first.equals(same)
    assert not first.equals(other)


def test_a_law_too_wide_for_exact_moments_is_simulated(tmp_path: Path) -> None:
    run = simulated(
        tmp_path,
        problem={"kind": "least_squares"},
        simulation={"staleness": "constant", "mean_staleness": 250},
        optimizer={"learning_rate": 1e-4},
        run={"updates": 600},
    )
    prediction = predict(run, models=("sme_asgd", "law_iid"), paths=2)
    assert prediction.paths("sme_asgd") is None
    assert prediction.paths("law_iid") == 2


def test_paths_that_do_not_fit_into_memory_are_left_out_with_a_message(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = 8 * (1 + len(run.loss))  # bytes of the final point and the losses of a path
    monkeypatch.setattr(memory, "STATISTICS_BYTES", 5 * each)
    prediction = predict(run, paths=8, models=["replay"], method="simulate")
    assert prediction.paths("replay") == 5
    (said,) = caplog.messages
    assert said.startswith("5 of 8 paths: ")


def test_unknown_models_and_unusable_runs_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model = 'sme': expected one of sme_sgd"):
        predict(run, models=("sme",))
    empty = RunWriter.create(tmp_path / "empty", make_config())
    with pytest.raises(InputError, match="no loss evaluation"):
        predict(read_run(empty.path))
    with pytest.raises(UnreliableEstimateError):
        predict(simulated(tmp_path, run={"updates": 40}))
    with pytest.raises(InputError, match="no readable prediction"):
        read_prediction(empty.path)


def test_late_joiners_do_not_make_a_server_independent(run: Run, tmp_path: Path) -> None:
    trace = {name: column.to_numpy().copy() for name, column in run.trace.items()}
    trace["read_version"][2:4] = 1
    trace["staleness"] = trace["update"] - trace["read_version"]
    writer = RunWriter.create(tmp_path / "late", run.config)
    writer.trace(trace)
    assert closure_of(read_run(writer.path)) == "pool"


def test_the_fast_mode_refuses_where_noise_outgrows_it(tmp_path: Path) -> None:
    above = simulated(
        tmp_path,
        problem={"kind": "softmax"},
        optimizer={"learning_rate": 0.4, "batch_size": 64},
        cluster={"workers": 8, "compute_time": {"law": "none"}},
        run={"updates": 120},
    )
    with pytest.raises(
        UnreliableEstimateError, match=r"'fast', .*: noise outgrows.*accepted here: 'auto'"
    ):
        predict(above, method="fast", models=("sme_law",))
    curve = predict(above, method="fast", models=("sme_asgd",)).curve("sme_asgd")
    assert np.isfinite(curve["loss_mean"]).all()


def test_a_run_whose_paths_diverge_is_not_called_stable(tmp_path: Path) -> None:
    """In phase retrieval the noise grows with the distance, so paths diverge below the limits."""
    lucky = simulated(
        tmp_path,
        problem={"kind": "scripts.bench_plan:PhaseRetrieval"},
        optimizer={"learning_rate": 0.12, "batch_size": 4},
        cluster={
            "workers": 6,
            "compute_time": {"law": "lognormal", "variation": 1.5, "mean": 0.01},
        },
        run={"updates": 400, "eval_every": 50},
    )
    prediction = predict(lucky, paths=24, models=("sme_sgd", "sme_law", "replay"))
    stability = prediction.settings.stability
    assert stability.factor is not None
    assert stability.factor > 1
    assert stability.verdict == "diverges"
    assert stability.sentence.startswith("Unstable: in the prediction ")
    assert "paths (SME with the measured law) diverge" in stability.sentence
    score = compare(lucky, prediction)
    assert score.models["sme_law"].relative_error == math.inf
    assert np.isfinite(score.models[score.closest].relative_error)
    assert relative_error_interval(np.ones((2, 3)), np.full(3, np.nan), np.ones(3))[1] == math.inf
    events = events_table(lucky).iloc[:0]
    facts = headline([lucky], fit_run(lucky), prediction, score, workers_table(lucky), events)
    assert verdict(lucky, prediction, score).startswith("Not predicted: paths of the SME with")
    assert dict(facts)["What to try"].startswith("Paths diverge below the limits: take a smaller")
    assert "nan" not in " ".join(text for _, text in facts)


def test_every_repeat_is_replayed(run: Run, tmp_path: Path) -> None:
    runs = [run, simulated(tmp_path, run={"seed": 1})]
    assert not runs[0].trace["worker"].equals(runs[1].trace["worker"])
    fit, model = fit_run(run), ("replay",)
    both = predict(runs, models=model, fit=fit).curve("replay")["loss_mean"]
    alone = [predict(one, models=model, fit=fit).curve("replay")["loss_mean"] for one in runs]
    assert np.allclose(both, (alone[0] + alone[1]) / 2, rtol=1e-12)
    paths = 2000
    drawn = predict(runs, models=model, fit=fit, method="simulate", paths=paths).curve("replay")
    z = (drawn["loss_mean"] - both)[1:] / (drawn["loss_std"][1:] / np.sqrt(paths))
    assert np.sqrt(np.mean(z**2)) < 2


def test_progress_names_the_model_at_work_and_ends_at_one(run: Run) -> None:
    shown: list[tuple[str, float]] = []
    predict(run, paths=2, method="simulate", progress=lambda *said: shown.append(said))
    assert list(dict.fromkeys(name for name, _ in shown)) == DEFAULT_MODELS
    shares = [share for _, share in shown]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.slow
def test_law_and_replay_follow_a_run_that_the_geometric_fit_misses(tmp_path: Path) -> None:
    """150 runs of P = 4 workers of nearly constant speed at three quarters of the limit."""
    tables = {
        "optimizer": {"learning_rate": 0.16},
        "cluster": {"compute_time": {"law": "gamma", "variation": 0.1}},
    }
    runs = [
        simulated(tmp_path / str(seed), **tables, run={"updates": 300, "seed": seed})
        for seed in range(150)
    ]
    prediction = predict(runs[0], fit=fit_run(runs[0]))
    observed = np.stack([run.loss["loss"].to_numpy() for run in runs])
    standard_error = observed.std(axis=0, ddof=1)[1:] / np.sqrt(len(runs))
    for name in ("sme_law", "replay"):
        difference = prediction.curve(name)["loss_mean"][1:] - observed.mean(axis=0)[1:]
        # The mean square of fifteen correlated points is about one if the prediction is right.
        assert np.mean((difference / standard_error) ** 2) < 4
    score = compare(runs, prediction)
    law = score.models["sme_law"].relative_error
    assert score.models["sme_sgd"].relative_error > 3 * law
    assert score.models["sme_asgd"].relative_error > 3 * law
    parts = score.parts["error"]
    assert parts["geometric assumption"] > 3 * parts["shape and dependence of staleness"]


def test_quadratics_are_computed_and_agree_with_their_simulation(run: Run) -> None:
    computed = predict(run, models=DEFAULT_MODELS)
    paths = 2000
    drawn = predict(run, models=DEFAULT_MODELS, method="simulate", paths=paths)
    for name in DEFAULT_MODELS:
        assert computed.paths(name) is None
        assert drawn.paths(name) == paths
        assert np.allclose(
            drawn.curve(name)["loss_mean_error"], drawn.curve(name)["loss_std"] / np.sqrt(paths)
        )
        # of the computed curves only that of the law has an error, because its reads are drawn
        assert (computed.curve(name)["loss_mean_error"].max() > 0) == (name == "sme_law")
        curve, sampled = computed.curve(name)[1:], drawn.curve(name)[1:]
        z = (curve["loss_mean"] - sampled["loss_mean"]) / (sampled["loss_std"] / np.sqrt(paths))
        assert np.sqrt(np.mean(z**2)) < 2
    shape = "shape and dependence of staleness"
    noise = compare(run, computed).parts.loc[shape, "noise"]
    assert 0 < noise < 0.5 * compare(run, drawn).parts.loc[shape, "noise"]
    with pytest.raises(InputError, match="method = 'exact'"):
        predict(run, method="exact")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "times", "workers", "learning_rate", "updates"),
    [
        ("least_squares", {"law": "exponential"}, 8, 0.02, 400),
        ("least_squares", {"law": "none"}, 4, 0.09, 400),
        ("logistic", {"law": "lognormal", "variation": 1.0}, 4, 0.08, 200),
        ("logistic", {"law": "none"}, 8, 0.05, 200),
        ("softmax", {"law": "gamma", "variation": 0.2}, 8, 0.15, 100),
        ("double_well", {"law": "exponential"}, 4, 0.1, 400),
        ("double_well", {"law": "none"}, 8, 0.2, 400),
    ],
)
def test_law_replay_and_fast_mode_are_within_the_scatter_of_the_runs(
    tmp_path: Path,
    kind: str,
    times: dict[str, Any],
    workers: int,
    learning_rate: float,
    updates: int,
) -> None:
    """z of a mean curve counts the scatter of the few runs and of the paths."""
    repeats, paths = (4, 6) if kind == "softmax" else (8, 64)
    tables = {
        "problem": {"kind": kind},
        "optimizer": {"learning_rate": learning_rate, "batch_size": 16},
        "cluster": {"workers": workers, "compute_time": times},
        "run": {"updates": updates, "eval_every": updates // 20, "repeats": repeats},
    }
    runs = read_runs(run_repeats(make_config(tables), tmp_path / "runs", simulate))
    fit = fit_runs(runs)
    prediction = predict(runs, models=("sme_law", "replay"), paths=paths, fit=fit)
    fast = predict(runs, models=("sme_law",), method="fast", fit=fit)
    observed = np.stack([run.loss["loss"].to_numpy()[1:] for run in runs]).mean(axis=0)
    curves = [prediction.curve("sme_law"), prediction.curve("replay"), fast.curve("sme_law")]
    for curve, drawn in zip(curves, (paths, paths, np.inf), strict=True):
        error = curve["loss_mean"].to_numpy()[1:] - observed
        scatter = prediction.curve("sme_law")["loss_std"].to_numpy()[1:]
        z = error / (scatter * np.sqrt(1 / repeats + 1 / drawn))
        # Neighbouring points are correlated, so their mean square scatters like that of a few.
        assert np.mean(z**2) < 5
