"""Loss curves: observed, predicted, and their difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator

from analysis.figures.canvas import (
    BAND,
    DASHES,
    INK,
    OBSERVED,
    STYLE,
    cycle,
    finish,
    key,
    new_axes,
    thin,
)
from analysis.model import LABELS
from analysis.prediction import quantile_column


def loss_overlay(
    observed: Sequence[pd.DataFrame],
    curves: pd.DataFrame,
    ax: Axes | None = None,
    *,
    group: str = "",
    labels: Mapping[str, str] = LABELS,
) -> Axes:
    """Draw observed loss over the predicted mean and central 90 % band of each model.

    Parameters
    ----------
    observed
        One table per run with columns `update` and `loss`.
    curves
        Columns `model`, `update`, `loss_mean` and the quantiles, as in `Prediction.curves`.
    group
        Prefix of the SVG ids of what belongs to a model: `<group>:<model>:<part>`.
    labels
        What to call each model.
    """
    ax = ax or new_axes(height=3.1)
    for model, curve in curves.groupby("model", sort=False):
        curve = thin(curve)
        colour, dash = STYLE[str(model)]
        low, high = curve[quantile_column(0.05)], curve[quantile_column(0.95)]
        ax.fill_between(
            curve["update"], low, high, color=colour, alpha=BAND, lw=0, gid=f"{group}:{model}:band"
        )
        ax.plot(
            curve["update"],
            curve["loss_mean"],
            color=colour,
            ls=dash,
            lw=2,
            label=labels[str(model)],
            gid=f"{group}:{model}:mean",
        )
    for number, table in enumerate(observed):
        table = thin(table)
        label = "observed" if number == 0 else None
        ax.plot(table["update"], table["loss"], color=OBSERVED, lw=1.1, label=label)
    _loss_scale(ax, pd.concat([table["loss"] for table in observed]))
    ax.set(xlabel="applied updates $k$", ylabel="loss")
    ax.margins(x=0.01)
    key(ax, first="observed")
    return finish(ax)


def error_over_time(
    errors: pd.DataFrame,
    ax: Axes | None = None,
    *,
    group: str = "",
    labels: Mapping[str, str] = LABELS,
) -> Axes:
    """Draw (predicted mean - observed) over the mean observed loss, for each model.

    Parameters
    ----------
    errors
        Columns `model`, `update` and `error`, as in `Score.errors`.
    group, labels
        As in `loss_overlay`.
    """
    ax = ax or new_axes(height=2.5)
    for model, table in errors.groupby("model", sort=False):
        table = thin(table)
        colour, dash = STYLE[str(model)]
        ax.plot(
            table["update"],
            100 * table["error"],
            color=colour,
            ls=dash,
            lw=1.6,
            label=labels[str(model)],
            gid=f"{group}:{model}:error",
        )
    ax.axhline(0, color=OBSERVED, lw=0.8)
    limit = max(5.0, 110 * float(largest_error(errors)))
    ax.set_ylim(-limit, limit)
    ax.set(xlabel="applied updates $k$", ylabel="predicted - observed\n(% of mean loss)")
    ax.margins(x=0.01)
    key(ax)
    return finish(ax)


def largest_error(errors: pd.DataFrame) -> float:
    """Return the largest error that is drawn: a model that runs away must not hide the others."""
    size = errors["error"].abs().replace(np.inf, np.nan)
    of_models = size.groupby(errors["model"]).max()
    return min(float(of_models.max()), 5.0 * float(of_models.min()))


def loss_over_time(
    tables: Mapping[str, pd.DataFrame], target: float | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the observed loss of several runs over seconds.

    Parameters
    ----------
    tables
        Label of each run and its columns `seconds` and `loss`.
    target
        A loss to mark.
    """
    ax = ax or new_axes()
    for number, ((label, table), colour) in enumerate(
        zip(tables.items(), cycle(len(tables)), strict=True)
    ):
        table, dash = thin(table), DASHES[number % len(DASHES)]
        ax.plot(table["seconds"], table["loss"], color=colour, ls=dash, lw=1.4, label=label)
    if target is not None:
        ax.axhline(target, color=INK, lw=0.9, ls=(0, (4, 3)), label=f"target {target:.3g}")
    _loss_scale(ax, pd.concat([table["loss"] for table in tables.values()]))
    ax.set(xlabel="time (s)", ylabel="loss")
    ax.margins(x=0.01)
    key(ax)
    return finish(ax)


def error_by_workers(
    table: pd.DataFrame,
    models: Sequence[str],
    ax: Axes | None = None,
    *,
    labels: Mapping[str, str] = LABELS,
) -> Axes:
    """Draw the relative error of each model against the number of workers.

    Parameters
    ----------
    table
        Columns `workers` and the models.
    labels
        As in `loss_overlay`.
    """
    ax = ax or new_axes()
    table = table.sort_values("workers")
    for model in models:
        colour, dash = STYLE[model]
        ax.plot(
            table["workers"],
            100 * table[model],
            marker="o",
            ms=4,
            color=colour,
            ls=dash,
            lw=1.5,
            label=labels[model],
        )
    ax.set(xlabel="workers $P$", ylabel="mean error (% of mean loss)")
    low, high = 100 * table[list(models)].min().min(), 100 * table[list(models)].max().max()
    if low > 0 and high > 20 * low:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_ylim(low / 1.5, high * 4)
    else:
        ax.set_ylim(0, 1.5 * high)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    key(ax)
    return finish(ax)


def _loss_scale(ax: Axes, losses: pd.Series[float]) -> None:
    """Choose a linear or a logarithmic axis; single dips of a noisy loss do not count."""
    losses = losses[np.isfinite(losses)]
    lowest, highest = float(losses.quantile(0.02)), float(losses.max())
    if lowest > 0 and highest / lowest > 5:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")  # exponents would be small type
        if highest / lowest < 1000:
            ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            ax.yaxis.set_minor_formatter("{x:g}")
        ax.set_ylim(lowest / 1.3, highest * 1.3)
    else:
        spread = (highest - lowest) or 1.0
        ax.set_ylim(lowest - 0.1 * spread, highest + 0.1 * spread)
