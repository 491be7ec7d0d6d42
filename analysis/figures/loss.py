"""Figures of loss curves: observed, predicted, and their difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

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
from analysis.prediction.model import LABELS
from analysis.prediction.predict import quantile_column

_WIDE = 20.0  # ratio of largest to typical error above which large errors get a logarithmic scale


def loss_overlay(
    observed: Sequence[pd.DataFrame],
    curves: pd.DataFrame,
    ax: Axes | None = None,
    *,
    until: int | None = None,
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
    until
        The last update to draw.
    group
        Prefix of the SVG ids of a model's parts: `<group>:<model>:<part>`.
    labels
        Label of each model.
    """
    ax = ax or new_axes(height=3.1)
    if until is not None:
        observed = [table[table["update"] <= until] for table in observed]
        curves = curves[curves["update"] <= until]
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
    _loss_scale(
        ax, pd.concat([table["loss"] for table in observed]), curves["loss_mean"].astype(float)
    )
    ax.set(xlabel="applied updates $k$", ylabel="loss")
    ax.margins(x=0.01)
    key(ax, columns=2, place="above", first="observed")
    return finish(ax)


def metric_over_updates(
    observed: Sequence[pd.DataFrame], name: str, ax: Axes | None = None
) -> Axes:
    """Draw a metric of the problem for each run.

    Parameters
    ----------
    observed
        One table per run with columns `update` and `name`.
    """
    ax = ax or new_axes(height=2.2)
    for table in observed:
        table = thin(table)
        ax.plot(table["update"], table[name], color=OBSERVED, lw=1.4)
    ax.set(xlabel="applied updates $k$", ylabel=name.replace("$", r"\$"))
    ax.margins(x=0.01)
    return finish(ax)


def error_over_time(
    errors: pd.DataFrame,
    ax: Axes | None = None,
    *,
    group: str = "",
    labels: Mapping[str, str] = LABELS,
) -> Axes:
    """Draw (predicted mean - observed) over the mean observed loss for each model.

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
    limit = 120 * float(_largest_error(errors)) or 1.0
    usual = 100 * float(errors["error"].abs().replace(np.inf, np.nan).median())
    if 0.0 < _WIDE * usual < limit:
        ax.set_yscale("symlog", linthresh=usual, linscale=1.0)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        # A power of ten inside the linear part would stand on the 0.
        powers = 10.0 ** np.arange(np.ceil(np.log10(usual)), np.log10(limit))
        ax.set_yticks([*-powers, 0.0, *powers])
    ax.set_ylim(-limit, limit)
    ax.set(xlabel="applied updates $k$", ylabel="predicted - observed\n(% of mean loss)")
    ax.margins(x=0.01)
    key(ax, columns=2, place="above")
    return finish(ax)


def _largest_error(errors: pd.DataFrame) -> float:
    """Return the largest error to show; a diverging model must not hide the others."""
    size = errors["error"].abs().replace(np.inf, np.nan)
    of_models = size.groupby(errors["model"]).max()
    return min(float(of_models.max()), 5.0 * float(of_models.min()))


def loss_over_time(
    tables: Mapping[str, pd.DataFrame],
    target: float | None = None,
    ax: Axes | None = None,
    *,
    column: Literal["seconds", "update"] = "seconds",
    clock: str = "time (s)",
) -> Axes:
    """Draw the observed loss of several runs over seconds, or over updates.

    Parameters
    ----------
    tables
        Columns `seconds`, `update` and `loss` of each run, by its label.
    target
        A loss to mark.
    column
        The horizontal axis.
    clock
        Label of the seconds.
    """
    ax = ax or new_axes(height=2.9 + 0.1 * len(tables))
    for number, ((label, table), colour) in enumerate(
        zip(tables.items(), cycle(len(tables)), strict=True)
    ):
        table, dash = thin(table), DASHES[number % len(DASHES)]
        ax.plot(table[column], table["loss"], color=colour, ls=dash, lw=1.4, label=label)
    if target is not None:
        ax.axhline(target, color=INK, lw=0.9, ls=(0, (4, 3)), label=f"target {target:.3g}")
    _loss_scale(ax, pd.concat([table["loss"] for table in tables.values()]))
    ax.set(xlabel=clock if column == "seconds" else "applied updates $k$", ylabel="loss")
    ax.margins(x=0.01)
    key(ax, columns=3, place="above")
    return finish(ax)


def error_by_workers(
    table: pd.DataFrame,
    models: Sequence[str],
    ax: Axes | None = None,
    *,
    labels: Mapping[str, str] = LABELS,
) -> Axes:
    """Draw the relative error of each model against the number of workers; none where infinite.

    Parameters
    ----------
    table
        Columns `workers` and one per model.
    labels
        As in `loss_overlay`.
    """
    ax = ax or new_axes(height=2.7 + 0.18 * len(models))
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
    errors = 100 * table[list(models)].to_numpy(dtype=float)
    finite = errors[np.isfinite(errors)]
    low, high = finite.min(initial=np.inf), finite.max(initial=0.0)
    if low > 0 and high > 20 * low:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_ylim(low / 1.5, high * 1.5)
    else:
        ax.set_ylim(0, 1.1 * high or 1.0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    key(ax, columns=2, place="above")
    return finish(ax)


def _loss_scale(
    ax: Axes, losses: pd.Series[float], predicted: pd.Series[float] | None = None
) -> None:
    """Choose a linear or logarithmic axis that holds all losses, and predicted ones within reason.

    Single dips of a noisy loss do not make it logarithmic. A diverging prediction must not hide the
    others.
    """
    losses = losses[np.isfinite(losses)]
    low, high = float(losses.min()), float(losses.max())
    usual = min(float(losses.quantile(0.02)), float(losses.iloc[0]))  # the start is no dip
    known = pd.Series(dtype=float) if predicted is None else predicted[np.isfinite(predicted)]
    if usual > 0 and high / usual > 5:
        if len(known):
            high = min(max(high, float(known.max())), 10 * high)
            low = min(low, max(float(known.min()), low / 10))
        low = max(low, usual / 100)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")  # exponents would be too small
        if high / low < 1000:
            ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            ax.yaxis.set_minor_formatter("{x:g}")
        ax.set_ylim(low / 1.3, high * 1.3)
    else:
        spread = (high - low) or 1.0
        if len(known):
            high = min(max(high, float(known.max())), high + 2 * spread)
            low = max(min(low, float(known.min())), low - 2 * spread)
        margin = 0.1 * ((high - low) or 1.0)
        ax.set_ylim(low - margin, high + margin)
