"""Predicts the loss curve of a run with each model.

Every model uses the run's own problem, starting point, step size, batch size and number of updates,
and is recorded at the updates at which the run evaluated its loss.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np
import pandas as pd

from analysis.exact.moments import Closure
from analysis.models.blocks import share_calls
from analysis.prediction.duration import Forecast
from analysis.prediction.kinds.base import Model, OnProgress
from analysis.prediction.loss_curve import SCORED_LEVELS, LossCurve
from analysis.prediction.model import LABELS, LAW, MODELS, simulate
from analysis.prediction.run_stability import DivergedPaths, StabilityAnswer, run_stability
from analysis.prediction.setting import RunSetting, whole
from analysis.profile.fit import StalenessFit
from analysis.profile.repeats import as_runs, fit_runs
from asgd.config.make import load_config
from asgd.errors import InputError, UnreliableEstimateError
from asgd.problems.base import Problem
from asgd.rundir.columns import LOSS
from asgd.rundir.files import replace_file
from asgd.rundir.parts import most_rows
from asgd.rundir.problem_record import check_problem
from asgd.rundir.reader import Run
from asgd.rundir.tables import Types, read_table, write_table
from asgd.seals import sealed_object
from asgd.stored_json import read_sealed

Method = Literal["auto", "simulate", "fast"]


def quantile_column(level: float) -> str:
    """Return the name of the column of `Prediction.curves` for a quantile."""
    return f"q{level:.3f}"


_COLUMNS: Types = {
    "model": str,
    "update": np.int64,
    **dict.fromkeys(("loss_mean", "loss_std", "loss_mean_error"), np.float64),
    **dict.fromkeys(map(quantile_column, SCORED_LEVELS), np.float64),
}


class PredictedWith(msgspec.Struct, frozen=True):
    """The origin of one curve.

    Attributes
    ----------
    label
        Label of the model.
    paths
        Number of simulated paths; None for a computed curve.
    """

    label: str
    paths: int | None


class PredictionSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The inputs of the models of a prediction.

    Attributes
    ----------
    paths, method, seed
        Arguments of `predict`.
    mu
        Parameter of the geometric fit.
    law, closure
        The staleness law, and how the lags of different updates depend on each other.
    turns
        Whether "sme_law" takes the turns of the workers from the law or from the record.
    stability
        Stability of the run.
    models
        Origin of each curve by model, in the order of the curves.
    """

    paths: int
    method: Method
    seed: int
    mu: float
    law: dict[str, Any]
    closure: Closure
    turns: Literal["by law", "recorded"]
    stability: StabilityAnswer
    models: dict[str, PredictedWith]


@dataclass(frozen=True, repr=False)
class Prediction:
    """Predicted loss curves of one run.

    Attributes
    ----------
    curves
        One row per model and recorded update: `model` (a name from `MODELS`), `update` (number of
        applied updates), and for the loss of a single run, in units of the loss: `loss_mean`,
        `loss_std`, `loss_mean_error` (the standard error of the mean due to drawn paths or reads),
        and the quantiles `q0.025`, `q0.050`, ..., `q0.975`.
    settings
        The inputs of the models.
    """

    curves: pd.DataFrame
    settings: PredictionSettings

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order of `MODELS`."""
        return list(dict.fromkeys(self.curves["model"]))

    def curve(self, model: str) -> pd.DataFrame:
        """Return the rows of one model."""
        return self.curves[self.curves["model"] == model].reset_index(drop=True)

    @property
    def recorded_turns(self) -> bool:
        """Whether "sme_law" resamples the recorded turns of the run instead of using the law."""
        return self.settings.turns == "recorded" and LAW.name in self.models

    def label(self, model: str) -> str:
        """Return the label of a model."""
        return self.settings.models[model].label

    def paths(self, model: str) -> int | None:
        """Return the number of simulated paths; None for a computed curve."""
        return self.settings.models[model].paths

    def table(self) -> pd.DataFrame:
        """Return the loss after the last update, one row per model.

        Columns: `loss_mean`, the ends `q0.050` and `q0.950` of its 90 % band, and `paths`, the
        number of simulated paths (0 for a computed curve).
        """
        last = self.curves.groupby("model", sort=False).tail(1).set_index("model")
        table = last[["loss_mean", quantile_column(0.05), quantile_column(0.95)]]
        paths = [self.paths(str(name)) or 0 for name in table.index]
        return table.assign(paths=paths).rename(index=self.label).rename_axis(None)

    def __repr__(self) -> str:
        return (
            f"{self._title()}\n\n{self.table().to_string()}\n\n{self.settings.stability.sentence}"
        )

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        stability = html.escape(self.settings.stability.sentence)
        return f"<p>{self._title()}</p>{self.table().to_html()}<p>{stability}</p>"

    def _title(self) -> str:
        return f"Predicted loss after {self.curves['update'].max()} updates"

    def save(self, directory: str | Path) -> None:
        """Write `prediction.parquet` and `prediction.json` into a run directory."""
        directory = Path(directory)
        columns = {name: self.curves[name].to_numpy() for name in _COLUMNS}
        write_table(directory / "prediction.parquet", columns, _COLUMNS, ("model",))
        replace_file(
            directory / "prediction.json", sealed_object(msgspec.to_builtins(self.settings))
        )


def predict(
    run: Run | Sequence[Run],
    *,
    paths: int = 64,
    models: Sequence[str] | None = None,
    method: Method = "auto",
    seed: int | None = None,
    fit: StalenessFit | None = None,
    problem: Problem | None = None,
    force: bool = False,
    announce: Callable[[float], None] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Prediction:
    """Predict the loss curve of a run with each model.

    >>> prediction = analysis.predict(run, paths=16)
    >>> prediction.models
    ['sme_sgd', 'sme_asgd', 'sme_law', 'replay']

    Parameters
    ----------
    run
        The run, or repeats of it with other seeds. The trace gives the staleness, the configuration
        everything else. For repeats the staleness is fitted jointly, and each is replayed by its
        share of the paths. If they start at different points, each start gets its share of the
        paths of every model. Repeats that were cut short are left out.
    paths
        Number of paths of each ensemble.
    models
        Names from `MODELS`. Default: "sme_sgd", "sme_asgd", "sme_law" and "replay"; for "fast" all
        but the replay, for synchronous runs those without staleness. Rules other than sgd, local
        steps, servers that discard gradients or mix their versions, parts of the samples
        (`data.shards`) and epochs (`data.sampling`) are only replayed; the replay draws batches as
        the run did. "sme_law" takes the closure of the run. If each snapshot was used once, as on a
        server, this is the pool: with the turns of the law ("law_pool"), or with resampled recorded
        turns if these come in spells, (P3). Otherwise it is "law_iid".
    method
        "auto" computes the curves of quadratics and least squares from exact moments, without
        paths, and simulates all others; "simulate" simulates all; "fast" follows one mean path
        per model with linear noise around it, (F1), and needs a single start.
    seed
        Seed of the ensembles; default the run's own seed.
    fit
        The staleness fit; default computed from the trace.
    problem
        The problem of the run; default made from its configuration.
    force
        Predict even if the problem has changed, see `asgd.rundir.problem_record`.
    announce
        Called at most once, with the expected seconds of the whole prediction, when its first two
        seconds have shown the pace.
    progress
        Called with the names of the current models and the completed share of all work.

    Raises
    ------
    InputError
        The run evaluated no loss, its problem has changed, or a model is unknown or not available
        for this method or rule.
    UnreliableEstimateError
        The trace is too short for a staleness fit; or "fast" fails because the run is so far above
        its largest stable learning rate that noise grows large. The error then carries the curve.
    """
    if method not in get_args(Method):
        raise InputError(f"method = {method!r}: expected {', '.join(get_args(Method))}")
    unknown = [name for name in models or () if name not in MODELS]
    if unknown:
        raise InputError(f"model = {unknown[0]!r}: expected one of {', '.join(MODELS)}")
    runs = whole(as_runs(run))
    if runs[0].loss.empty:
        raise InputError(f"{runs[0].path}: holds no loss evaluation to predict")
    setting = RunSetting.of(runs, fit or fit_runs(runs), problem)
    for one in runs:
        check_problem(one, setting.problem, "predict", force=force)
    seed = runs[0].config.run.seed if seed is None else seed
    chosen = _models(setting, models, method)
    work = _Work(len(chosen), progress, announce)
    drawn = [] if method == "fast" else chosen
    if method == "auto":
        drawn = [model for model in chosen if not model.has_exact(setting)]
    found = _simulated(drawn, setting, paths, seed, work)
    for model in chosen:
        if model not in drawn:
            found[model.name] = _computed(model, setting, method, seed, work)
    curves = {model.name: found[model.name] for model in chosen}
    measured = [name for name, model in MODELS.items() if model.measured and name in curves]
    end = curves[[*measured, *curves][0]].end
    settings = PredictionSettings(
        paths=paths,
        method=method,
        seed=seed,
        mu=setting.mu,
        law=setting.law.to_dict(),
        closure=setting.closure,
        turns="by law" if setting.turns is None or method == "fast" else "recorded",
        stability=run_stability(setting, end, _diverged(curves)).answer(),
        models={
            name: PredictedWith(_label(MODELS[name], setting, method), curve.paths)
            for name, curve in curves.items()
        },
    )
    frames = [_frame(name, curve) for name, curve in curves.items()]
    return Prediction(pd.concat(frames, ignore_index=True), settings)


def _models(setting: RunSetting, asked: Sequence[str] | None, method: Method) -> list[Model]:
    """Return the models asked for, or the default models of the setting."""
    special = None if setting.rule is None else "a rule other than sgd"
    if setting.pushes is not None:
        special = setting.pushes.feature
    elif setting.replay_only:
        special = "a run whose server discards gradients or mixes their versions"
    special = setting.dependence or special
    if asked is None:
        chosen = [model for model in MODELS.values() if model.is_default(setting)]
        if special:
            chosen = [model for model in chosen if model.replays]
        if method == "fast":
            chosen = [model for model in chosen if model.has_fast]
    else:
        chosen = [MODELS[name] for name in asked]
        if special and not all(model.replays for model in chosen):
            raise InputError(f"models = {list(asked)}: expected 'replay' alone for {special}")
    if not chosen:
        but = "without discarded or mixed gradients"
        if setting.pushes is not None or setting.dependence is not None:
            but = f"not {special}"
        raise InputError(f"method = 'fast': expected 'auto' or 'simulate', or the rule sgd, {but}")
    return chosen


class _Work:
    """Reports the progress of a prediction, and its expected duration."""

    def __init__(
        self,
        models: int,
        progress: Callable[[str, float], None] | None,
        announce: Callable[[float], None] | None,
    ) -> None:
        self._all, self._done = models, 0
        self._progress = progress
        self._forecast = None if announce is None else Forecast(announce)

    def begin(self, models: Sequence[Model]) -> OnProgress:
        """Begin with some models; return a callback for the progress of their paths."""
        names, before = ", ".join(model.name for model in models), self._done
        self._done += len(models)

        def tell(done: int, total: int) -> None:
            share = (before + len(models) * done / total) / self._all
            if self._progress is not None:
                self._progress(names, share)
            if self._forecast is not None:
                self._forecast(share)

        tell(0, 1)
        return tell


def _simulated(
    models: Sequence[Model], setting: RunSetting, paths: int, seed: int, work: _Work
) -> dict[str, LossCurve]:
    """Return the curves of models from paths, which advance together if that saves calls."""
    together = share_calls(setting.problem)
    curves = {}
    for group in [models] if together else [[model] for model in models]:
        if group:
            path_models = [model.path_model(setting, seed) for model in group]
            ensembles = simulate(path_models, setting, paths, seed, work.begin(group))
            for model, ensemble in zip(group, ensembles, strict=True):
                curves[model.name] = LossCurve.of_ensemble(ensemble, setting.starts)
    return curves


def _computed(
    model: Model, setting: RunSetting, method: Method, seed: int, work: _Work
) -> LossCurve:
    """Return the curve of one model without paths."""
    progress = work.begin([model])
    if method != "fast":
        return model.exact(setting, seed)
    curve = model.fast(setting, seed, progress)
    if curve.unstable_from is not None:
        raise UnreliableEstimateError(
            f"method 'fast', {model.label}: noise outgrows its linear theory by update "
            f"{curve.unstable_from}; accepted here: 'auto', 'simulate'",
            curve,
        )
    return curve


def _diverged(curves: Mapping[str, LossCurve]) -> DivergedPaths | None:
    """Return the paths of the model with the measured staleness that diverge most, if any do."""
    found = [
        DivergedPaths(LABELS[name], curve.paths, curve.diverged)
        for name, curve in curves.items()
        if MODELS[name].measured and curve.paths and curve.diverged
    ]
    return max(found, key=lambda paths: paths.share, default=None)


def _label(model: Model, setting: RunSetting, method: Method) -> str:
    return model.label if method == "fast" else model.label_for(setting)


def has_prediction(directory: str | Path) -> bool:
    """Return whether a prediction is stored in the directory of a run or of its repeats."""
    return all((Path(directory) / f"prediction.{kind}").is_file() for kind in ("parquet", "json"))


def read_prediction(directory: str | Path) -> Prediction:
    """Read the prediction stored in the directory of a run or of its repeats.

    Raises
    ------
    InputError
        There is none, or it cannot be read.
    """
    directory = Path(directory)
    try:
        settings = read_sealed(directory / "prediction.json", PredictionSettings)
        most = most_rows(load_config(directory / "config.json"), LOSS) * len(settings.models)
        columns = read_table(directory / "prediction.parquet", _COLUMNS, most)
        curves = pd.DataFrame(columns)
        if set(curves["model"]) != set(settings.models):
            raise ValueError("its two files belong to different predictions")
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{directory}: no readable prediction ({reason}); `asgd predict`"
        ) from None
    return Prediction(curves, settings)


def _frame(name: str, curve: LossCurve) -> pd.DataFrame:
    columns = {
        "model": name,
        "update": curve.update,
        "loss_mean": curve.mean,
        "loss_std": curve.std,
        "loss_mean_error": curve.mean_error,
    }
    quantiles = {
        quantile_column(level): curve.quantiles[:, i] for i, level in enumerate(SCORED_LEVELS)
    }
    return pd.DataFrame({**columns, **quantiles})
