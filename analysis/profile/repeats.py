"""Repeats of a run, fitted as one series."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from analysis.profile.fit import StalenessFit
from analysis.profile.fitting import fit_run, fit_series
from analysis.profile.series import Series
from asgd.errors import InputError, NoRowsError
from asgd.rundir.reader import Run
from asgd.rundir.repeats import as_run, read_runs

Runs = Run | str | Path | Sequence[Run | str | Path]


def as_runs(run: Runs) -> list[Run]:
    """Return a run, or repeats, given as objects or as directories, as a list.

    Raises
    ------
    InputError
        There is no run, or two differ in more than the seed.
    """
    runs = _listed(run)
    seedless = [_seedless(one) for one in runs]
    for one, settings in zip(runs, seedless, strict=True):
        if settings != seedless[0]:
            raise InputError(
                f"{one.path}: no repeat of {runs[0].path}: they differ beyond the seed"
            )
    return runs


def fit_runs(runs: Runs) -> StalenessFit:
    """Fit the staleness of repeats as one series; drop the start-up of each.

    Raises
    ------
    InputError
        A run recorded no update, or there is none.
    UnreliableEstimateError
        See `fit_staleness`.
    """
    several = _listed(runs)
    if len(several) == 1:
        return fit_run(several[0])
    for run in several:
        if not run.keeps_rows:
            raise NoRowsError(run.path)
    series = [Series.of_run(run) for run in several]
    return fit_series(Series.joined(series), several[0].config.run.seed)


def _listed(run: Runs) -> list[Run]:
    if isinstance(run, Run):
        return [run]
    if isinstance(run, str | Path):
        return read_runs(run)
    if not isinstance(run, Sequence):
        raise InputError(f"run = {type(run).__name__}: expected a run, its directory, or several")
    if not run:
        raise InputError("runs = []: expected at least one")
    return [as_run(one) for one in run]


def _seedless(run: Run) -> object:
    settings = msgspec.structs.replace(run.config.run, seed=0)
    return msgspec.structs.replace(run.config, run=settings)
