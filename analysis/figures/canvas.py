"""Axes in the style of the project, and their conversion to SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.prediction.model import MODELS

INK = "#1b1b1f"
OBSERVED = INK
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
PINK, SKY, AMBER, GREY = "#cc79a7", "#56b4e9", "#e69f00", "#999999"
BAR = "#bbbbbb"  # histogram bars
BAND = 0.18  # opacity of a band
SERIES = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, GREY)
# A colour and a dash for each model; models after the seventh get new pairs of them.
_COLOURS = (GREEN, ORANGE, BLUE, PINK, SKY, AMBER, GREY)
_STROKES: tuple[Any, ...] = (
    (0, (1, 1.5)),
    (0, (5, 2)),
    "-",
    (0, (7, 1.5, 1, 1.5)),
    (0, (9, 2)),
    (0, (3, 1.5)),
    (0, (4, 1.5, 1, 1.5, 1, 1.5)),
)
_LOOKS = [
    look
    for shift in range(len(_STROKES))
    for look in zip(_COLOURS, _STROKES[shift:] + _STROKES[:shift], strict=True)
]
STYLE: Mapping[str, tuple[str, Any]] = dict(zip(MODELS, _LOOKS, strict=False))
DASHES = ("-", (0, (5, 2)), (0, (7, 1.5, 1, 1.5)), (0, (1, 1.2)))
EVENT_COLOURS = (ORANGE, GREEN, PINK, SKY, AMBER)
LONGEST_CURVE = 2000
_LETTER, _HANDLE = 0.07, 0.42  # width in inches of a letter and a handle of a legend
_SCALE = 0.6  # inches beside the plot that the legend cannot use
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def new_axes(width: float = 4.6, height: float = 2.9) -> Axes:
    """Return the Axes of a new figure, sizes in inches."""
    look = matplotlib.rc_context(
        {
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
    with look:
        axes: Axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
    return axes


def plot_box(ax: Axes) -> dict[str, Any]:
    """Return the position of the data area in the SVG of a figure, and its limits.

    Returns
    -------
    dict
        `box` (left, top, right, bottom) in SVG units, `x` and `y` limits, `log` (y axis).
    """
    figure = cast(Figure, ax.figure)
    width, height = 72 * figure.get_size_inches()
    place = ax.get_position()
    box = (place.x0 * width, (1 - place.y1) * height, place.x1 * width, (1 - place.y0) * height)
    return {
        "box": [round(float(side), 2) for side in box],
        "x": [float(limit) for limit in ax.get_xlim()],
        "y": [float(limit) for limit in ax.get_ylim()],
        "log": ax.get_yscale() == "log",
    }


def to_svg(ax: Axes, description: str, *, legend: bool = True, taller: bool = False) -> str:
    """Return the figure of `ax` as an SVG element that fits its container.

    Parameters
    ----------
    description
        Alternative text; also makes the ids of figures distinct.
    legend
        Whether to draw the legend.
    taller
        Whether the legend makes the figure taller instead of the plot smaller.
    """
    figure = cast(Figure, ax.figure)
    box, height = ax.get_legend(), figure.get_figheight()
    if box is not None:
        box.set_visible(legend)
        if taller and legend:
            figure.set_figheight(height + box.get_window_extent().height / figure.dpi)
    buffer = io.StringIO()
    with (
        matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": description}),
        _laid_out(figure),
    ):
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA, transparent=True)
    figure.set_figheight(height)
    svg = buffer.getvalue()
    label = html.escape(description)
    return svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


@contextmanager
def _laid_out(figure: Figure) -> Iterator[None]:
    """Lay the figure out before the block; `savefig` would draw it twice to do so."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine(None)
    try:
        yield
    finally:
        figure.set_layout_engine(engine)


def is_cut(ax: Axes) -> bool:
    """Return whether a curve leaves the plot at the top or bottom."""
    low, high = ax.get_ylim()
    for line in ax.get_lines():
        values = np.asarray(line.get_ydata(), dtype=float)
        shown = values[np.isfinite(values)]
        if len(shown) and (shown.min() < low or shown.max() > high):
            return True
    return False


def cycle(length: int, colours: Sequence[str] = SERIES) -> list[str]:
    """Return `length` colours, repeated if there are too few."""
    return [colours[i % len(colours)] for i in range(length)]


def thin(table: pd.DataFrame) -> pd.DataFrame:
    """Return every n-th row, at most `LONGEST_CURVE` rows."""
    step = -(-len(table) // LONGEST_CURVE)
    return table.iloc[:: max(step, 1)]


def key(
    ax: Axes,
    columns: int = 1,
    place: Literal["best", "upper left", "upper right", "lower right", "above"] = "best",
    first: str = "",
) -> None:
    """Draw the legend, with the label `first` first, in as many columns as fit above the plot."""
    above = place == "above"
    handles, labels = ax.get_legend_handles_labels()
    if above and labels:
        width = cast(Figure, ax.figure).get_figwidth() - _SCALE
        sizes = [_LETTER * len(label) + _HANDLE for label in labels]
        if len(labels) > columns or sum(sizes) > width:
            columns = max(1, min(columns, int(width / max(sizes))))
            columns = -(-len(labels) // -(-len(labels) // columns))  # rows of equal length
    order = sorted(range(len(labels)), key=lambda i: labels[i] != first)
    ax.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        frameon=False,
        labelcolor=INK,
        loc="lower right" if place == "above" else place,
        bbox_to_anchor=(1.0, 1.0) if above else None,
        borderaxespad=0.2 if above else None,
        ncols=columns,
        columnspacing=1.0,
        handletextpad=0.5,
    )


def finish(ax: Axes) -> Axes:
    """Style the frame and the grid."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, lw=0.6)
    ax.set_axisbelow(True)
    return ax
