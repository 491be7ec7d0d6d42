"""Figures of records that other systems have logged."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.figures.canvas import BAND, BLUE, GREEN, INK, ORANGE, finish, key, new_axes

_TICKS = 6  # of updates, whose numbers are long


def staleness_over_updates(
    table: pd.DataFrame, ax: Axes | None = None, *, unit: str = "updates", axis: str | None = None
) -> Axes:
    """Draw mean staleness over the updates of a record, with a band.

    Parameters
    ----------
    table
        Columns `update`, `mean`, and `low` and `high`, the ends of the band; `attrs["band"]` names
        it, "" if there is none.
    unit
        Unit of the staleness.
    axis
        Label of the updates; default `unit`.
    """
    ax = ax or new_axes()
    band = table.dropna(subset=["low", "high"])
    if label := str(table.attrs.get("band", "")):
        ax.fill_between(
            band["update"], band["low"], band["high"], color=BLUE, alpha=BAND, lw=0, label=label
        )
    ax.plot(table["update"], table["mean"], color=BLUE, lw=1.5, label="mean")
    ax.set(xlabel=axis or unit, ylabel=rf"staleness $\tau$ ({unit})")
    highest = max(float(table["mean"].max()), float(band["high"].max() if len(band) else 0.0))
    ax.set_ylim(0, 1.1 * highest or 1.0)
    ax.xaxis.set_major_locator(MaxNLocator(_TICKS, integer=True))
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
        Label of the updates.
    """
    ax = ax or new_axes()
    ax.plot(table["update"], table["loss"], color=INK, lw=1.2)
    ax.set(xlabel=unit, ylabel="loss")
    ax.xaxis.set_major_locator(MaxNLocator(_TICKS, integer=True))
    if float(table["loss"].min()) > 0.0:
        ax.set_yscale("log")
    return finish(ax)


def limit_by_cap(table: pd.DataFrame, ax: Axes | None = None, *, unit: str = "updates") -> Axes:
    """Draw the largest stable step under each cap, with the share of items beyond it.

    Parameters
    ----------
    table
        Columns `kind` ("now", "discard", "pace" or "samplers"), `cap`, `mean_square` (relative to
        that without staleness), `beyond`.
    unit
        Unit of the staleness.
    """
    ax = ax or new_axes(width=5.2, height=3.1)
    dropped = table[table["kind"] == "discard"]
    places = np.arange(len(dropped))
    for kind, label, colour, mark in (
        ("discard", "discard what is older", BLUE, "o-"),
        ("pace", "pace its start", GREEN, "s--"),
    ):
        of_kind = table[table["kind"] == kind]
        ax.plot(places, of_kind["mean_square"], mark, color=colour, ms=5, lw=1.5, label=label)
    now = float(table.loc[table["kind"] == "now", "mean_square"].iloc[0])
    ax.axhline(now, color=ORANGE, ls=(0, (5, 2)), lw=1.5, label="no cap")
    names = [
        f"{cap:.0f}\n{100 * beyond:.2g} %"
        for cap, beyond in zip(dropped["cap"], dropped["beyond"], strict=True)
    ]
    ax.set_xticks(places, names)
    ax.set(
        xlabel=f"cap ({unit}), and share of items beyond it",
        ylabel="largest stable step\n(1: no staleness)",
    )
    ax.set_ylim(0, 1.1 * max(now, float(table["mean_square"].max())))
    key(ax, columns=3, place="above")
    return finish(ax)
