"""Draws tables with matplotlib. Computes nothing.

    fig, (left, right) = plt.subplots(1, 2)
    figures.loss_overlay([run.loss], prediction.curves, left)
    figures.staleness_histogram(*fit.histogram(), right)

Every function draws into the given Axes, or into new ones, and returns them for restyling. New Axes
do not belong to pyplot; write their figure with `ax.figure.savefig`. The colours are Okabe and
Ito's, distinguishable under the common colour-vision deficiencies; models also differ in line
style.
"""

from matplotlib.axes import Axes

from analysis.figures.activity import (
    band_over_time,
    by_worker,
    contributions,
    speed_by_workers,
    target_by_workers,
    throughput,
)
from analysis.figures.canvas import STYLE, is_cut, new_axes, plot_box, to_svg
from analysis.figures.loss import (
    error_by_workers,
    error_over_time,
    loss_over_time,
    loss_overlay,
    metric_over_updates,
)
from analysis.figures.records import limit_by_cap, loss_over_updates, staleness_over_updates
from analysis.figures.staleness import (
    mu_by_workers,
    staleness_by_workers,
    staleness_histogram,
    staleness_rootogram,
)

__all__ = [
    "STYLE",
    "Axes",
    "band_over_time",
    "by_worker",
    "contributions",
    "error_by_workers",
    "error_over_time",
    "is_cut",
    "limit_by_cap",
    "loss_over_time",
    "loss_over_updates",
    "loss_overlay",
    "metric_over_updates",
    "mu_by_workers",
    "new_axes",
    "plot_box",
    "speed_by_workers",
    "staleness_by_workers",
    "staleness_histogram",
    "staleness_over_updates",
    "staleness_rootogram",
    "target_by_workers",
    "throughput",
    "to_svg",
]
