"""The list of the models that predict the loss curve of a run.

A new model is a class in a file of its own under `kinds/`, and one entry here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from analysis.models.blocks import PathModel
from analysis.models.ensemble import Ensemble, run_ensembles
from analysis.models.memory import paths_that_fit
from analysis.prediction.kinds.base import Model, OnProgress
from analysis.prediction.kinds.geometric import GeometricStaleness
from analysis.prediction.kinds.measured_law import MeasuredLaw
from analysis.prediction.kinds.replay import Replay
from analysis.prediction.kinds.without_staleness import WithoutStaleness
from analysis.prediction.loss_curve import SCORED_LEVELS
from analysis.prediction.setting import Setting

LAW = MeasuredLaw("sme_law", "SME with the measured law")

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        WithoutStaleness(),
        GeometricStaleness(),
        LAW,
        Replay(),
        MeasuredLaw("law_pool", "measured law, each snapshot used once", "pool"),
        MeasuredLaw("law_iid", "measured law, independent lags", "iid"),
        MeasuredLaw("law_sampling", "measured law, no lag noise", "sampling"),
    )
}

LABELS = {name: model.label for name, model in MODELS.items()}


def without_replays(names: Iterable[str]) -> list[str]:
    """Return the models that do not replay the recorded staleness."""
    return [name for name in names if name not in MODELS or not MODELS[name].replays]


def simulate(
    models: Sequence[PathModel],
    setting: Setting,
    paths: int,
    seed: int,
    progress: OnProgress | None = None,
) -> list[Ensemble]:
    """Return ensembles of paths that advance together, recorded at the updates of the setting.

    If memory does not suffice for all paths, fewer are simulated, with a warning in the log.
    """
    paths = paths_that_fit(
        paths,
        len(models),
        setting.problem.dim,
        np.dtype(setting.dtype).itemsize,
        len(setting.record),
    )
    return run_ensembles(
        models,
        setting.problem,
        setting.updates,
        paths,
        seed,
        dtype=setting.dtype,
        initial=setting.initial,
        record=setting.record,
        quantile_levels=SCORED_LEVELS.tolist(),
        progress=progress,
        moments=False,
    )
