"""Advice on runs that diverged: what it says, and whether following it helps."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.prediction.advice import advice_on_divergence, advised, diverged
from asgd.config.make import make_config
from asgd.divergence import check_divergence
from asgd.errors import DivergedError
from asgd.rundir.reader import read_run
from asgd.rundir.writer import RunWriter
from asgd.simulation.simulate import simulate


def test_divergence_names_the_rate_of_the_schedule(tmp_path: Path) -> None:
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


def test_an_overflow_between_two_losses_gets_advice(tmp_path: Path) -> None:
    tables = {
        "problem": {"kind": "quartic", "initial": 5.0},
        "optimizer": {"learning_rate": 1.0},
        "run": {"updates": 1000, "eval_every": 1000},
    }
    with pytest.raises(DivergedError) as raised:
        simulate(make_config(tables), tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert diverged(run)
    assert run.loss["update"].tolist() == [0, len(run.trace)]
    assert re.search(
        r"^the run diverged: loss .*; with the staleness it measured, the largest stable learning "
        r"rate is \S+, and single runs diverge from \S+ on: take a smaller one",
        advised(raised.value),
    )


def test_a_later_event_does_not_hide_why_a_run_failed(tmp_path: Path) -> None:
    wild = {"problem": {"kind": "quadratic"}, "optimizer": {"learning_rate": 10.0}}
    with pytest.raises(DivergedError):
        simulate(make_config(wild), tmp_path / "run")
    RunWriter(tmp_path / "run").event("worker_lost", worker=1, reason="killed")
    run = read_run(tmp_path / "run")
    assert run.failure is not None
    assert run.failure.startswith("the run diverged: loss ")
    assert diverged(run)


@pytest.mark.parametrize("latest", [np.nan, np.inf, 1e7])
def test_a_loss_that_is_not_finite_or_far_above_the_first_is_divergence(latest: float) -> None:
    check_divergence(make_config(), 0.5, 9e5, 100)
    with pytest.raises(DivergedError, match=r"the run diverged: loss \S+ at update 100, 0.5 at"):
        check_divergence(make_config(), 0.5, latest, 100)


EIGHT = {"workers": 8, "compute_time": {"law": "exponential", "mean": 0.02}}
WIDE = {"workers": 8, "compute_time": {"law": "lognormal", "mean": 0.02, "variation": 2.0}}
STEADY = {"workers": 8, "compute_time": {"law": "gamma", "mean": 0.02, "variation": 0.2}}
QUARTIC = {"kind": "quartic", "initial": 1.5, "noise": 0.5}
QUADRATIC = {"kind": "quadratic"}
HEAVY_BALL = {"rule": "momentum", "momentum": 0.9}

# Configurations that diverge, and the pieces of their advice. It names a number of workers only if
# it is stable for any compute times, and no momentum only if the rate is stable without it.
DIVERGING: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], set[str]]] = {
    "quartic": (QUARTIC, EIGHT, {"learning_rate": 0.4}, {"rate"}),
    "quartic, wide law": (QUARTIC, WIDE, {"learning_rate": 0.4}, {"rate"}),
    "quadratic": (QUADRATIC, STEADY, {"learning_rate": 0.2}, {"rate", "workers"}),
    "heavy ball": (
        QUADRATIC,
        EIGHT,
        {"learning_rate": 0.1, **HEAVY_BALL},
        {"rate", "momentum", "workers"},
    ),
    "least squares, one sample": (
        {"kind": "least_squares"},
        EIGHT,
        {"learning_rate": 2.0, "batch_size": 1},
        {"rate"},
    ),
}


def simulated(tables: dict[str, Any], path: Path, seed: int) -> bool:
    """Run a configuration and return whether it diverged."""
    run = {"updates": 600, "eval_every": 10, "seed": seed}
    try:
        simulate(make_config({**tables, "run": run}), path)
    except DivergedError:
        return True
    return False


def changes(advice: str, tables: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a configuration for each piece of the advice, with only this piece followed."""
    found = {}
    limit = re.search(r"the largest stable learning rate is ([\d.e-]+), ", advice)
    assert limit is not None
    found["rate"] = deepcopy(tables)
    found["rate"]["optimizer"]["learning_rate"] = float(limit[1])
    if "and larger batches" in advice:  # the limit leaves out the noise of small batches
        found["rate"]["optimizer"]["batch_size"] = 64
    if "no momentum" in advice:
        found["momentum"] = deepcopy(tables)
        found["momentum"]["optimizer"]["momentum"] = 0.0
    workers = re.search(r"or (?:at most (\d+) workers|one worker)", advice)
    if workers:
        found["workers"] = deepcopy(tables)
        found["workers"]["cluster"]["workers"] = int(workers[1] or 1)
    return found


@pytest.mark.parametrize("name", DIVERGING)
def test_a_run_that_follows_any_piece_of_the_advice_does_not_diverge(
    tmp_path: Path, name: str
) -> None:
    problem, cluster, optimizer, pieces = DIVERGING[name]
    optimizer = {"batch_size": 4, **optimizer}
    tables = {"problem": problem, "cluster": cluster, "optimizer": optimizer}
    assert simulated(tables, tmp_path / "wild", 0)
    advice = advice_on_divergence(read_run(tmp_path / "wild"))
    assert advice is not None
    followed = changes(advice, tables)
    assert set(followed) == pieces
    for piece, changed in followed.items():
        for seed in range(1, 5):
            path = tmp_path / f"{piece}{seed}"
            assert not simulated(changed, path, seed), f"{piece}, seed {seed}: {advice}"


def test_a_limit_at_a_flat_start_is_not_advised(tmp_path: Path) -> None:
    """A quartic is flat at its start, so the limit there is too large; a smaller rate helps."""
    problem = {"kind": "quartic", "initial": 0.1, "noise": 3.0}
    tables = {
        "problem": problem,
        "cluster": EIGHT,
        "optimizer": {"learning_rate": 1.0, "batch_size": 4},
    }
    assert simulated(tables, tmp_path / "wild", 0)
    advice = advice_on_divergence(read_run(tmp_path / "wild"))
    assert advice is not None
    assert advice.endswith("grew on the way; halve the learning rate until it converges")
    tables["optimizer"]["learning_rate"] = 0.125
    assert not any(simulated(tables, tmp_path / f"calm{seed}", seed) for seed in range(1, 5))
