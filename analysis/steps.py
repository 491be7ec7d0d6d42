"""From runs to a fit, a prediction and a report, stored with the runs and with progress shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis.advice import why_not_predicted
from analysis.experiment import fit_runs
from analysis.fit import StalenessFit
from analysis.prediction import DEFAULT_MODELS, Method, Prediction, has_prediction, predict
from analysis.score import Score, compare
from asgd.errors import InputError, UnreliableEstimateError
from asgd.experiment import read_runs
from asgd.live import Bar
from asgd.trace import Run


def store_fit(path: Path, runs: Sequence[Run]) -> StalenessFit:
    """Fit the staleness of a run, or of its repeats, and store the fit in their directory."""
    fit = fit_runs(runs)
    fit.save(path)
    return fit


def store_prediction(
    path: Path,
    runs: Sequence[Run],
    paths: int,
    quiet: bool,
    *,
    method: Method = "auto",
    seed: int | None = None,
) -> tuple[Prediction, Score]:
    """Predict a run, or its repeats, store the prediction in their directory and score it."""
    fit = store_fit(path, runs)
    with Bar("predict", len(DEFAULT_MODELS), quiet) as bar:
        prediction = predict(
            runs, paths=paths, method=method, seed=seed, fit=fit, progress=bar.part
        )
    prediction.save(path)
    return prediction, compare(runs, prediction)


def store_report(
    directories: Sequence[Path],
    output: Path | None,
    figures: Path | None,
    paths: int,
    quiet: bool,
) -> Path:
    """Predict where no prediction is stored and can be had, write the report, return its path."""
    from analysis.report import write_report

    missing = {}
    for directory in directories:
        runs = read_runs(directory)
        if not has_prediction(directory):
            try:
                store_prediction(directory, runs, paths, quiet)
            except (InputError, UnreliableEstimateError) as error:
                missing[directory] = why_not_predicted(error, runs)
    return write_report(directories, output, figures, missing)
