"""A problem that changed since its run began is noticed before its results mix with the run's."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from analysis.prediction.predict import predict
from asgd.__main__ import main
from asgd.config.make import make_config
from asgd.errors import ProblemChangedError
from asgd.problems.make import make_problem
from asgd.problems.scalar import Quadratic
from asgd.progress import Progress
from asgd.rundir.problem_record import ProblemRecord, check_problem
from asgd.rundir.reader import Run, read_run
from asgd.rundir.repeats import run_repeats, unfinished_repeats
from asgd.rundir.writer import RunWriter
from asgd.simulation.simulate import simulate
from cluster.launch import resume, run

CLASSIFIER = """
    import numpy as np

    class Classifier:
        n_samples, dim, l2 = 60, 3, 0.1

        def __init__(self):
            rng = np.random.default_rng(SEED)
            self.features = rng.normal(size=(self.n_samples, self.dim))
            self.sign = np.sign(rng.normal(size=self.n_samples))

        def initial_point(self, rng):
            return np.zeros(self.dim)

        def loss(self, x):
            margin = self.sign * (self.features @ x)
            return np.logaddexp(0.0, -margin).mean() + 0.5 * self.l2 * x @ x

        def gradient(self, x, indices):
            a, y = self.features[indices], self.sign[indices]
            return -(y / (1.0 + np.exp(y * (a @ x)))) @ a / len(a) + self.l2 * x
"""


@pytest.fixture
def problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that rewrites the module of the user's problem and forgets its import."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python could take old bytecode for new

    def write(change: str = "SEED = 3") -> None:
        sys.modules.pop("my_classifier", None)
        text = f"{change}\n{textwrap.dedent(CLASSIFIER)}"
        (tmp_path / "my_classifier.py").write_text(text, encoding="utf-8")

    return write


def simulated(path: Path, **settings: object) -> Run:
    problem = {"kind": "my_classifier:Classifier"}
    cluster = {"compute_time": {"law": "exponential"}}
    steps = {"updates": 400, "eval_every": 40, **settings}
    config = make_config({"problem": problem, "cluster": cluster, "run": steps})
    return read_run(simulate(config, path))


def events(path: Path, kind: str) -> list[dict[str, object]]:
    return [event for event in read_run(path).events if event["event"] == kind]


def asgd(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Return the exit status of a command and its standard error."""
    status = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as request:
        status = int(request.code or 0)
    return status, capsys.readouterr().err


def test_a_run_records_its_problem_at_the_start(
    problem: Callable[[str], None], tmp_path: Path
) -> None:
    problem("SEED = 3")
    found = simulated(tmp_path / "run")
    (noted,) = events(found.path, "problem")
    assert (noted["dim"], noted["n_samples"]) == (3, 60)
    assert noted["loss"] == found.loss["loss"].iloc[0] == pytest.approx(np.log(2.0))
    check_problem(found, make_problem(found.config), "predict")


@pytest.mark.parametrize("command", ["predict", "report", "plan"])
def test_other_data_are_refused_in_one_line(
    problem: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    """The gradient shows it: the loss of a classifier at 0 is log 2 for all data."""
    problem("SEED = 3")
    path = simulated(tmp_path / "run").path
    problem("SEED = 4")
    status, said = asgd(capsys, command, path)
    assert status == 2
    assert said.count("\n") == 1
    assert "the problem has changed since the run began: |grad f(x_0)| is 0." in said
    assert ", was 0." in said
    assert not (path / "prediction.json").exists()
    assert not events(path, "problem_changed")


@pytest.mark.slow
def test_force_continues_and_records_one_event(
    problem: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem("SEED = 3")
    path = simulated(tmp_path / "run").path
    predict(read_run(path), paths=2, models=["sme_sgd"]).save(path)
    problem("SEED = 4")
    status, said = asgd(capsys, "report", path)  # from the stored prediction
    assert (status, "has changed" in said) == (2, True)
    for _ in range(2):
        assert asgd(capsys, "report", path, "--force") == (0, "")
    (event,) = events(path, "problem_changed")
    assert event["task"] == "report"
    assert "Check the events: problem changed (1)" in (path / "report.html").read_text("utf-8")
    (tmp_path / "my_classifier.py").unlink()
    sys.modules.pop("my_classifier", None)
    assert asgd(capsys, "report", path) == (
        0,
        "",
    )  # as for a run of another user, without the module


def test_a_changed_dimension_is_named_with_both_values(
    problem: Callable[[str], None], tmp_path: Path
) -> None:
    problem("SEED = 3")
    found = simulated(tmp_path / "run")
    sys.modules.pop("my_classifier", None)
    text = (tmp_path / "my_classifier.py").read_text(encoding="utf-8").replace("60, 3", "50, 4")
    (tmp_path / "my_classifier.py").write_text(text, encoding="utf-8")
    with pytest.raises(ProblemChangedError, match="dim is 4, was 3, n_samples is 50, was 60, "):
        predict(found, paths=2)
    assert predict(found, paths=2, models=["sme_sgd"], force=True).models == ["sme_sgd"]


@pytest.mark.parametrize("value", ["a", None, [1], {"b": 2}, True, float("nan")])
def test_a_damaged_record_is_no_change(tmp_path: Path, value: object) -> None:
    config = make_config({"problem": {"kind": "quadratic"}, "run": {"updates": 50}})
    path = simulate(config, tmp_path / "run")
    rewrite_record(path, dim=value)
    check_problem(read_run(path), make_problem(config), "predict")


def rewrite_record(path: Path, **fields: object) -> None:
    """Change the problem on record, as if the run had begun with another."""
    changed = [
        {**event, **fields} if event["event"] == "problem" else event
        for event in read_run(path).events
    ]
    text = "".join(f"{json.dumps(event)}\n" for event in changed)
    (path / "events.jsonl").write_text(text, encoding="utf-8")


def test_repeats_are_continued_with_another_problem_only_by_force(tmp_path: Path) -> None:
    tables = {"problem": {"kind": "quadratic"}, "run": {"updates": 50, "repeats": 2}}
    path = run_repeats(make_config(tables), tmp_path / "repeats", simulate)
    for file in (path / "repeat-001" / "trace").iterdir():
        file.unlink()
    (path / "repeat-000" / "checkpoints").mkdir()
    with unfinished_repeats(path) as left:
        assert [directory.name for directory, _ in left] == ["repeat-001"]
    (path / "repeat-001").mkdir(exist_ok=True)
    rewrite_record(path / "repeat-000", n_samples=9)
    with pytest.raises(ProblemChangedError, match="n_samples"), unfinished_repeats(path):
        pass
    with unfinished_repeats(path, force=True) as left:
        assert len(left) == 1


@pytest.mark.usefixtures("shared_ray")
def test_a_run_is_resumed_with_another_problem_only_by_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = {"problem": {"kind": "quadratic"}, "run": {"updates": 300}}
    tables["cluster"] = {"workers": 1, "compute_time": {"law": "constant", "mean": 0.003}}

    def interrupt(progress: Progress) -> None:
        if progress.update > 20:
            raise KeyboardInterrupt

    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(make_config(tables), path, progress=interrupt)
    (noted,) = events(path, "problem")
    assert noted["loss"] == 1.0
    rewrite_record(path, loss=4.0)
    status, said = asgd(capsys, "run", "--resume", path)
    assert (status, "f(x_0) is 1, was 4; --force continues" in said) == (2, True)
    assert read_run(path).state == "interrupted"
    assert read_run(resume(path, force=True)).state == "finished"
    (event,) = events(path, "problem_changed")
    assert event["task"] == "resume"


def test_force_needs_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = asgd(capsys, "run", tmp_path / "any.toml", "--force")
    assert (status, "--force: expected only with --resume" in said) == (2, True)


def test_a_problem_that_raises_is_refused_in_one_line() -> None:
    class Broken(Quadratic):
        def loss(self, x: np.ndarray) -> np.ndarray:
            raise ZeroDivisionError("by\nzero")

    with pytest.raises(ValueError, match=r"at the initial point: ZeroDivisionError: by zero$"):
        ProblemRecord.of(Broken(), seed=0)


def test_a_loss_that_is_not_finite_is_not_compared(tmp_path: Path) -> None:
    class Infinite(Quadratic):
        def loss(self, x: np.ndarray) -> np.ndarray:
            return np.full(x.shape[:-1], np.inf)

    record = ProblemRecord.of(Infinite(), seed=0)
    assert record.loss is None
    writer = RunWriter.create(tmp_path / "run", make_config({"problem": {"kind": "quadratic"}}))
    record.note(writer)
    check_problem(read_run(tmp_path / "run"), Quadratic(), "predict")
