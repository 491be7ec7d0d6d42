"""The course of a record: staleness and loss in a bounded number of points."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.profile.dependence import step_means
from asgd.counted import counted
from asgd.records.columns import ITEMS, STEPS
from asgd.records.reader import Record

_POINTS = 100
_HIGH = 0.9


def staleness_course(record: Record) -> pd.DataFrame:
    """Return the staleness in at most a hundred parts of a record.

    Columns: `update` (the first of the part), `mean`, `low` and `high`: the central 90 % of the
    items, or the smallest and largest of all where only means are known. `attrs["band"]` says
    which.
    """
    if record.about.rows == STEPS:
        found = pd.DataFrame(record.columns(STEPS, "step", "mean", "min", "max"))
        grouped = found.groupby(_parts(len(found)))
        table = pd.DataFrame(
            {
                "update": grouped["step"].first(),
                "mean": grouped["mean"].mean(),
                "low": grouped["min"].min(),
                "high": grouped["max"].max(),
            }
        )
        table.attrs["band"] = "smallest to largest"
        return table
    columns = record.columns(ITEMS, "update", "staleness")
    rows = []
    for part in np.array_split(np.arange(len(columns["update"])), _POINTS):
        if len(part):
            stale = columns["staleness"][part[0] : part[-1] + 1]
            low, high = np.quantile(stale, (0.05, 0.95))
            rows.append((int(columns["update"][part[0]]), float(stale.mean()), low, high))
    table = pd.DataFrame(rows, columns=["update", "mean", "low", "high"])
    table.attrs["band"] = "central 90 %"
    return table


def loss_course(record: Record) -> pd.DataFrame:
    """Return the mean logged loss in at most a hundred parts, columns `update` and `loss`."""
    at = "step" if record.about.rows == STEPS else "update"
    found = record.columns(record.about.rows, at, "loss")
    known = np.isfinite(found["loss"])
    table = pd.DataFrame({"update": found[at][known], "loss": found["loss"][known]})
    grouped = table.groupby(_parts(len(table)))
    return pd.DataFrame({"update": grouped["update"].first(), "loss": grouped["loss"].mean()})


def _parts(rows: int) -> np.ndarray:
    return np.arange(rows) * min(_POINTS, max(rows, 1)) // max(rows, 1)


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
