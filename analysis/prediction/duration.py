"""Estimates the duration of a prediction from the first updates of its paths."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from analysis.prediction.model import Model
from analysis.prediction.setting import RunSetting

_FIRST, _SECOND = 8, 24  # updates: their difference excludes one-time costs
_LONG = 10 * _SECOND  # shorter runs are not measured


def expected_seconds(
    models: Sequence[Model],
    setting: RunSetting,
    paths: int,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the seconds that ensembles of paths will take; 0 if a run is too short to measure.

    Parameters
    ----------
    models
        The models to simulate.
    setting, paths, seed
        As for the prediction.
    clock
        A monotonic clock, in seconds.
    """
    if setting.updates < _LONG:
        return 0.0
    total = 0.0
    for model in models:
        spent = []
        for updates in (_FIRST, _FIRST, _SECOND):  # the first call may compile code
            start = clock()
            model.simulate(_beginning(setting, updates), paths, seed)
            spent.append(clock() - start)
        total += max(0.0, spent[2] - spent[1]) / (_SECOND - _FIRST) * setting.updates
    return total


def _beginning(setting: RunSetting, updates: int) -> RunSetting:
    """Return the setting of the first updates only."""
    rate, size = setting.learning_rate, setting.batch_size
    return replace(
        setting,
        learning_rate=rate[:updates] if isinstance(rate, np.ndarray) else rate,
        batch_size=size[:updates] if isinstance(size, np.ndarray) else size,
        record=np.array([0, updates]),
        staleness=tuple(one[:updates] for one in setting.staleness),
    )


def in_words(seconds: float) -> str:
    """Return a duration in everyday words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
