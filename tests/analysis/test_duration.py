"""The time a prediction will take, by a clock that counts the work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.prediction.duration import expected_seconds, in_words
from analysis.prediction.model import MODELS
from analysis.prediction.setting import RunSetting
from analysis.profile.repeats import fit_runs
from asgd.problems.base import Array
from asgd.problems.scalar import Quadratic
from tests.support.reports import simulated_run


class Ticking(Quadratic):
    """A quadratic whose gradients take a second a path."""

    seconds = 0.0

    def gradient(self, x: Array, indices: Any = None) -> Array:
        self.seconds += x[..., 0].size
        return super().gradient(x, indices)

    def gradient_and_noise(self, x: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        self.seconds += x[..., 0].size
        return super().gradient_and_noise(x, rng)


def setting_of(path: Path, updates: int) -> tuple[Ticking, RunSetting]:
    run = simulated_run(path, updates=updates)
    problem = Ticking()
    return problem, replace(RunSetting.of([run], fit_runs([run])), problem=problem)


def test_a_prediction_takes_as_long_as_it_was_expected_to(tmp_path: Path) -> None:
    problem, setting = setting_of(tmp_path / "run", 600)
    models = [MODELS[name] for name in ("sme_sgd", "sme_law", "replay")]
    expected = expected_seconds(models, setting, 4, 0, clock=lambda: problem.seconds)
    start = problem.seconds
    for model in models:
        model.simulate(setting, 4, 0)
    assert expected == pytest.approx(problem.seconds - start, rel=0.15)
    assert expected > 3 * 600


def test_a_short_prediction_is_not_measured(tmp_path: Path) -> None:
    problem, setting = setting_of(tmp_path / "run", 200)
    assert expected_seconds(list(MODELS.values()), setting, 4, 0) == problem.seconds == 0.0


@pytest.mark.parametrize(("seconds", "text"), [(9.6, "10 s"), (122.0, "2 min"), (7300.0, "2.0 h")])
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert in_words(seconds) == text
