"""From runs to a fit, a prediction and a report, stored with the runs and with progress shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from analysis.advice import why_not_predicted
from analysis.experiment import fit_runs
from analysis.fit import StalenessFit
from analysis.prediction import Method, Prediction, predict
from analysis.score import Score, compare
from analysis.setting import whole
from asgd.errors import InputError, UnreliableEstimateError
from asgd.experiment import read_runs
from asgd.live import Bar
from asgd.trace import Run


def store_fit(path: Path, runs: Sequence[Run]) -> StalenessFit:
    """Fit the staleness of a run, or of its repeats, and store the fit in their directory."""
    fit = fit_runs(runs)
    with _stored():
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
    """Predict a run, or its repeats, score the prediction and store it in their directory.

    Repeats cut short of the furthest are neither predicted nor scored.
    """
    read_whole(runs)
    fit = store_fit(path, runs)
    with Bar("predict", 1, quiet) as bar:
        prediction = predict(
            runs, paths=paths, method=method, seed=seed, fit=fit, progress=bar.whole
        )
    score = compare(whole(runs), prediction)
    with _stored():
        prediction.save(path)
    return prediction, score


def read_whole(runs: Sequence[Run]) -> None:
    """Read all tables now: those of a run at work, read one by one, would not fit together.

    What is read later reaches further: the trace must cover every loss.
    """
    for run in runs:
        _ = run.loss, run.trace, run.members, run.events


@contextmanager
def _stored() -> Iterator[None]:
    """Say what to do about a run of somebody else's."""
    try:
        yield
    except PermissionError as error:
        raise InputError(
            f"{error.filename}: cannot be written ({error.strerror}): results are stored with "
            "their run; copy it to where you may write"
        ) from None


def store_report(
    directories: Sequence[Path],
    output: Path | None,
    figures: Path | None,
    paths: int,
    quiet: bool,
) -> Path:
    """Predict where no prediction of the run as it is now is stored, write the report.

    Returns the path of the report; where no prediction can be had, it says why.
    """
    from analysis.report import scored_prediction, write_report

    missing, read = {}, {}
    for directory in directories:
        runs = read[directory] = read_runs(directory)
        read_whole(runs)
        try:
            scored_prediction(directory, runs)
        except InputError:
            try:
                store_prediction(directory, runs, paths, quiet)
            except (InputError, UnreliableEstimateError) as error:
                missing[directory] = why_not_predicted(error, runs)
    return write_report(directories, output, figures, missing, read)
