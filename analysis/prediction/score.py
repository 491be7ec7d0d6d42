"""Scores a prediction against observed losses: error, coverage, sharpness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.prediction.loss_curve import SCORED_LEVELS
from analysis.prediction.model import LABELS, without_replays
from analysis.prediction.predict import Prediction, quantile_column
from analysis.profile.repeats import as_runs
from asgd.arrays import Array, Integers
from asgd.errors import InputError
from asgd.rundir.reader import Run
from asgd.streams import stream

_DRAWS = 2000
_LEVEL = 0.95  # of every interval
_UPPER = (1.0 + _LEVEL) / 2.0

# Parts of the error of the geometric prediction: name, prediction, reference.
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
        The largest pointwise difference, on the same scale. Both are infinite where paths diverge.
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
    intervals
        95 % intervals over repeats: by model, the columns `relative_error_low`,
        `relative_error_high`, `coverage_low`, `coverage_high`, `crps_low` and `crps_high`; and
        `coverage_error`, the standard error of the coverage over runs, since the points of one run
        are inside or outside together. None for a single run. Coverage and CRPS have
        Student's interval of a mean over runs. The interval of the relative error is conservative,
        see `relative_error_interval`; its upper end is infinite if the runs scatter too much.
    labels
        Label of each model.
    """

    models: dict[str, ModelScore]
    errors: pd.DataFrame
    repeats: int
    parts: pd.DataFrame
    intervals: pd.DataFrame | None
    labels: dict[str, str] = field(default_factory=lambda: dict(LABELS))

    @property
    def closest(self) -> str:
        """Name of the model with the smallest relative error, without replays."""
        names = without_replays(self.models) or list(self.models)
        return min(names, key=lambda name: self.models[name].relative_error)

    def numbers(self, model: str) -> dict[str, float]:
        """Return the errors of one model and, for repeats, the ends of their intervals."""
        found: dict[str, float] = asdict(self.models[model])
        if self.intervals is not None:
            ends = self.intervals.loc[model]
            found |= dict(zip(self.intervals.columns, ends.to_numpy(dtype=float), strict=True))
        return found

    def interval(self, model: str, error: str) -> tuple[float, float] | None:
        """Return the ends of the 95 % interval of an error, None if it has none."""
        numbers = self.numbers(model)
        ends = numbers.get(f"{error}_low"), numbers.get(f"{error}_high")
        return None if ends[0] is None or ends[1] is None else (ends[0], ends[1])

    @property
    def scatter(self) -> float | None:
        """Relative error of a perfect prediction by chance alone, None if unknown."""
        noise = self.parts["noise"].get("sampling noise", np.nan)
        return float(noise) if np.isfinite(noise) else None

    def table(self) -> pd.DataFrame:
        """Return one row per model, with the columns of `ModelScore` and of `intervals`."""
        rows = {self.labels[name]: self.numbers(name) for name in self.models}
        return pd.DataFrame.from_dict(rows, orient="index")

    def __repr__(self) -> str:
        return "\n".join(filter(None, (self._cells().to_string(), self._note())))

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        note = self._note()
        return self._cells().to_html() + (note and f"<p>{note}</p>")

    def _cells(self) -> pd.DataFrame:
        """Return the table as text: each error with its interval, if it has one."""
        rows: dict[str, dict[str, str]] = {}
        for name, score in self.models.items():
            rows[self.labels[name]] = {
                error: _in_brackets(value, self.interval(name, error))
                for error, value in asdict(score).items()
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def _note(self) -> str:
        return f"In brackets: 95 % intervals over {self.repeats} repeats" * (self.repeats > 1)


def _in_brackets(value: float, ends: tuple[float, float] | None) -> str:
    """Return a value with its interval as text."""
    return f"{value:.4f}" + (f" ({ends[0]:.4f} to {ends[1]:.4f})" if ends else "")


def compare(run: Run | Sequence[Run], prediction: Prediction) -> Score:
    """Score a prediction against a run, or against repeats of it.

    >>> score = analysis.compare(run, analysis.predict(run, paths=16))
    >>> 0 <= score.models["replay"].coverage <= 1
    True

    Every number excludes the starting point, because every model is given it. Errors are relative
    to the mean of the observed loss; the theory page's section 9 defines them.

    Parameters
    ----------
    run
        A run, or repeats of it with other seeds.
    prediction
        As from `predict`, for the same updates.

    Raises
    ------
    InputError
        A run was not evaluated at the predicted updates.
    """
    runs = as_runs(run)
    models, errors, intervals = {}, [], {}
    for name in prediction.models:
        curve = _after_start(prediction, name)
        update = curve["update"].to_numpy()
        observed = np.stack([_observed(one, update) for one in runs])
        difference = curve["loss_mean"].to_numpy() - observed.mean(axis=0)
        error = difference / float(np.abs(observed.mean(axis=0)).mean())
        models[name] = _score(observed, curve)
        errors.append(pd.DataFrame({"model": name, "update": update, "error": error}))
        if len(runs) > 1:
            intervals[name] = _intervals(observed, curve)
    return Score(
        models=models,
        errors=pd.concat(errors, ignore_index=True),
        repeats=len(runs),
        parts=split_error(runs, prediction),
        intervals=pd.DataFrame.from_dict(intervals, orient="index") if intervals else None,
        labels={name: prediction.label(name) for name in prediction.models},
    )


def _score(observed: Array, curve: pd.DataFrame) -> ModelScore:
    mean = observed.mean(axis=0)
    error = np.abs(curve["loss_mean"].to_numpy() - mean) / float(np.abs(mean).mean())
    inside, scores = _by_point(observed, curve)
    return ModelScore(
        relative_error=_or_infinite(error.mean()),
        worst_error=_or_infinite(error.max()),
        coverage=float(inside.mean()),
        crps=_or_infinite(scores.mean()),
    )


def _or_infinite(error: float) -> float:
    """Return an error; it is infinite, not nan, where predicted paths diverge."""
    return float(error) if np.isfinite(error) else math.inf


def _by_point(observed: Array, curve: pd.DataFrame) -> tuple[npt.NDArray[np.bool_], Array]:
    """Return whether each observed point is inside the band, and its CRPS, shape (runs, m) each."""
    low, high = (curve[quantile_column(level)].to_numpy() for level in (0.05, 0.95))
    quantiles = curve[[quantile_column(level) for level in SCORED_LEVELS]].to_numpy()
    return (observed >= low) & (observed <= high), crps_from_quantiles(observed, quantiles)


def _intervals(observed: Array, curve: pd.DataFrame) -> dict[str, float]:
    """Return the ends of all intervals over runs, because the points of one run are dependent."""
    inside, scores = (values.mean(axis=1) for values in _by_point(observed, curve))
    predicted, mean_error = (curve[name].to_numpy() for name in ("loss_mean", "loss_mean_error"))
    share = _mean_interval(inside)
    ends: dict[str, tuple[float, float]] = {
        "relative_error": relative_error_interval(observed, predicted, mean_error),
        "coverage": (max(0.0, share[0]), min(1.0, share[1])),
        "crps": _mean_interval(scores),
    }
    limits = {
        f"{name}_{end}": float(value)
        for name, pair in ends.items()
        for end, value in zip(("low", "high"), pair, strict=True)
    }
    return {**limits, "coverage_error": float(inside.std(ddof=1) / np.sqrt(len(observed)))}


def relative_error_interval(
    observed: Array, predicted: Array, mean_error: Array
) -> tuple[float, float]:
    """Return a 95 % interval of the relative error against the mean over infinitely many repeats.

    Ours. An error is a mean of absolute values, so it includes the scatter of the observed mean.
    Resampling runs would add that scatter again, and the interval of a right prediction would not
    reach 0. With the true mean curve t, the observed one o, and `off` the mean over the evaluations
    of |o - t|, the triangle inequality bounds the relative error (I1):

        (mean |p - o| - off) / (mean |o| + off) <= mean |p - t| / mean |t|
                                                <= (mean |p - o| + off) / (mean |o| - off)

    `off` is unknown, and its 95 % quantile is used: o - t is taken as Gaussian with the covariance
    of the runs, estimated with R - 1 degrees of freedom, hence Student's factor. This is exact if
    the points of a run move together, and conservative otherwise; the triangle inequality adds to
    that. To `off` is added |z| mean(`mean_error`) with a standard normal z, as if the drawn paths
    shifted all points of p together. The interval ignores that the prediction may have been fitted
    to these runs.

    Parameters
    ----------
    observed
        Losses of R >= 2 runs, shape (R, m).
    predicted, mean_error
        Predicted mean p and its standard error due to the drawn paths, shape (m,).

    Returns
    -------
    tuple
        The ends; the upper one is infinite if `off` exceeds the mean of |o|.
    """
    from scipy.special import ndtri

    mean = observed.mean(axis=0)
    scale, error = float(np.abs(mean).mean()), float(np.abs(predicted - mean).mean())
    if not np.isfinite(error):  # predicted paths diverge
        return math.inf, math.inf
    runs, rng = len(observed), stream(0, "repeats")
    student = _student(runs) / ndtri(_UPPER)
    draws = rng.standard_normal((_DRAWS, runs)) @ (observed - mean) / math.sqrt(runs * (runs - 1))
    of_paths = np.abs(rng.standard_normal(_DRAWS)) * mean_error.mean()
    off = float(np.quantile(student * np.abs(draws).mean(axis=1) + of_paths, _LEVEL))
    high = (error + off) / (scale - off) if off < scale else math.inf
    return max(0.0, (error - off) / (scale + off)), high


def _student(runs: int) -> float:
    """Return the half-width of Student's interval in standard errors."""
    from scipy.special import stdtrit

    return float(stdtrit(runs - 1, _UPPER))


def _mean_interval(values: Array) -> tuple[float, float]:
    """Return Student's interval of the mean of independent values, shape (R,)."""
    reach = _student(len(values)) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - reach), float(values.mean() + reach)


def split_error(run: Run | Sequence[Run], prediction: Prediction) -> pd.DataFrame:
    """Return the parts of the error of the geometric prediction.

    Replay against observation is sampling noise; the law against replay is the shape and
    dependence of staleness; the geometric fit against the law is the assumption of the theory.

    Returns
    -------
    DataFrame
        One row per part if both of its models were predicted. Columns: `error`, the mean over the
        evaluations of |difference of the two mean curves| over the mean of |observed mean|; and
        `noise`, its value if the curves differed only by the scatter of the observed runs and of
        the drawn paths or reads.
    """
    runs = as_runs(run)
    rows = {}
    for part, name, against in PARTS:
        if not {name, against} - {None} <= set(prediction.models):
            continue
        curve = _after_start(prediction, name)
        update = curve["update"].to_numpy()
        observed = np.stack([_observed(one, update) for one in runs])
        if against is None:
            other, scatter = observed.mean(axis=0), curve["loss_std"].to_numpy() ** 2 / len(runs)
        else:
            reference = _after_start(prediction, against)
            other = reference["loss_mean"].to_numpy()
            scatter = reference["loss_mean_error"].to_numpy() ** 2
        scatter = scatter + curve["loss_mean_error"].to_numpy() ** 2
        scale = float(np.abs(observed.mean(axis=0)).mean())
        error = np.abs(curve["loss_mean"].to_numpy() - other).mean() / scale
        # E |z| = sqrt(2 / pi) for a standard normal z
        noise = np.sqrt(2.0 / np.pi * scatter).mean() / scale
        rows[part] = {"error": float(error), "noise": float(noise)}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["error", "noise"])


def _after_start(prediction: Prediction, name: str) -> pd.DataFrame:
    """Return the curve of one model without the starting point, which every model is given."""
    curve = prediction.curve(name)
    return curve[curve["update"] > 0]


def crps_from_quantiles(observed: Array, quantiles: Array) -> Array:
    """Return the continuous ranked probability score of forecasts given by their quantiles.

    The score is twice the integral of the pinball loss over the levels; the integrand vanishes
    at the levels 0 and 1, so the even grid `SCORED_LEVELS` is a trapezoid rule for it.

    Parameters
    ----------
    observed
        Shape (..., m).
    quantiles
        At `SCORED_LEVELS`, shape (m, q).

    Returns
    -------
    Array
        Shape (..., m), in units of the observation.
    """
    difference = observed[..., None] - quantiles
    pinball = np.maximum(SCORED_LEVELS * difference, (SCORED_LEVELS - 1.0) * difference)
    step = SCORED_LEVELS[1] - SCORED_LEVELS[0]
    return np.asarray(2.0 * step * pinball.sum(axis=-1))


def _observed(run: Run, update: Integers) -> Array:
    known = run.loss["update"].to_numpy()
    missing = np.setdiff1d(update, known)
    if len(missing):
        raise InputError(f"{run.path}: has no loss at update {missing[0]}, which was predicted")
    return np.asarray(run.loss["loss"].to_numpy()[np.searchsorted(known, update)])
