"""Prediction against observation: how far off, how well covered, how sharp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.predict import MODELS, QUANTILE_LEVELS, Prediction, quantile_column
from asgd.errors import InputError
from asgd.trace import Run

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ModelScore:
    """Errors of one model.

    Attributes
    ----------
    relative_error
        Mean over the evaluations of |predicted mean - observed mean|, over the mean of
        |observed mean|.
    worst_error
        The largest pointwise difference, on the same scale.
    coverage
        Share of the observed points inside the central 90 % band.
    crps
        Continuous ranked probability score, in units of the loss.
    """

    relative_error: float
    worst_error: float
    coverage: float
    crps: float


@dataclass(frozen=True, repr=False)
class Score:
    """Errors of each model against the observed curve or curves.

    Attributes
    ----------
    models
        By name, in the order of the prediction.
    errors
        One row per model and update: `model`, `update`, `error` = (predicted mean - observed
        mean) over the mean of |observed mean|.
    repeats
        Number of observed curves.
    """

    models: dict[str, ModelScore]
    errors: pd.DataFrame
    repeats: int

    @property
    def closest(self) -> str:
        """Name of the model of the smallest relative error."""
        return min(self.models, key=lambda name: self.models[name].relative_error)

    def table(self) -> pd.DataFrame:
        """Return one row per model."""
        rows = {MODELS[name]: asdict(score) for name, score in self.models.items()}
        return pd.DataFrame.from_dict(rows, orient="index")

    def __repr__(self) -> str:
        return self.table().round(4).to_string()


def compare(run: Run | Sequence[Run], prediction: Prediction) -> Score:
    """Score a prediction against a run, or against repeats of it.

    The starting point, which every model is given, is left out of every number.

    Raises
    ------
    InputError
        A run was not evaluated at the predicted updates.
    """
    runs = [run] if isinstance(run, Run) else list(run)
    models, errors = {}, []
    for name in prediction.models:
        curve = prediction.curve(name)
        curve = curve[curve["update"] > 0]
        update = curve["update"].to_numpy()
        observed = np.stack([_observed(one, update) for one in runs])
        scale = float(np.abs(observed.mean(axis=0)).mean())
        error = (curve["loss_mean"].to_numpy() - observed.mean(axis=0)) / scale
        low, high = (curve[quantile_column(level)].to_numpy() for level in (0.05, 0.95))
        quantiles = curve[[quantile_column(level) for level in QUANTILE_LEVELS]].to_numpy()
        models[name] = ModelScore(
            relative_error=float(np.abs(error).mean()),
            worst_error=float(np.abs(error).max()),
            coverage=float(((observed >= low) & (observed <= high)).mean()),
            crps=float(crps_from_quantiles(observed, quantiles).mean()),
        )
        errors.append(pd.DataFrame({"model": name, "update": update, "error": error}))
    return Score(models, pd.concat(errors, ignore_index=True), len(runs))


def crps_from_quantiles(observed: Array, quantiles: Array) -> Array:
    """Return the continuous ranked probability score of forecasts given by their quantiles.

    The score is twice the integral of the pinball loss over the levels; the integrand vanishes
    at the levels 0 and 1, so the even grid `QUANTILE_LEVELS` is a trapezoid rule for it.

    Parameters
    ----------
    observed
        Shape (..., m).
    quantiles
        At `QUANTILE_LEVELS`, shape (m, q).

    Returns
    -------
    Array
        Shape (..., m), in units of the observation.
    """
    difference = observed[..., None] - quantiles
    pinball = np.maximum(QUANTILE_LEVELS * difference, (QUANTILE_LEVELS - 1.0) * difference)
    step = QUANTILE_LEVELS[1] - QUANTILE_LEVELS[0]
    return np.asarray(2.0 * step * pinball.sum(axis=-1))


def _observed(run: Run, update: npt.NDArray[np.int64]) -> Array:
    known = run.loss["update"].to_numpy()
    missing = np.setdiff1d(update, known)
    if len(missing):
        raise InputError(f"{run.path}: has no loss at update {missing[0]}, which was predicted")
    return np.asarray(run.loss["loss"].to_numpy()[np.searchsorted(known, update)])
