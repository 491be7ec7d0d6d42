"""Prediction against observation: how far off, how well covered, how sharp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.loss_curve import QUANTILE_LEVELS
from analysis.predict import MODELS, Prediction, quantile_column
from analysis.setting import as_runs
from asgd.errors import InputError
from asgd.trace import Run

Array = npt.NDArray[np.float64]

# The error of the geometric prediction, part by part: what it is, predicted by, against.
PARTS = (
    ("sampling noise", "replay", None),
    ("shape and dependence of staleness", "sme_law", "replay"),
    ("geometric assumption", "sme_asgd", "sme_law"),
)


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
    parts
        The error of the geometric prediction, part by part; see `split_error`.
    """

    models: dict[str, ModelScore]
    errors: pd.DataFrame
    repeats: int
    parts: pd.DataFrame

    @property
    def closest(self) -> str:
        """Name of the model of the smallest relative error; a replay does not compete."""
        names = [name for name in self.models if name != "replay"] or list(self.models)
        return min(names, key=lambda name: self.models[name].relative_error)

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
    runs = as_runs(run)
    models, errors = {}, []
    for name in prediction.models:
        curve = _after_start(prediction, name)
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
    return Score(
        models, pd.concat(errors, ignore_index=True), len(runs), split_error(runs, prediction)
    )


def split_error(run: Run | Sequence[Run], prediction: Prediction) -> pd.DataFrame:
    """Return the error of the geometric prediction, part by part.

    Replay against observation is sampling noise; the law against replay is the shape and
    dependence of staleness; the geometric fit against the law is the assumption of the theory.

    Returns
    -------
    DataFrame
        One row for each part whose models were predicted. Columns: `error`, the mean over the
        evaluations of |difference of the two mean curves| over the mean of |observed mean|; and
        `noise`, what it would be if the two curves differed by the scatter of the predicted paths
        and of the observed runs alone.
    """
    runs = as_runs(run)
    rows = {}
    for part, name, against in PARTS:
        if not {name, against} - {None} <= set(prediction.models):
            continue
        curve = _after_start(prediction, name)
        update = curve["update"].to_numpy()
        observed = np.stack([_observed(one, update) for one in runs])
        variance = curve["loss_std"].to_numpy() ** 2
        if against is None:
            other, scatter = observed.mean(axis=0), variance / len(runs)
        else:
            reference = _after_start(prediction, against)
            other = reference["loss_mean"].to_numpy()
            scatter = _monte_carlo_variance(prediction, against, reference)
        scatter = scatter + _monte_carlo_variance(prediction, name, curve)
        scale = float(np.abs(observed.mean(axis=0)).mean())
        error = np.abs(curve["loss_mean"].to_numpy() - other).mean() / scale
        # E |z| = sqrt(2 / pi) for a standard normal z
        noise = np.sqrt(2.0 / np.pi * scatter).mean() / scale
        rows[part] = {"error": float(error), "noise": float(noise)}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["error", "noise"])


def _monte_carlo_variance(prediction: Prediction, name: str, curve: pd.DataFrame) -> Array:
    """Return the variance of a predicted mean, zero where no paths were drawn."""
    paths = prediction.paths(name)
    variance = curve["loss_std"].to_numpy() ** 2
    return np.asarray(variance / paths if paths else 0.0 * variance)


def _after_start(prediction: Prediction, name: str) -> pd.DataFrame:
    """Return the curve of one model without the starting point, which every model is given."""
    curve = prediction.curve(name)
    return curve[curve["update"] > 0]


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
