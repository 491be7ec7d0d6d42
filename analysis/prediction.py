"""From a run directory to the loss curve each model predicts for it.

Every model runs on the run's own problem, starting point, step size, batch size and number of
updates, and is recorded at the updates at which the run evaluated its loss.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from analysis.closed import closed_curve, has_closed_forms
from analysis.experiment import as_runs, fit_runs
from analysis.fit import StalenessFit
from analysis.linear_noise import linear_noise
from analysis.loss_curve import QUANTILE_LEVELS, LossCurve
from analysis.run_stability import run_stability
from analysis.setting import Setting, whole
from analysis.sme import sme_asgd
from analysis.sme_law import sme_law
from analysis.sme_replay import sme_replay
from analysis.sme_sgd import sme_sgd
from asgd.errors import InputError, UnreliableEstimateError
from asgd.files import replace_file
from asgd.staleness import Geometric
from asgd.trace import Run

MODELS = {
    "sme_sgd": "SME-SGD (no staleness)",
    "sme_asgd": "SME-ASGD (geometric fit)",
    "sme_law": "SME with the measured law",
    "replay": "replay of the measured staleness",
    "law_pool": "measured law, each snapshot used once",
    "law_iid": "measured law, independent lags",
    "law_sampling": "measured law, no lag noise",
}
RECORDED_TURNS = "SME with recorded turns"  # what "sme_law" is where it does not use the law
DEFAULT_MODELS = ("sme_sgd", "sme_asgd", "sme_law", "replay")

Method = Literal["auto", "simulate", "fast"]


@dataclass(frozen=True, repr=False)
class Prediction:
    """Predicted loss curves of one run.

    Attributes
    ----------
    curves
        One row per model and recorded update: `model` (a name out of `MODELS`), `update` (applied
        updates so far), and of the loss of a single run, in units of the loss: `loss_mean`,
        `loss_std`, `loss_mean_error`, the standard error of the mean by the paths or reads that
        were drawn, and the quantiles `q0.025`, `q0.050`, ..., `q0.975`.
    settings
        What the models were given: seed, staleness law, mu, closure; whether the run is stable
        (`RunStability.to_dict`), None for a rule other than sgd; and of each model its label and
        how many paths were simulated.
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

    @property
    def recorded_turns(self) -> bool:
        """Whether "sme_law" resamples the turns recorded in the run and does not use the law."""
        return self.settings.get("turns") == "recorded" and "sme_law" in self.models

    def label(self, model: str) -> str:
        """Return what to call a model."""
        recorded = model == "sme_law" and self.recorded_turns
        return RECORDED_TURNS if recorded else MODELS.get(model, model)

    def paths(self, model: str) -> int | None:
        """Return how many paths were simulated; None where the curve was computed."""
        paths: int | None = self.settings["models"][model]["paths"]
        return paths

    def table(self) -> pd.DataFrame:
        """Return the loss after the last update, one row per model.

        Columns: `loss_mean`, the ends `q0.050` and `q0.950` of its 90 % band, and `paths`, how
        many were simulated (0 where the curve was computed).
        """
        last = self.curves.groupby("model", sort=False).tail(1).set_index("model")
        table = last[["loss_mean", quantile_column(0.05), quantile_column(0.95)]]
        paths = [self.paths(str(name)) or 0 for name in table.index]
        return table.assign(paths=paths).rename(index=self.label).rename_axis(None)

    def __repr__(self) -> str:
        stability = self._stability()
        return f"{self._title()}\n\n{self.table().to_string()}" + (stability and f"\n\n{stability}")

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        title, stability = html.escape(self._title()), html.escape(self._stability())
        return f"<p>{title}</p>{self.table().to_html()}" + (stability and f"<p>{stability}</p>")

    def _title(self) -> str:
        return f"Predicted loss after {self.curves['update'].max()} updates"

    def _stability(self) -> str:
        """Return the sentence on stability; none where it is not known, under another rule."""
        stability = self.settings["stability"]
        return str(stability["sentence"]) if stability else ""

    def save(self, directory: str | Path) -> None:
        """Write `prediction.parquet` and `prediction.json` into a run directory."""
        directory = Path(directory)
        replace_file(directory / "prediction.parquet", self.curves.to_parquet(index=False))
        text = json.dumps(self.settings, indent=2) + "\n"
        replace_file(directory / "prediction.json", text.encode())


def predict(
    run: Run | Sequence[Run],
    *,
    paths: int = 64,
    models: Sequence[str] | None = None,
    method: Method = "auto",
    seed: int | None = None,
    fit: StalenessFit | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Prediction:
    """Predict the loss curve of a run with each model.

    Parameters
    ----------
    run
        The run. Its trace gives the staleness, its configuration everything else. Or repeats
        of one run under other seeds: the staleness of all is fitted, and each replayed by its
        share of the paths. Repeats cut short of the furthest are left out.
    paths
        Paths of each ensemble.
    models
        Names out of `MODELS`; by default `DEFAULT_MODELS`, of which "fast" has no replay,
        synchronous runs have those without staleness, and a rule other than sgd the replay alone.
        "sme_law" takes the closure that fits the run: where each snapshot was used once, as on a
        server, the pool by the hazards of the law, "law_pool", or, where turns come in spells,
        with the recorded turns resampled, (P3); otherwise "law_iid".
    method
        "auto" computes the curves of quadratics and least squares from exact moments, without
        paths, and simulates all others; "simulate" simulates all; "fast" follows one mean path
        of each model with linear noise around it, (F1).
    seed
        Seed of the ensembles; the run's own seed by default.
    fit
        The staleness fit, computed from the trace when not given.
    progress
        Called with the model's name and the share of its work done.

    Raises
    ------
    InputError
        The run evaluated no loss, or a model is unknown or not to be had by this method or for
        this rule.
    UnreliableEstimateError
        The trace is too short for a staleness fit; or "fast" fails, because the run is so far
        above its largest stable learning rate that noise does not stay small: carries the curve.
    """
    if method not in get_args(Method):
        raise InputError(f"method: {method!r}; accepted: {', '.join(get_args(Method))}")
    unknown = [name for name in models or () if name not in MODELS]
    if unknown:
        raise InputError(f"model {unknown[0]!r}: expected one of {', '.join(MODELS)}")
    runs = whole(as_runs(run))
    if runs[0].loss.empty:
        raise InputError(f"{runs[0].path}: holds no loss evaluation to predict")
    setting = Setting.of(runs, fit or fit_runs(runs))
    models = _models(setting, models, method)
    seed = runs[0].config.run.seed if seed is None else seed
    curves = {}
    for name in models:
        report = _named(progress, name)
        if method == "fast":
            curves[name] = _fast(name, setting, seed, report)
        elif method == "auto" and setting.rule is None and has_closed_forms(setting, name):
            curves[name] = closed_curve(name, setting, seed)
        else:
            curves[name] = _simulated(name, setting, paths, seed, report)
        if report:
            report(1, 1)
    ends = [curves[name].end for name in ("sme_law", "replay", *curves) if name in curves]
    settings = {
        "paths": paths,
        "method": method,
        "seed": seed,
        "mu": setting.mu,
        "law": setting.law.to_dict(),
        "closure": setting.closure,
        "turns": "by hazard" if setting.turns is None or method == "fast" else "recorded",
        "stability": None if setting.rule else run_stability(setting, ends[0]).to_dict(),
    }
    frames = [_frame(name, curve) for name, curve in curves.items()]
    prediction = Prediction(pd.concat(frames, ignore_index=True), settings)
    settings["models"] = {
        name: {"label": prediction.label(name), "paths": curve.paths}
        for name, curve in curves.items()
    }
    return prediction


def _models(setting: Setting, asked: Sequence[str] | None, method: Method) -> list[str]:
    """Return the models to predict with, those of the setting if none are asked for."""
    if asked is None:
        asked = [name for name in setting.models if method != "fast" or name != "replay"]
    elif setting.rule is not None and set(asked) != {"replay"}:
        raise InputError(f"models = {list(asked)}: a rule other than sgd takes 'replay' alone")
    if not asked:
        raise InputError("method: 'fast' takes the rule sgd alone; accepted: 'auto', 'simulate'")
    return list(asked)


def _simulated(
    name: str,
    setting: Setting,
    paths: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> LossCurve:
    """Return the curve of one model from an ensemble of paths."""
    problem, eta, updates = setting.problem, setting.learning_rate, setting.updates
    options: Any = {
        "dtype": setting.dtype,
        "batch_size": setting.batch_size,
        "initial": setting.initial,
        "record": setting.record,
        "quantile_levels": QUANTILE_LEVELS,
        "progress": progress,
    }
    if name == "sme_sgd":
        ensemble = sme_sgd(problem, eta, updates, paths, seed, native=True, **options)
    elif name == "sme_asgd":
        ensemble = sme_asgd(problem, eta, setting.mu, updates, paths, seed, **options)
    elif name == "replay":
        staleness = setting.staleness
        options |= {"updates": updates, "rule": setting.rule}
        ensemble = sme_replay(problem, eta, staleness, paths, seed, **options)
    else:
        closure = setting.closure if name == "sme_law" else name.removeprefix("law_")
        workers = setting.workers if closure == "pool" else None
        turns = setting.turns if name == "sme_law" else None
        options |= {"closure": closure, "workers": workers, "turns": turns}
        ensemble = sme_law(problem, eta, setting.law, updates, paths, seed, **options)
    return LossCurve.of_ensemble(ensemble)


def _fast(
    name: str, setting: Setting, seed: int, progress: Callable[[int, int], None] | None
) -> LossCurve:
    """Return the curve of one model from its mean path and linear noise."""
    if name == "replay":
        raise InputError("method: 'fast' has no replay; accepted: 'auto', 'simulate'")
    if not setting.steady:
        raise InputError("method: 'fast' takes no schedules; accepted: 'auto', 'simulate'")
    mu = {"sme_sgd": 0.0, "sme_asgd": setting.mu}.get(name)
    curve = linear_noise(
        setting.problem,
        float(setting.learning_rate),
        setting.law if mu is None else Geometric(mu),
        seed,
        batch_size=int(setting.batch_size),
        initial=setting.initial,
        record=setting.record,
        dtype=setting.dtype,
        progress=progress,
    )
    if curve.unstable_from is not None:
        raise UnreliableEstimateError(
            f"method 'fast', {MODELS[name]}: unstable, noise outgrows its linear theory by update "
            f"{curve.unstable_from}; accepted here: 'auto', 'simulate'",
            curve,
        )
    return curve


def quantile_column(level: float) -> str:
    """Return the name of the column of `Prediction.curves` that holds a quantile."""
    return f"q{level:.3f}"


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
        curves = pd.read_parquet(directory / "prediction.parquet")
        settings = json.loads((directory / "prediction.json").read_text(encoding="utf-8"))
        if set(curves["model"]) != set(settings["models"]):
            raise ValueError("its two files are not of one prediction")
        if "loss_mean_error" not in curves:  # stored by an earlier version
            paths = {name: model["paths"] or np.inf for name, model in settings["models"].items()}
            curves["loss_mean_error"] = curves["loss_std"] / np.sqrt(curves["model"].map(paths))
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{directory}: no readable prediction ({reason}); `asgd predict`"
        ) from None
    return Prediction(curves, settings)


def _named(
    progress: Callable[[str, float], None] | None, name: str
) -> Callable[[int, int], None] | None:
    return progress and (lambda done, total: progress(name, done / total))


def _frame(name: str, curve: LossCurve) -> pd.DataFrame:
    columns = {
        "model": name,
        "update": curve.update,
        "loss_mean": curve.mean,
        "loss_std": curve.std,
        "loss_mean_error": curve.mean_error,
    }
    quantiles = {
        quantile_column(level): curve.quantiles[:, i] for i, level in enumerate(QUANTILE_LEVELS)
    }
    return pd.DataFrame({**columns, **quantiles})
