"""Figures of staleness: its histogram and its laws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.figures.canvas import (
    BAR,
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PINK,
    finish,
    key,
    new_axes,
)
from asgd.arrays import Array

_MARKS = 40  # marked points of a law
_LAWS = ((ORANGE, "o-"), (BLUE, "s--"), (GREEN, "^:"))  # colour and mark of each law, in order


def staleness_histogram(
    counts: Sequence[int] | Array,
    laws: Mapping[str, Array],
    ax: Axes | None = None,
    *,
    rows: str = "updates",
    unit: str = "updates",
) -> Axes:
    """Draw the share of updates at each staleness against fitted laws.

    Parameters
    ----------
    counts
        Number of updates with staleness 0, 1, ..., shape (L,).
    laws
        The pmf of each law at 0, 1, ..., shape (L,), by its label.
    rows, unit
        Name of the counted items, and unit of the staleness.
    """
    ax = ax or new_axes()
    values = np.asarray(counts, dtype=float)
    l = np.arange(len(values))
    ax.bar(l, values / values.sum(), width=0.85, color=BAR, label="measured")
    for (label, pmf), (colour, mark) in zip(laws.items(), _LAWS, strict=False):
        ax.plot(l, pmf, mark, color=colour, ms=_mark_size(l), lw=1.5, label=label)
    ax.set(xlabel=rf"staleness $\tau$ ({unit})", ylabel=f"share of {rows}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    key(ax, columns=2, place="above", first="measured")
    return finish(ax)


def _mark_size(l: np.ndarray[Any, Any]) -> float:
    """Return the mark size, 0 if marks would overlap."""
    return 4.0 if len(l) <= _MARKS else 0.0


def staleness_rootogram(
    counts: Sequence[int] | Array,
    pmf: Array,
    label: str,
    ax: Axes | None = None,
    *,
    number: int = 0,
    rows: str = "updates",
    unit: str = "updates",
) -> Axes:
    """Draw a hanging rootogram: measured counts hang from a law, on a square-root scale.

    A bar that ends above zero is a staleness rarer than under the law, one that ends below zero a
    more frequent one.

    Parameters
    ----------
    counts
        Number of updates with staleness 0, 1, ..., shape (L,).
    pmf
        Pmf of the law at 0, 1, ..., shape (L,).
    label
        Name of the law.
    number
        Index 0, 1, ... of the law in the histogram; determines its colour and mark.
    rows, unit
        As for `staleness_histogram`.
    """
    ax = ax or new_axes()
    values = np.asarray(counts, dtype=float)
    l = np.arange(len(values))
    expected = np.sqrt(values.sum() * np.asarray(pmf))
    ax.bar(l, np.sqrt(values), bottom=expected - np.sqrt(values), width=0.85, color=BAR)
    colour, mark = _LAWS[number % len(_LAWS)]
    ax.plot(l, expected, mark, color=colour, ms=_mark_size(l), lw=1.5, label=label)
    # the square root of a Poisson count has standard deviation 1/2
    ax.axhspan(-1, 1, color=PINK, alpha=0.25, lw=0, label="two standard errors")
    ax.axhline(0, color=INK, lw=0.9)
    low, high = min(-1.0, float((expected - np.sqrt(values)).min())), float(expected.max())
    ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    ax.set(xlabel=rf"staleness $\tau$ ({unit})", ylabel=f"square root of {rows}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    key(ax, place="above")
    return finish(ax)


def staleness_by_workers(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw mean and central 90 % of the staleness of several runs against their workers.

    Parameters
    ----------
    table
        Columns `workers`, `mean`, `staleness_q05`, `staleness_q95`.
    """
    ax = ax or new_axes()
    workers = table["workers"]
    line = np.array([1.0, 1.05 * float(workers.max())])
    ax.plot(line, line - 1, color=ORANGE, ls=(0, (5, 2)), lw=1.5, label="$P - 1$")
    ends = table["staleness_q05"], table["staleness_q95"]
    ax.vlines(workers, *ends, color=BLUE, lw=6, alpha=0.3, label="central 90 %")
    ax.plot(workers, table["mean"], "o", color=BLUE, ms=5, label="mean")
    ax.set(xlabel="workers $P$", ylabel=r"staleness $\tau$ (updates)")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    key(ax, columns=3, place="above")
    return finish(ax)


def mu_by_workers(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the fitted geometric parameter of each run against 1 - 1/P.

    Parameters
    ----------
    table
        Columns `workers`, `mu`, `mu_low`, `mu_high` (the 95 % interval).
    """
    ax = ax or new_axes()
    workers = np.linspace(1, 1.05 * float(table["workers"].max()), 200)
    ax.plot(workers, 1 - 1 / workers, color=ORANGE, ls=(0, (5, 2)), lw=1.5, label="$1 - 1/P$")
    spread = np.stack([table["mu"] - table["mu_low"], table["mu_high"] - table["mu"]])
    ax.errorbar(
        table["workers"],
        table["mu"],
        yerr=np.maximum(spread, 0),
        fmt="o",
        color=BLUE,
        ms=5,
        capsize=3,
        label=r"fitted $\mu$, 95 % interval",
    )
    ax.set(xlabel="workers $P$", ylabel=r"$\mu$")
    ax.set_ylim(0, 1.03)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    key(ax, columns=2, place="above")
    return finish(ax)
