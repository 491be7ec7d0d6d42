"""Figures of records that other systems have logged."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from analysis.figures.canvas import BAND, BLUE, INK, finish, key, new_axes


def staleness_over_updates(
    table: pd.DataFrame, ax: Axes | None = None, *, unit: str = "updates"
) -> Axes:
    """Draw mean staleness over the updates of a record, with a band.

    Parameters
    ----------
    table
        Columns `update`, `mean`, and `low` and `high`, the ends of the band.
    unit
        What the staleness counts.
    """
    ax = ax or new_axes()
    band = table.dropna(subset=["low", "high"])
    label = str(table.attrs.get("band", ""))
    ax.fill_between(
        band["update"], band["low"], band["high"], color=BLUE, alpha=BAND, lw=0, label=label
    )
    ax.plot(table["update"], table["mean"], color=BLUE, lw=1.5, label="mean")
    ax.set(xlabel=unit, ylabel=rf"staleness $\tau$ ({unit})")
    highest = max(float(table["mean"].max()), float(band["high"].max() if len(band) else 0.0))
    ax.set_ylim(0, 1.1 * highest or 1.0)
    key(ax, columns=2, place="above")
    return finish(ax)


def loss_over_updates(
    table: pd.DataFrame, ax: Axes | None = None, *, unit: str = "updates"
) -> Axes:
    """Draw the loss of a record.

    Parameters
    ----------
    table
        Columns `update`, `loss`.
    unit
        What the updates are called.
    """
    ax = ax or new_axes()
    ax.plot(table["update"], table["loss"], color=INK, lw=1.2)
    ax.set(xlabel=unit, ylabel="loss")
    if float(table["loss"].min()) > 0.0:
        ax.set_yscale("log")
    return finish(ax)
