"""The course of a record: staleness and loss in a bounded number of points."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.profile.dependence import step_means
from asgd.arrays import Integers
from asgd.counted import counted
from asgd.records.columns import ITEMS, STEPS
from asgd.records.reader import Record

_POINTS = 100
_HIGH = 0.9


def staleness_course(record: Record) -> pd.DataFrame:
    """Return the staleness in at most a hundred parts of a record.

    Columns: `update` (the first of the part), `mean`, `low` and `high`: the central 90 % of the
    items, or the smallest and largest of all where only means are known. `attrs["band"]` says
    which; it is "" where the log has neither.
    """
    if record.about.rows == STEPS:
        found = pd.DataFrame(record.columns(STEPS, "step", "mean", "min", "max"))
        grouped = found.groupby(_parts(found["step"].to_numpy()))
        table = pd.DataFrame(
            {
                "update": grouped["step"].first(),
                "mean": grouped["mean"].mean(),
                "low": grouped["min"].min(),
                "high": grouped["max"].max(),
            }
        )
        banded = bool(table[["low", "high"]].notna().all(axis=1).any())
        table.attrs["band"] = "smallest to largest" if banded else ""
        return table
    columns = record.columns(ITEMS, "update", "staleness")
    rows = []
    starts = np.flatnonzero(np.diff(_parts(columns["update"]), prepend=-1))
    for start, stale in zip(starts, np.split(columns["staleness"], starts[1:]), strict=True):
        low, high = np.quantile(stale, (0.05, 0.95))
        rows.append((int(columns["update"][start]), float(stale.mean()), low, high))
    table = pd.DataFrame(rows, columns=["update", "mean", "low", "high"])
    table.attrs["band"] = "central 90 %"
    return table


def loss_course(record: Record) -> pd.DataFrame:
    """Return the mean logged loss in at most a hundred parts, columns `update` and `loss`."""
    at = "step" if record.about.rows == STEPS else "update"
    found = record.columns(record.about.rows, at, "loss")
    known = np.isfinite(found["loss"])
    table = pd.DataFrame({"update": found[at][known], "loss": found["loss"][known]})
    grouped = table.groupby(_parts(table["update"].to_numpy()))
    return pd.DataFrame({"update": grouped["update"].first(), "loss": grouped["loss"].mean()})


def _parts(update: Integers) -> Integers:
    """Return the part of each row; the rows of one update are in the same."""
    number = np.cumsum(np.diff(update, prepend=update[:1]) != 0)
    updates = int(number[-1]) + 1 if len(number) else 1
    return number * min(_POINTS, updates) // updates


def spells_in_words(record: Record) -> str | None:
    """Return the longest spell of high staleness and its usual length; None without items.

    High is above the 90 % quantile of the means of the steps. In m independent steps, each high
    with probability p, the longest spell has about log(m (1 - p))/log(1/p) steps.
    """
    if record.about.rows == STEPS:
        return None
    found = record.columns(ITEMS, "update", "staleness")
    means, update = step_means(found["staleness"], found["update"]), np.unique(found["update"])
    limit = float(np.quantile(means, _HIGH))
    high = means > limit
    share = float(high.mean())
    if not share:
        return None
    ends = np.flatnonzero(np.diff(np.concatenate([[False], high, [False]]).astype(np.int8)))
    starts, lengths = ends[::2], np.diff(ends)[::2]
    longest = int(lengths.argmax())
    spell = counted(int(lengths[longest]), record.about.unit)
    usual = max(1.0, np.log(len(means) * (1.0 - share)) / np.log(1.0 / share))
    return (
        f"The longest spell of staleness above {limit:.4g} (the highest {100 * share:.0f} %) is "
        f"{spell} long, from {update[starts[longest]]:,} on; about "
        f"{usual:.0f} would be usual for independent steps."
    )
