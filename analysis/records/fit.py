"""Fits the staleness of a record."""

from __future__ import annotations

import numpy as np

from analysis.profile import dependence
from analysis.profile.fit import StalenessFit
from analysis.profile.fitting import fit_series
from analysis.profile.series import Nouns, Series
from asgd.arrays import Integers
from asgd.config.tables import MOST_WORKERS
from asgd.errors import InputError
from asgd.records.columns import ITEMS, UNKNOWN
from asgd.records.reader import Record

_SEED = 0


def fit_record(record: Record) -> StalenessFit:
    """Fit the staleness of the items of a record.

    The items of one update are one cluster: they share blocks, intervals and tests. The mean is
    compared with P - 1 only if every snapshot was used once.

    Raises
    ------
    InputError
        The record holds means, no items.
    UnreliableEstimateError
        See `analysis.fit_staleness`.
    """
    return fit_series(series_of(record), _SEED)


def series_of(record: Record) -> Series:
    """Return the staleness of the items of a record, without the start-up.

    Raises
    ------
    InputError
        The record holds no items.
    """
    unit = record.about.unit
    if record.about.rows != ITEMS:
        raise InputError(f"{record.path}: holds means per step; no law can be fitted from means")
    found = record.columns(ITEMS, "staleness", "update", "worker")
    staleness, update, worker = found["staleness"], found["update"], found["worker"]
    if not len(staleness):
        raise InputError(f"{record.path}: holds no item yet")
    shared = bool(np.any(np.diff(update) == 0))
    first = _start_up(staleness, update, shared)
    staleness, update, worker = staleness[first:], update[first:], worker[first:]
    known = len(record.about.workers) <= MOST_WORKERS and bool(np.any(worker != UNKNOWN))
    once = not shared and len(np.unique(update - staleness)) == len(update)
    team = len(np.unique(worker)) if known and once and bool(np.all(worker != UNKNOWN)) else None
    nouns = Nouns("items", unit, "use", "a longer record")
    return Series(
        staleness=staleness,
        worker=worker if known else None,
        team=team,
        start_up=first,
        step=update if shared else None,
        nouns=nouns,
    )


def _start_up(staleness: Integers, update: Integers, shared: bool) -> int:
    """Return the number of items of the start-up; whole steps, where items share them."""
    if not shared:
        return dependence.start_up(staleness, update)
    return dependence.start_up_of_steps(staleness, update)
