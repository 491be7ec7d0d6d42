"""Plans for networks: probed curvatures, a few paths for each choice, a limit of time."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from analysis.planning.effort import ByTime, effort_for
from analysis.planning.paths import PathSetting
from analysis.planning.plan import plan
from analysis.planning.turns import QueueReads
from analysis.prediction.run_stability import leading_curvatures
from analysis.profile.queueing import ServerTimes
from asgd.arrays import Array
from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.delays import ComputeTime
from asgd.errors import InputError
from asgd.problems.base import Indices, Problem, starting_point
from asgd.problems.linear import digits
from asgd.problems.make import make_problem
from asgd.rules.sgd import Sgd
from scripts.methods_problems import Perceptron
from tests.support.networks import jax_perceptron

NUMPY = {"kind": "scripts.methods_problems:Perceptron", "options": {"hidden": 4, "start": 0}}
JAX = {"kind": "tests.support.networks:jax_perceptron", "options": {"seeded": False}}


def configure(problem: dict[str, Any]) -> RunConfig:
    return make_config(
        {
            "problem": problem,
            "optimizer": {"learning_rate": 0.2, "batch_size": 64},
            "cluster": {"workers": 4, "compute_time": {"law": "exponential", "mean": 0.01}},
            "run": {"updates": 150},
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("problem", [NUMPY, JAX], ids=["numpy", "jax"])
def test_a_network_is_planned_by_probed_curvatures_and_a_few_paths(problem: dict[str, Any]) -> None:
    config = configure(problem)
    found = plan(config, workers=[4], learning_rates=[0.01, 0.2, 1000.0])
    assert "Curvatures: probed, on 320 of " in found.note
    slow, fast, wild = found.rows
    assert (slow.stable, fast.stable, wild.stable) == (True, True, False)
    assert wild.remark.startswith("unstable: ")
    assert found.best == 1
    assert slow.paths.paths == wild.paths.paths == 16
    assert fast.paths.paths == 16 + 48
    # the limit for exponential times at curvature 1
    limit = fast.pace.limits(Sgd(), 4, False)
    assert limit is not None
    assert fast.start.limits is not None
    probed = limit.almost_sure.value / fast.start.limits.almost_sure.value
    network = make_problem(config)
    exact = leading_curvatures(network, starting_point(network, 0), 1)[0]
    assert probed == pytest.approx(exact, rel=0.2)


def test_only_costly_gradients_are_planned_by_time() -> None:
    given = {"seed": 0, "gradients": 100, "choices": 1, "seconds": 1.0}
    assert isinstance(effort_for(Perceptron(), **given), ByTime)
    assert isinstance(effort_for(jax_perceptron(), **given), ByTime)
    assert not isinstance(effort_for(digits(), **given), ByTime)


def test_a_plan_that_takes_too_long_is_refused_early() -> None:
    with pytest.raises(InputError, match=r"seconds = 0\.001: 4 paths of each of 9 choices take"):
        plan(configure(NUMPY), seconds=1e-3)
    with pytest.raises(InputError, match=r"seconds = nan: expected a finite number > 0"):
        plan(configure(NUMPY), seconds=np.nan)


class Slow(Problem):
    """A quadratic whose loss takes one second for each call."""

    dim, n_samples, points_at_once = 100, 1000, 4

    def __init__(self) -> None:
        self.now = 0.0

    def initial_point(self, rng: np.random.Generator) -> Array:
        return np.ones(self.dim)

    def loss(self, x: Array) -> Array:
        self.now += 1.0
        return np.asarray((x * x).sum(axis=-1) / 2)

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        return x


def by_time(seconds: float, choices: int) -> tuple[float, list[int]]:
    """Return the seconds that the first paths of all choices take, and their number for each."""
    problem = Slow()
    effort = ByTime(problem, 0, 10, choices, seconds, clock=lambda: problem.now)
    batch = np.ones(10, dtype=np.int64)
    setting = PathSetting(
        problem=problem,
        initial=np.ones(problem.dim),
        rule=Sgd(),
        learning_rate=np.full(10, 0.1),
        batch_size=batch,
        turns=partial(QueueReads, ServerTimes(ComputeTime("exponential", np.ones(2)))),
        record=effort.record(batch),
        largest_loss=1e9,
        dtype=np.float64,
    )
    assert len(setting.record) == 11  # so a block takes 11 s
    found = [
        effort.paths(setting, 2, "first", str(choice), lambda done, total: None)
        for choice in range(choices)
    ]
    return problem.now, [0 if paths is None else paths.paths for paths in found]


def test_the_number_of_paths_follows_the_time() -> None:
    """Each of 3 choices gets a block of 4 paths, and up to 16 paths if the others leave time."""
    counts = {}
    for seconds in (55.0, 85.0, 110.0, 1000.0):
        taken, counts[seconds] = by_time(seconds, 3)
        assert taken <= seconds
    assert counts == {
        55.0: [4, 4, 4],
        85.0: [4, 8, 8],
        110.0: [8, 8, 12],
        1000.0: [16, 16, 16],
    }
    with pytest.raises(InputError, match="4 paths of each of 3 choices take about 52 s: expected"):
        by_time(45.0, 3)
