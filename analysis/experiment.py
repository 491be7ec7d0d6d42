"""Repeats of one run taken together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from analysis import dependence
from analysis.fit import StalenessFit, fit_run, fit_staleness
from asgd.errors import InputError
from asgd.events import team_sizes
from asgd.staleness import staleness_of
from asgd.trace import Run


def as_runs(run: Run | Sequence[Run]) -> list[Run]:
    """Return one run, or repeats of one, as a list.

    Raises
    ------
    InputError
        There is none, or two differ in more than the seed.
    """
    runs = [run] if isinstance(run, Run) else list(run)
    if not runs:
        raise InputError("runs: none; expected at least one")
    seedless = [_seedless(one) for one in runs]
    for one, settings in zip(runs, seedless, strict=True):
        if settings != seedless[0]:
            raise InputError(
                f"{one.path}: no repeat of {runs[0].path}: they differ beyond the seed"
            )
    return runs


def fit_runs(runs: Sequence[Run]) -> StalenessFit:
    """Fit the staleness of repeats as one series, the start-up of each left out.

    Raises
    ------
    InputError
        A run recorded no update.
    UnreliableEstimateError
        See `fit_staleness`.
    """
    if len(runs) == 1:
        return fit_run(runs[0])
    values, workers, teams, start_up = [], [], [], 0
    for run in runs:
        if run.trace.empty:
            raise InputError(f"{run.path}: recorded no update to fit")
        update, read = (run.trace[name].to_numpy() for name in ("update", "read_version"))
        staleness = staleness_of(update, read)
        start = dependence.start_up(staleness)
        values.append(staleness[start:])
        workers.append(run.trace["worker"].to_numpy()[start:])
        teams.append(team_sizes(run.events, run.config.cluster.workers, len(update))[start:])
        start_up += start
    config = runs[0].config
    fit = fit_staleness(
        np.concatenate(values),
        workers=np.concatenate(teams),
        worker_ids=np.concatenate(workers),
        start_up=0,
        seed=config.run.seed,
    )
    return replace(fit, start_up=start_up)


def _seedless(run: Run) -> object:
    settings = msgspec.structs.replace(run.config.run, seed=0)
    return msgspec.structs.replace(run.config, run=settings)
