"""Simulated runs for reports, including a hostile one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.prediction.predict import predict
from analysis.report.write import write_report
from analysis.study import Study
from asgd.config.make import make_config
from asgd.rundir.reader import Run, read_run
from asgd.rundir.repeats import run_repeats
from asgd.rundir.writer import RunWriter
from asgd.simulation.simulate import simulate

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror=window.hacked=1>"


@dataclass(frozen=True)
class Reports:
    """Two runs of 2 and 4 workers, and reports by name; `figures` are those of "several"."""

    runs: list[Run]
    pages: dict[str, Path]
    figures: Path

    @classmethod
    def make(cls, base: Path) -> Reports:
        runs = [predicted_run(base / f"p{workers}", workers) for workers in (2, 4)]
        paths = [run.path for run in runs]
        pages = {
            "one": write_report(paths[1:], base / "one.html"),
            "several": write_report(
                [run.path for run in runs], base / "several.html", base / "figures"
            ),
            "hostile": write_report([hostile_run(base / "hostile")], base / "hostile.html"),
            "unpredicted": unpredicted(base),
            "repeats": repeats(base / "repeats"),
        }
        return cls(runs, pages, base / "figures")

    def text(self, name: str) -> str:
        return self.pages[name].read_text(encoding="utf-8")


def simulated_run(path: Path, workers: int = 4, updates: int = 300, **problem: Any) -> Run:
    """Simulate a run with exponential compute times."""
    config = make_config(
        {
            "problem": problem or {"kind": "quadratic"},
            "optimizer": {"learning_rate": 0.05},
            "cluster": {"workers": workers, "compute_time": {"law": "exponential"}},
            "run": {"updates": updates, "eval_every": 10},
        }
    )
    return read_run(simulate(config, path))


def predicted_run(path: Path, workers: int = 4, **problem: Any) -> Run:
    """Simulate a run and predict it."""
    run = simulated_run(path, workers, **problem)
    predict(run, paths=8, models=("sme_sgd", "sme_asgd", "sme_law")).save(path)
    return run


def repeats(path: Path) -> Path:
    """Report on three repeats of a run, with intervals."""
    tables = {"problem": {"kind": "quadratic"}, "run": {"updates": 300, "repeats": 3}}
    place = run_repeats(make_config(tables), path, simulate)
    return write_report(predicted(place))


def predicted(path: Path) -> Study:
    """Return the study of a directory, with a stored prediction if possible."""
    study = Study.open(path)
    study.predict_if_missing(paths=8)
    return study


def unpredicted(base: Path) -> Path:
    """Report on an unpredicted run of one worker that is too short to fit."""
    path = base / "unpredicted"
    run = simulated_run(path, workers=1, updates=40)
    RunWriter(run.path).event("failed", reason=f"no reason {HOSTILE}")
    return write_report(predicted(path), base / "unpredicted.html")


def hostile_run(path: Path) -> Path:
    """Make a run with HTML injection in every free text."""
    predicted_run(path, kind="tests.support.plugins:bowl", options={"fault": HOSTILE})
    environment = json.dumps({"host": HOSTILE, "packages": {HOSTILE: '"></script>'}})
    (path / "environment.json").write_text(environment, encoding="utf-8")
    writer = RunWriter(path)
    writer.event("worker_lost", worker=1, update=100, reason=HOSTILE)
    writer.event(HOSTILE, update=200)
    return path
