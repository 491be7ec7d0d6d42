"""Fits every staleness law to the updates of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.profile import dependence
from analysis.profile.counted import CountedSample
from analysis.profile.counted_series import CountedSeries
from analysis.profile.estimators import ESTIMATORS
from analysis.profile.fit import StalenessFit
from analysis.profile.law_fit import LawFit, Sample
from analysis.profile.series import Series
from analysis.profile.verdict import in_words
from asgd.arrays import Integers
from asgd.counted import counted
from asgd.errors import InputError, UnreliableEstimateError
from asgd.rundir.reader import Run
from asgd.rundir.repeats import as_run
from asgd.streams import Seed, as_seed

LEAST_UPDATES = 100
LEAST_CYCLES = 10  # updates per worker
LEAST_EFFECTIVE = 30.0  # independent updates


def fit_staleness(
    staleness: npt.ArrayLike,
    workers: int | Integers | None = None,
    worker_ids: npt.ArrayLike | None = None,
    *,
    update: npt.ArrayLike | None = None,
    start_up: int | None = None,
    seed: Seed = 0,
) -> StalenessFit:
    """Fit every staleness law to the updates of one run.

    >>> fit = analysis.fit_staleness(asgd.Geometric(0.75).rvs(2000, np.random.default_rng(0)))
    >>> 0.7 < fit.mu < 0.8
    True

    Parameters
    ----------
    staleness
        Staleness of each update, in order, shape (m,).
    workers
        Number of workers P, to check the series against 1/P and P - 1: a number, or one for each
        update, shape (m,), which is averaged. Default: the number of distinct `worker_ids`.
    worker_ids
        The worker of each update, shape (m,). With them the mixture has one component per worker,
        and stragglers are left out, see `analysis.profile.stragglers`.
    update
        Number of each update, ascending, shape (m,), for a series that has gaps or does not start
        with the run; default 0, 1, ...
    start_up
        Updates to drop at the start; default by `dependence.START_UP_RULE`.
    seed
        Seed of every resampling, or a generator that draws it.

    Raises
    ------
    InputError
        The values are not staleness, or the arguments do not match.
    UnreliableEstimateError
        After the start-up fewer than 100 updates, 10 per worker, or 30 effectively independent
        updates are left. The error carries the fit as `estimate`.
    """
    series = Series.of(staleness, workers, worker_ids, update, start_up)
    return fit_series(series, as_seed(seed))


def fit_run(run: Run | str | Path) -> StalenessFit:
    """Fit the staleness of a run or of a run directory.

    >>> fit = analysis.fit_run(run)
    >>> fit.laws["geometric"].law == asgd.Geometric(fit.mu)
    True

    Raises
    ------
    InputError
        There is no run, or it recorded no update.
    UnreliableEstimateError
        See `fit_staleness`.
    """
    run = as_run(run)
    if not run.keeps_rows:
        return fit_counts(run)
    return fit_series(Series.of_run(run), run.config.run.seed)


def fit_counts(run: Run) -> StalenessFit:
    """Fit the counts of a run; see `fit_run` and `analysis.profile.counted`."""
    series = CountedSeries.of_run(run)
    return _fit(series.sample, series.names, series, series.sample.cells)


def fit_series(series: Series, seed: int) -> StalenessFit:
    """Fit a prepared series; see `fit_staleness`."""
    values, names, numbers = series.staleness, None, None
    if series.worker is not None:
        names, numbers = np.unique(series.worker, return_inverse=True)
    if series.step is None:
        block = dependence.block_length(values)
    else:
        block = dependence.block_of_steps(values, dependence.step_means(values, series.step))
    sample = Sample(values, numbers, block, seed, series.step)
    return _fit(sample, names, series, sample.steps)


def _fit(
    sample: Sample | CountedSample,
    names: npt.NDArray[Any] | None,
    series: Series | CountedSeries,
    clusters: int | None,
) -> StalenessFit:
    """Fit every law to a sample; `clusters` is the number of steps or spans that it consists of."""
    laws, unfitted = {}, {}
    for name in ESTIMATORS:
        try:
            laws[name] = LawFit.of(name, sample)
        except InputError as error:
            unfitted[name] = str(error)
    team, start_up, nouns = series.team, series.start_up, series.nouns
    fit = StalenessFit(
        laws=laws,
        workers=team,
        start_up=start_up,
        sample=sample,
        worker_names=names,
        left_out=series.left_out,
        unfitted=unfitted,
        nouns=nouns,
    )
    least = max(LEAST_UPDATES, math.ceil(LEAST_CYCLES * (team or 0)))
    effective = fit.effective_size
    if clusters is not None:  # few steps hide how much they differ
        effective = min(effective, clusters)
    if sample.size < least or effective < LEAST_EFFECTIVE:
        raise UnreliableEstimateError(
            f"staleness fit: {counted(sample.size, nouns.rows)} after a start-up of {start_up}, "
            f"{effective:.0f} of them effectively independent; expected at least {least} and "
            f"{LEAST_EFFECTIVE:.0f}: {nouns.longer} has more",
            fit,
        )
    return fit


def compare_fits(fits: Sequence[tuple[str, StalenessFit]]) -> pd.DataFrame:
    """Return several runs side by side, one row per (label, fit).

    Columns: workers, updates, mean, mu with its 95 % interval mu_low, mu_high, mu_expected
    = 1 - 1/P, zeros, zeros_expected = 1/P, variance_ratio (to the geometric law), tv and pvalue
    (chi-square) of the geometric law, grade, law (to predict with) and verdict.
    """
    rows = []
    for label, fit in fits:
        low, high = fit.geometric.confidence_interval()["mu"]
        workers = fit.workers if fit.workers is not None else np.nan
        rows.append(
            {
                "run": label,
                "workers": workers,
                "updates": fit.sample.size,
                "mean": fit.geometric.law.mean(),
                "mu": fit.mu,
                "mu_low": low,
                "mu_high": high,
                "mu_expected": 1.0 - 1.0 / workers,
                "zeros": fit.shape.zeros,
                "zeros_expected": 1.0 / workers,
                "variance_ratio": fit.shape.variance_ratio,
                "tv": fit.geometric.tv,
                "pvalue": fit.chi_square.pvalue,
                "grade": fit.grade,
                "law": in_words(fit.recommended),
                "verdict": fit.verdict,
            }
        )
    return pd.DataFrame(rows).set_index("run")
