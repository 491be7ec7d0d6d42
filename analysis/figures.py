"""Tables in, matplotlib figures out. Computes nothing.

Every function draws into the Axes it is given, or a new one, and returns it. Colours are
Okabe and Ito's, distinguishable under the common colour-vision deficiencies; models also differ in
their line style.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib

matplotlib.use("agg", force=False)

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from analysis.predict import MODELS, quantile_column

Array = npt.NDArray[np.float64]

OBSERVED = "#000000"
STYLE: Mapping[str, tuple[str, Any]] = {
    "sme_law": ("#0072B2", "-"),
    "sme_asgd": ("#D55E00", (0, (5, 2))),
    "sme_sgd": ("#009E73", (0, (1, 1.5))),
    "replay": ("#CC79A7", (0, (7, 1.5, 1, 1.5))),
    "law_pool": ("#56B4E9", (0, (9, 2))),
    "law_iid": ("#E69F00", (0, (3, 1.5))),
    "law_sampling": ("#999999", (0, (4, 1.5, 1, 1.5, 1, 1.5))),
}
LONGEST_CURVE = 2000
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def new_axes(width: float = 7.2, height: float = 4.0) -> Axes:
    """Return the Axes of a new figure, sizes in inches."""
    axes: Axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
    return axes


def loss_overlay(
    observed: Sequence[pd.DataFrame], curves: pd.DataFrame, ax: Axes | None = None
) -> Axes:
    """Draw observed loss over the predicted mean and central 90 % band of each model.

    Parameters
    ----------
    observed
        One table per run with columns `update` and `loss`.
    curves
        Columns `model`, `update`, `loss_mean` and the quantiles, as in `Prediction.curves`.
    """
    ax = ax or new_axes()
    highest = max(float(table["loss"].max()) for table in observed)
    lowest = min(float(table["loss"].min()) for table in observed)
    for model, curve in curves.groupby("model", sort=False):
        curve = _thin(curve)
        colour, dash = STYLE[str(model)]
        low, high = curve[quantile_column(0.05)], curve[quantile_column(0.95)]
        ax.fill_between(curve["update"], low, high, color=colour, alpha=0.18, lw=0)
        ax.plot(
            curve["update"],
            curve["loss_mean"],
            color=colour,
            ls=dash,
            lw=2,
            label=MODELS[str(model)],
        )
    for number, table in enumerate(observed):
        table = _thin(table)
        label = "observed" if number == 0 else None
        ax.plot(table["update"], table["loss"], color=OBSERVED, lw=1.1, label=label)
    if lowest > 0 and highest / lowest > 5:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.set_ylim(lowest / 1.5, highest * 3)
    else:
        spread = highest - lowest
        ax.set_ylim(lowest - 0.1 * spread, highest + 0.5 * spread)
    ax.set(xlabel="applied updates $k$", ylabel="loss $f(x_k)$")
    ax.margins(x=0.01)
    ax.legend(frameon=False)
    return _finish(ax)


def error_over_time(errors: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw (predicted mean - observed) over the mean observed loss, for each model."""
    ax = ax or new_axes(height=3.0)
    for model, table in errors.groupby("model", sort=False):
        table = _thin(table)
        colour, dash = STYLE[str(model)]
        ax.plot(
            table["update"],
            100 * table["error"],
            color=colour,
            ls=dash,
            lw=1.6,
            label=MODELS[str(model)],
        )
    ax.axhline(0, color=OBSERVED, lw=0.8)
    limit = 100 * float(np.quantile(np.abs(errors["error"]), 0.98))
    ax.set_ylim(-1.2 * max(limit, 5), 1.2 * max(limit, 5))
    ax.set(xlabel="applied updates $k$", ylabel="predicted - observed\n(% of mean loss)")
    ax.margins(x=0.01)
    ax.legend(frameon=False)
    return _finish(ax)


def staleness_histogram(
    counts: Sequence[int] | Array, laws: Mapping[str, Array], ax: Axes | None = None
) -> Axes:
    """Draw the share of updates at each staleness against fitted laws.

    Parameters
    ----------
    counts
        Updates with staleness 0, 1, ..., shape (L,).
    laws
        Label of each law and its pmf at 0, 1, ..., shape (L,).
    """
    ax = ax or new_axes(height=3.2)
    values = np.asarray(counts, dtype=float)
    l = np.arange(len(values))
    ax.bar(l, values / values.sum(), width=0.85, color="#BBBBBB", label="measured")
    marks = (("#D55E00", "o-"), ("#0072B2", "s--"), ("#009E73", "^:"))
    for (label, pmf), (colour, mark) in zip(laws.items(), marks, strict=False):
        ax.plot(l, pmf, mark, color=colour, ms=4, lw=1.2, label=label)
    ax.set(xlabel=r"staleness $\tau$ (updates)", ylabel="share of updates")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False)
    return _finish(ax)


def to_svg(ax: Axes, description: str) -> str:
    """Return the figure of `ax` as an SVG element that fits its container.

    Parameters
    ----------
    description
        Text for readers who do not see the picture; must be safe to embed in an attribute.
    """
    figure = cast(Figure, ax.figure)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA, transparent=True)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(
        "<svg ", f'<svg role="img" aria-label="{description}" ', 1
    )


def save_png(ax: Axes, path: str) -> None:
    """Write the figure of `ax` as a PNG of 160 dots per inch."""
    figure = cast(Figure, ax.figure)
    figure.savefig(path, dpi=160)


def _thin(table: pd.DataFrame) -> pd.DataFrame:
    step = -(-len(table) // LONGEST_CURVE)
    return table.iloc[::step]


def _finish(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, lw=0.6)
    ax.set_axisbelow(True)
    return ax
