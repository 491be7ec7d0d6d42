"""The announced time of a prediction, by a clock that counts the work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.prediction.duration import Forecast, in_words
from analysis.prediction.model import MODELS, simulate
from analysis.prediction.setting import RunSetting
from analysis.profile.repeats import fit_runs
from asgd.problems.base import Array
from asgd.problems.scalar import Quadratic
from tests.support.reports import simulated_run


class Ticking(Quadratic):
    """A quadratic whose gradients take 0.1 s for each path, and the first one a minute more."""

    seconds = 0.0

    def _tick(self, x: Array) -> None:
        self.seconds += 0.1 * x[..., 0].size + 60.0 * (self.seconds == 0)

    def gradient(self, x: Array, indices: Any = None) -> Array:
        self._tick(x)
        return super().gradient(x, indices)

    def gradient_and_noise(self, x: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        self._tick(x)
        return super().gradient_and_noise(x, rng)


def announced(path: Path, updates: int) -> tuple[list[float], float]:
    """Return the announced times of a prediction by three models and its real time, in seconds."""
    run = simulated_run(path, updates=updates)
    problem = Ticking()
    setting = replace(RunSetting.of([run], fit_runs([run])), problem=problem)
    said: list[float] = []
    forecast = Forecast(said.append, clock=lambda: problem.seconds)
    names = ("sme_sgd", "sme_law", "replay")
    for before, name in enumerate(names):
        model = MODELS[name].path_model(setting, 0)

        def tell(done: int, total: int, before: int = before) -> None:
            forecast((before + done / total) / len(names))

        simulate([model], setting, 4, 0, tell)
    return said, problem.seconds


def test_a_prediction_takes_as_long_as_was_announced(tmp_path: Path) -> None:
    (said,), seconds = announced(tmp_path / "run", updates=600)
    assert said == pytest.approx(seconds - 60.0, rel=0.05)
    assert said > 3 * 600 * 0.1 * 4 * 0.95


def test_short_work_is_not_announced() -> None:
    said: list[float] = []
    now = [0.0]
    forecast = Forecast(said.append, clock=lambda: now[0])
    for share in (0.0, 0.25, 0.5, 1.0):
        now[0] += 0.6
        forecast(share)
    assert said == []


@pytest.mark.parametrize(("seconds", "text"), [(9.6, "10 s"), (122.0, "2 min"), (7300.0, "2.0 h")])
def test_durations_in_words(seconds: float, text: str) -> None:
    assert in_words(seconds) == text
