"""From a run directory to the loss curve each model predicts for it.

Every model runs on the run's own problem, starting point, step size, batch size and number of
updates, and is recorded at the updates at which the run evaluated its loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.ensemble import Ensemble
from analysis.fit import StalenessFit, fit_run
from analysis.sme import sme_asgd
from analysis.sme_law import Closure, sme_law
from analysis.sme_sgd import sme_sgd
from asgd.errors import InputError
from asgd.problems import make_problem
from asgd.streams import stream
from asgd.trace import Run, replace_file

# Levels i/40: the 5 % and 95 % ends of the band, and a grid even enough to score by (CRPS).
QUANTILE_LEVELS = np.arange(1, 40) / 40.0

MODELS = {
    "sme_sgd": "SME-SGD (no staleness)",
    "sme_asgd": "SME-ASGD (geometric fit)",
    "sme_law": "SME with the measured law",
}


@dataclass(frozen=True)
class Prediction:
    """Predicted loss curves of one run.

    Attributes
    ----------
    curves
        One row per model and recorded update: `model`, `update`, `loss_mean`, `loss_std` and the
        quantiles `q0.025` ... `q0.975` of the loss over the paths.
    settings
        What the models were given: paths, seed, staleness law, mu.
    """

    curves: pd.DataFrame
    settings: dict[str, Any]

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order of `MODELS`."""
        return list(dict.fromkeys(self.curves["model"]))

    def curve(self, model: str) -> pd.DataFrame:
        """Return the rows of one model."""
        return self.curves[self.curves["model"] == model].reset_index(drop=True)

    def save(self, directory: Path) -> None:
        """Write `prediction.parquet` and `prediction.json` into a run directory."""
        replace_file(directory / "prediction.parquet", self.curves.to_parquet(index=False))
        text = json.dumps(self.settings, indent=2) + "\n"
        replace_file(directory / "prediction.json", text.encode())


def predict(
    run: Run,
    *,
    paths: int = 64,
    models: Sequence[str] = tuple(MODELS),
    seed: int | None = None,
    fit: StalenessFit | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Prediction:
    """Predict the loss curve of a run with each model.

    Parameters
    ----------
    run
        The run. Its trace gives the staleness, its configuration everything else.
    paths
        Paths of each ensemble.
    models
        Names out of `MODELS`.
    seed
        Seed of the ensembles; the run's own seed by default.
    fit
        The staleness fit, computed from the trace when not given.
    progress
        Called with the model's name and the share of its work done.

    Raises
    ------
    InputError
        The run evaluated no loss, or a model is unknown.
    UnreliableEstimateError
        The trace is too short for a staleness fit.
    """
    unknown = [name for name in models if name not in MODELS]
    if unknown:
        raise InputError(f"model {unknown[0]!r}: expected one of {', '.join(MODELS)}")
    if run.loss.empty:
        raise InputError(f"{run.path}: holds no loss evaluation to predict")
    fit = fit or fit_run(run)
    seed = run.config.run.seed if seed is None else seed
    closure = closure_of(run)
    frames = [
        _frame(name, _ensemble(name, run, fit, closure, paths, seed, _named(progress, name)))
        for name in models
    ]
    settings = {
        "paths": paths,
        "seed": seed,
        "mu": fit.mu,
        "law": fit.recommended.to_dict(),
        "closure": closure,
        "models": {name: MODELS[name] for name in models},
    }
    return Prediction(pd.concat(frames, ignore_index=True), settings)


def closure_of(run: Run) -> Closure:
    """Return "pool" if the run used each snapshot once, as a server does, else "iid".

    Every worker reads version 0; any later version then belongs to one worker. Independent
    draws of staleness read some versions twice and others never.
    """
    read_version = run.trace["read_version"]
    return "iid" if read_version[read_version > 0].duplicated().any() else "pool"


def _ensemble(
    name: str,
    run: Run,
    fit: StalenessFit,
    closure: Closure,
    paths: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> Ensemble:
    config = run.config
    problem = make_problem(config)
    eta = config.optimizer.learning_rate
    record = run.loss["update"].to_numpy()
    updates = int(record[-1])
    options: Any = {
        "batch_size": config.optimizer.batch_size,
        "initial": problem.initial_point(stream(config.run.seed, "initial")),
        "record": record,
        "quantile_levels": QUANTILE_LEVELS,
        "progress": progress,
    }
    if name == "sme_sgd":
        return sme_sgd(problem, eta, updates, paths, seed, native=True, **options)
    if name == "sme_asgd":
        return sme_asgd(problem, eta, fit.mu, updates, paths, seed, **options)
    workers = config.cluster.workers if closure == "pool" else None
    options |= {"closure": closure, "workers": workers}
    return sme_law(problem, eta, fit.recommended, updates, paths, seed, **options)


def quantile_column(level: float) -> str:
    """Return the name of the column of `Prediction.curves` that holds a quantile."""
    return f"q{level:.3f}"


def has_prediction(run: Run) -> bool:
    """Return whether a prediction is stored in the run directory."""
    return (run.path / "prediction.parquet").is_file() and (run.path / "prediction.json").is_file()


def read_prediction(run: Run) -> Prediction:
    """Read the prediction stored in a run directory.

    Raises
    ------
    InputError
        There is none, or it cannot be read.
    """
    try:
        curves = pd.read_parquet(run.path / "prediction.parquet")
        settings = json.loads((run.path / "prediction.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{run.path}: no readable prediction ({reason}); `asgd predict`") from None
    return Prediction(curves, settings)


def _named(
    progress: Callable[[str, float], None] | None, name: str
) -> Callable[[int, int], None] | None:
    return progress and (lambda done, total: progress(name, done / total))


def _frame(name: str, ensemble: Ensemble) -> pd.DataFrame:
    columns = {
        "model": name,
        "update": ensemble.update,
        "loss_mean": ensemble.loss_mean,
        "loss_std": ensemble.loss_std,
    }
    quantiles = {
        quantile_column(level): ensemble.loss_quantiles[:, i]
        for i, level in enumerate(QUANTILE_LEVELS)
    }
    return pd.DataFrame({**columns, **quantiles})
