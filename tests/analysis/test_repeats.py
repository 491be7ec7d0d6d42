"""Repeats of one run: how they are stored, read, fitted, predicted and scored."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.prediction.model import MODELS
from analysis.prediction.predict import predict
from analysis.prediction.score import compare
from analysis.prediction.setting import RunSetting
from analysis.profile.fitting import fit_run
from analysis.profile.repeats import as_runs, fit_runs
from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.errors import InputError
from asgd.rundir.alive import heartbeat
from asgd.rundir.reader import Run, read_run
from asgd.rundir.repeats import read_runs, run_repeats, unfinished_repeats
from asgd.simulation.simulate import simulate
from asgd.streams import stream
from tests.support.plugins import Scattered

REPEATS = 12
TABLES = {
    "problem": {"kind": "quadratic"},
    "optimizer": {"learning_rate": 0.1, "batch_size": 1},
    "cluster": {"workers": 4, "compute_time": {"law": "gamma", "variation": 0.5}},
    "run": {"updates": 300, "eval_every": 20, "seed": 5, "repeats": REPEATS},
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("experiment") / "out"
    return simulate(make_config(TABLES), out)


@pytest.fixture(scope="module")
def runs(experiment: Path) -> list[Run]:
    return read_runs(experiment)


def test_each_repeat_is_the_run_of_its_own_seed(experiment: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in experiment.iterdir()) == [
        "config.json",
        "lock",
        *(f"repeat-{i:03d}" for i in range(REPEATS)),
    ]
    alone = {**TABLES, "run": {**TABLES["run"], "seed": 7, "repeats": 1}}
    same = read_run(simulate(make_config(alone), tmp_path / "alone"))
    repeat = read_run(experiment / "repeat-002")
    assert repeat.config == same.config
    assert repeat.trace.equals(same.trace)
    assert repeat.loss.equals(same.loss)


def test_a_single_run_has_no_directory_of_repeats(tmp_path: Path) -> None:
    alone = make_config({**TABLES, "run": {**TABLES["run"], "repeats": 1}})
    out = run_repeats(alone, tmp_path / "alone", simulate)
    (run,) = read_runs(out)
    assert run.path == out == tmp_path / "alone"
    assert len(run.trace) == 300


def test_directories_that_cannot_be_used_are_refused(experiment: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not empty"):
        run_repeats(make_config(TABLES), experiment, simulate)
    with pytest.raises(InputError, match="name one, such as"):
        read_run(experiment)
    with pytest.raises(InputError, match=r"name one in it, such as .*out$"):
        read_runs(experiment.parent)
    with pytest.raises(InputError, match=r"not a run directory.*asgd run"):
        read_runs(tmp_path)

    def no_run(config: RunConfig, out: Path) -> None:
        pass

    run_repeats(make_config(TABLES), tmp_path / "none", no_run)
    with pytest.raises(InputError, match="contains no repeats"):
        read_runs(tmp_path / "none")


def test_the_staleness_of_all_repeats_is_fitted(runs: list[Run]) -> None:
    fit, single = fit_runs(runs), fit_run(runs[0])
    assert fit_runs(runs[:1]).mu == single.mu
    assert len(fit.sample.staleness) + fit.start_up == sum(len(run.trace) for run in runs)
    assert fit.start_up == sum(fit_run(run).start_up for run in runs)
    wide = np.ptp(single.geometric.confidence_interval()["mu"])
    assert np.ptp(fit.geometric.confidence_interval()["mu"]) < wide


def test_runs_that_are_no_repeats_are_refused(runs: list[Run], tmp_path: Path) -> None:
    other = {**TABLES, "optimizer": {"learning_rate": 0.11, "batch_size": 1}}
    stranger = read_run(
        simulate(make_config({**other, "run": {"updates": 300, "eval_every": 20}}), tmp_path / "o")
    )
    with pytest.raises(InputError, match="no repeat of"):
        as_runs([runs[0], stranger])
    with pytest.raises(InputError, match="runs = \\[\\]: expected"):
        as_runs([])


def test_scores_of_repeats_have_intervals_that_contain_the_score(runs: list[Run]) -> None:
    prediction = predict(runs)
    score = compare(runs, prediction)
    assert score.repeats == REPEATS
    assert score.intervals is not None
    for name, model in score.models.items():
        limits = score.intervals.loc[name]
        assert limits["relative_error_low"] <= model.relative_error
        assert model.relative_error <= limits["relative_error_high"]
        assert limits["coverage_low"] <= model.coverage <= limits["coverage_high"]
        assert limits["crps_low"] <= model.crps <= limits["crps_high"]
    assert compare(runs[0], prediction).intervals is None
    # The mean over points and runs has the standard error of independent runs.
    law = score.intervals.loc["sme_law"]
    single = [compare(run, prediction).models["sme_law"].crps for run in runs]
    expected = 2 * 1.96 * np.std(single) / np.sqrt(REPEATS)
    assert 0.7 < (law["crps_high"] - law["crps_low"]) / expected < 1.3


def given_its_reads(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of the loss of `Scattered` at each evaluation, given x_0 and reads.

    The variance assumes Gaussian noise; the noise of batches has thinner tails.
    """
    staleness, updates = run.trace["staleness"].to_numpy(), len(run.trace)
    problem, eta = Scattered(), run.config.optimizer.learning_rate
    (start,) = problem.initial_point(stream(run.config.run.seed, "initial"))
    variance = float(np.mean(problem.centres**2))
    effect = np.zeros((updates + 1, updates + 1))  # row k: effects of x_0 and the noises on x_k
    effect[0, 0] = 1.0
    for k in range(updates):
        effect[k + 1] = effect[k] - eta * effect[k - staleness[k]]
        effect[k + 1, k + 1] -= eta
    effect = effect[run.loss["update"].to_numpy()]
    mean = effect[:, 0] * start
    spread = variance / run.config.optimizer.batch_size * (effect[:, 1:] ** 2).sum(axis=1)
    return (mean**2 + spread + variance) / 2, mean**2 * spread + spread**2 / 2


def test_paths_start_at_all_points_of_repeats_that_start_apart(tmp_path: Path) -> None:
    """Runs and replay agree with the exact moments of the repeats within four standard errors."""
    paths, repeats = 80, 4
    config = make_config(
        {
            **TABLES,
            "problem": {"kind": "tests.support.plugins:Scattered"},
            "optimizer": {"learning_rate": 0.05, "batch_size": 2},
            "run": {"updates": 120, "eval_every": 20, "seed": 5, "repeats": repeats},
        }
    )
    runs = read_runs(simulate(config, tmp_path / "out"))
    observed = np.stack([run.loss["loss"] for run in runs])
    assert observed[:, 0].max() > 2 * observed[:, 0].min()
    expected, variance = np.mean([given_its_reads(run) for run in runs], axis=0)
    error = np.sqrt(variance / repeats)
    np.testing.assert_array_less(np.abs(observed.mean(axis=0) - expected)[1:], 4 * error[1:])
    prediction = predict(runs, paths=paths)
    for model in prediction.models:
        first = prediction.curve(model)["loss_mean"][0]
        assert first == pytest.approx(observed[:, 0].mean(), rel=1e-9), model
    replay = prediction.curve("replay")["loss_mean"].to_numpy()
    error = np.sqrt(variance / paths)
    np.testing.assert_array_less(np.abs(replay - expected)[1:], 4 * error[1:])
    with pytest.raises(InputError, match="'simulate' for repeats that start at different points"):
        predict(runs, method="fast")


def test_exact_moments_need_a_common_start(runs: list[Run]) -> None:
    setting = RunSetting.of(runs, fit_runs(runs))
    models = [model for model in MODELS.values() if model.is_default(setting)]
    assert len(models) == 4
    assert all(model.has_exact(setting) for model in models)
    apart = replace(setting, initial=np.array([[1.0], [2.0]]))
    assert not any(model.has_exact(apart) for model in models)


def unfinished(path: Path) -> list[tuple[Path, RunConfig | None]]:
    with unfinished_repeats(path) as found:
        return found


def cut_short(repeat: Path) -> None:
    """Leave only the files that a repeat has before its first update is recorded."""
    for part in repeat.glob("trace/*"):
        part.unlink()


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    """Return four finished repeats that look like repeats of a real run."""
    config = make_config({**TABLES, "run": {**TABLES["run"], "updates": 40, "repeats": 4}})
    out = run_repeats(config, tmp_path / "out", simulate)
    with pytest.raises(InputError, match="only real runs can be resumed"):
        unfinished(out)
    repeats = [out / f"repeat-{number:03d}" for number in range(4)]
    for repeat in repeats:
        (repeat / "checkpoints").mkdir()
    return repeats


def test_repeats_that_are_missing_or_cut_short_are_found(four: list[Path]) -> None:
    out = four[0].parent
    with pytest.raises(InputError, match="every repeat is finished"):
        unfinished(out)
    shutil.rmtree(four[3])
    cut_short(four[0])
    events = four[1] / "events.jsonl"
    lines = [event for event in read_run(four[1]).events if event["event"] != "finish"]
    lines.append({"event": "interrupted"})
    events.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = unfinished(out)
    assert [path for path, _ in found] == [four[0], four[1], four[3]]
    assert [anew and anew.run.seed for _, anew in found] == [5, None, 8]
    assert not four[0].exists()
    shutil.copy(four[2] / "config.json", four[1] / "config.json")
    with pytest.raises(InputError, match="is not a repeat of"):
        unfinished(out)
    assert unfinished(four[2]) == [(four[2], None)]


def test_a_directory_that_is_no_repeat_is_not_removed(four: list[Path]) -> None:
    out = four[0].parent
    cut_short(four[0])
    shutil.rmtree(four[1])
    four[1].mkdir()
    (four[1] / "thesis.tex").touch()
    cut_short(four[2])
    shutil.copy(four[3] / "config.json", four[2])  # of another seed
    away = four[3].rename(out.parent / "away")
    cut_short(away)
    four[3].symlink_to(away)
    while len(strangers := [path for path in four[1:] if os.path.lexists(path)]):
        before = sorted(out.parent.rglob("*"))
        with pytest.raises(InputError, match=rf"{strangers[0].name}: is not a repeat of"):
            unfinished(out)
        assert sorted(out.parent.rglob("*")) == before
        strangers[0].rename(out.parent / f"was-{strangers[0].name}")
    (four[1] / "trace").mkdir(parents=True)  # a run makes these before its configuration
    (four[1] / ".0123456789abcdef.lock.tmp").touch()
    assert [path for path, _ in unfinished(out)] == four
    assert not any(path.exists() for path in four)


def test_a_link_to_a_repeat_is_not_read(four: list[Path], tmp_path: Path) -> None:
    four[1].symlink_to(four[1].rename(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match="001: is neither a file nor a directory"):
        read_runs(tmp_path / "out")


def test_repeats_that_a_process_is_writing_are_refused(four: list[Path], tmp_path: Path) -> None:
    out = four[0].parent
    cut_short(four[0])
    with heartbeat(four[0]), pytest.raises(InputError, match=rf"000: .* process {os.getpid()}"):
        unfinished(out)
    message = rf"out: is being written by process {os.getpid()}$"
    with unfinished_repeats(out), pytest.raises(InputError, match=message):
        unfinished(out)

    def one(config: RunConfig, path: Path) -> None:
        with pytest.raises(InputError, match="new: is being written by process"):
            unfinished(path.parent)

    config = make_config({**TABLES, "run": {**TABLES["run"], "repeats": 2}})
    run_repeats(config, tmp_path / "new", one)
    assert len(unfinished(tmp_path / "new")) == 2
