"""Advice on runs that diverged."""

from pathlib import Path

import numpy as np
import pytest

from analysis.prediction.advice import advice_on_divergence, diverged
from asgd.config import make_config
from asgd.divergence import check_divergence
from asgd.errors import DivergedError
from asgd.rundir.reader import read_run
from asgd.rundir.writer import RunWriter
from asgd.simulation.simulate import simulate


def test_the_rate_that_a_schedule_reached_is_judged(tmp_path: Path) -> None:
    schedule = {"at": [10, 200], "values": [10.0, 0.01]}
    tables = {
        "problem": {"kind": "quadratic"},
        "optimizer": {"learning_rate": 0.01, "learning_rate_schedule": schedule},
        "run": {"updates": 300, "eval_every": 5},
    }
    with pytest.raises(DivergedError, match=r"learning_rate = 10\.0 is too large"):
        simulate(make_config(tables), tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert 10 < len(run.trace) < 200
    advice = advice_on_divergence(run)
    assert advice is not None
    assert advice.startswith("with the staleness it measured, the largest stable learning rate is ")


def test_what_happened_later_does_not_hide_why_a_run_failed(tmp_path: Path) -> None:
    wild = {"problem": {"kind": "quadratic"}, "optimizer": {"learning_rate": 10.0}}
    with pytest.raises(DivergedError):
        simulate(make_config(wild), tmp_path / "run")
    RunWriter(tmp_path / "run").event("worker_lost", worker=1, reason="killed")
    run = read_run(tmp_path / "run")
    assert run.failure is not None
    assert run.failure.startswith("the run diverged: loss ")
    assert diverged(run)


@pytest.mark.parametrize("latest", [np.nan, np.inf, 1e7])
def test_a_loss_that_is_no_number_or_far_above_the_first_is_divergence(latest: float) -> None:
    check_divergence(make_config(), 0.5, 9e5, 100)
    with pytest.raises(DivergedError, match=r"the run diverged: loss \S+ at update 100, 0.5 at"):
        check_divergence(make_config(), 0.5, latest, 100)
