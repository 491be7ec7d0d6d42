"""Figures draw the given data into the given Axes."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from analysis import figures
from analysis.prediction.model import LABELS, MODELS


def test_every_model_has_a_style_of_its_own() -> None:
    assert figures.STYLE.keys() >= MODELS.keys()
    assert len(set(figures.STYLE.values())) == len(figures.STYLE)


def test_histogram_shows_shares() -> None:
    ax = figures.staleness_histogram([3, 1], {"law": np.array([0.5, 0.5])})
    assert [bar.get_height() for bar in ax.patches] == [0.75, 0.25]
    assert ax.lines[0].get_ydata().tolist() == [0.5, 0.5]


def test_rootogram_hangs_from_the_law() -> None:
    ax = figures.staleness_rootogram([9, 16], np.array([16 / 25, 9 / 25]), "law")
    tops = [bar.get_y() + bar.get_height() for bar in ax.patches[:2]]
    bottoms = [bar.get_y() for bar in ax.patches[:2]]
    assert tops == pytest.approx([4, 3])
    assert bottoms == pytest.approx([1, -1])


def test_figures_draw_into_given_axes() -> None:
    ax = figures.new_axes()
    table = pd.DataFrame({"seconds": [0.0, 1.0], "updates_per_second": [2.0, 3.0]})
    events = pd.DataFrame({"seconds": [0.5], "event": ["worker_lost"]})
    assert figures.throughput(table, events, ax) is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "all workers",
        "worker lost",
    ]


def test_with_large_errors_no_tick_overlaps_the_zero() -> None:
    error = np.concatenate([np.linspace(-0.7, 0.7, 50), [-30.0]])
    errors = pd.DataFrame({"model": "sme_law", "update": np.arange(51), "error": error})
    ax = figures.error_over_time(errors)
    assert ax.get_yscale() == "symlog"
    shown = [tick for tick in ax.get_yticks() if ax.get_ylim()[0] <= tick <= ax.get_ylim()[1]]
    assert shown == [-100, -1000, 0, 100, 1000]


def test_the_axis_shows_both_a_small_and_a_huge_loss() -> None:
    loss = pd.DataFrame({"update": [0, 10], "seconds": [0.0, 1.0], "loss": [0.5, 5e12]})
    none = pd.DataFrame(columns=["model", "update", "loss_mean"])
    low, high = figures.loss_overlay([loss], none).get_ylim()
    assert low < 0.5 < 5e12 < high


def test_svg_is_escaped_and_reproducible() -> None:
    def draw() -> str:
        ax = figures.staleness_histogram([1, 2, 3], {"law": np.full(3, 1 / 3)})
        return figures.to_svg(ax, '"<b> & more')

    assert draw() == draw()
    root = ElementTree.fromstring(draw())
    assert root.get("aria-label") == '"<b> & more'


def test_a_legend_may_make_the_figure_taller_instead_of_the_plot_smaller() -> None:
    loss = pd.DataFrame({"update": [0, 10], "loss": [2.0, 1.0]})
    rows = [(name, update, 2.0, 1.0, 3.0) for name in LABELS for update in (0, 10)]
    curves = pd.DataFrame(rows, columns=["model", "update", "loss_mean", "q0.050", "q0.950"])
    ax = figures.loss_overlay([loss], curves)

    def plot(**options: bool) -> tuple[float, float]:
        """Return the heights of plot and figure."""
        svg = ElementTree.fromstring(figures.to_svg(ax, "loss", **options))
        height = float(svg.get("viewBox", "").split()[3])
        return ax.get_position().height * height, height

    bare, small, tall = plot(legend=False), plot(), plot(taller=True)
    assert small[1] == bare[1]
    assert small[0] < 0.6 * bare[0]
    assert tall[1] > bare[1]
    assert tall[0] == pytest.approx(bare[0], abs=10.0)
    assert plot(legend=False) == bare  # the figure has its height again


def test_plot_box_maps_values_to_the_svg() -> None:
    ax = figures.staleness_histogram([1, 2, 3], {"law": np.full(3, 1 / 3)})
    svg = figures.to_svg(ax, "histogram")
    width, height = (float(x) for x in ElementTree.fromstring(svg).get("viewBox", "").split()[2:])
    place = figures.plot_box(ax)
    left, top, right, bottom = place["box"]
    assert 0 < left < right < width
    assert 0 < top < bottom < height
    assert place["y"][0] == 0
    assert not place["log"]


@pytest.mark.parametrize("errors", [[0.02, np.inf], [np.inf, np.inf]])
def test_an_infinite_error_is_left_out(errors: list[float]) -> None:
    """A model whose paths diverge has one; it once broke the report on several runs."""
    table = pd.DataFrame({"workers": [4, 8], "sme_law": errors})
    ax = figures.error_by_workers(table, ["sme_law"])
    assert ax.get_ylim()[0] == 0
    assert 1 <= ax.get_ylim()[1] < 3
