"""The figures of a report, each with its data, its caption and a text for who cannot see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import figures
from analysis.comparison import Comparison
from analysis.fit import StalenessFit
from analysis.model import LABELS
from analysis.prediction import Prediction
from analysis.score import Score
from asgd.files import replace_file
from asgd.trace import Run

# Points of a curve that the page shows values of.
_HOVER = 400
_HANGING = (
    " A bar that stays above zero marks a staleness seen less often than the law says, one that "
    "reaches below it one seen more often. The strip is what independent scatter would do."
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_NO_CURVES = pd.DataFrame(columns=["model", "update", "loss_mean"])


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes
    ----------
    id
        Name of the figure, unique in its report: the id in the page and the name of its files.
    svg
        For the page, without a legend where the page has one.
    file
        For a file of its own.
    caption
        What is shown, in a sentence.
    data
        What was drawn.
    values
        What the page shows under the pointer, as JSON values; None without.
    """

    id: str
    svg: str
    file: str
    caption: str
    data: pd.DataFrame
    values: dict[str, Any] | None

    def save(self, directory: Path) -> None:
        """Write `<id>.svg` and `<id>.csv`."""
        replace_file(directory / f"{self.id}.svg", self.file.encode())
        table = self.data.rename(columns=_defused).map(_defused)
        replace_file(directory / f"{self.id}.csv", table.to_csv(index=False).encode())


def _defused(cell: Any) -> Any:
    """Return what a spreadsheet takes for text where it would take a name for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def _picture(
    id: str,
    axes: figures.Axes,
    description: str,
    caption: str,
    data: pd.DataFrame,
    *,
    legend: bool = True,
    values: tuple[str, pd.DataFrame, dict[str, str]] | None = None,
) -> Picture:
    """Draw a figure.

    Parameters
    ----------
    values
        The columns to show under the pointer: name of x, a table whose first column is x, and the
        label of each further column.
    """
    description = f"{description} ({id})"
    file = figures.to_svg(axes, description)
    svg = file if legend else figures.to_svg(axes, description, legend=False)
    shown = None
    if values is not None:
        label, table, labels = values
        table = table.iloc[:: max(1, -(-len(table) // _HOVER))]
        shown = {
            "label": label,
            "plot": figures.plot_box(axes),
            "x": [_number(value) for value in table.iloc[:, 0]],
            "series": [
                {
                    "label": text,
                    "model": column if column in LABELS else None,
                    "y": [_number(value) for value in table[column]],
                }
                for column, text in labels.items()
            ],
        }
    return Picture(id, svg, file, caption, data, shown)


def overlay(prefix: str, runs: Sequence[Run], prediction: Prediction | None) -> Picture:
    """Observed loss of one run, or of repeats, over the predicted mean and band of each model."""
    losses = pd.concat([run.loss for run in runs])
    observed = losses.groupby("update", as_index=False)[["seconds", "loss"]].mean()
    if prediction is None:
        return _picture(
            f"{prefix}loss",
            figures.loss_overlay([run.loss for run in runs], _NO_CURVES),
            "Observed loss over updates",
            "Observed loss." if len(runs) == 1 else "Observed loss of each repeat.",
            observed,
            legend=False,
            values=("update", observed[["update", "loss"]], {"loss": "loss"}),
        )
    wide = _by_model(prediction.curves, "loss_mean").merge(observed, on="update", how="left")
    data = prediction.curves.merge(observed, on="update", how="left")
    name = "observed" if len(runs) == 1 else f"observed, mean of {len(runs)}"
    labels = {"loss": name} | {name: prediction.label(name) for name in prediction.models}
    paths = sorted({count for name in prediction.models if (count := prediction.paths(name))})
    number = f" over {paths[0]:,} paths" if len(paths) == 1 else ""
    return _picture(
        f"{prefix}loss",
        figures.loss_overlay(
            [run.loss for run in runs], prediction.curves, group=f"{prefix}loss", labels=labels
        ),
        f"Observed loss and the loss predicted by {len(prediction.models)} models over updates",
        f"Lines: observed loss, and each model's mean{number}. Bands: central 90 % of a single "
        "run, as each model predicts it.",
        data,
        legend=False,
        values=("update", wide, labels),
    )


def errors(prefix: str, score: Score) -> Picture:
    """Error of each model over updates."""
    table = score.errors
    wide = _by_model(table.assign(error=100 * table["error"]), "error")
    labels = {name: f"{score.labels[name]} (%)" for name in table["model"].unique()}
    drawn = figures.largest_error(table)
    cut = " Larger errors are cut off." if drawn < float(table["error"].abs().max()) else ""
    return _picture(
        f"{prefix}errors",
        figures.error_over_time(table, group=f"{prefix}errors", labels=score.labels),
        "Error of each model's predicted mean over updates",
        f"Predicted mean minus observed loss, in per cent of the mean observed loss.{cut}",
        table,
        legend=False,
        values=("update", wide, labels),
    )


def staleness(
    prefix: str,
    run: Run,
    fit: StalenessFit,
    timeline: pd.DataFrame,
    workers: pd.DataFrame,
    events: pd.DataFrame,
) -> list[Picture]:
    """Histogram with laws, rootograms, staleness over time and by worker."""
    counts, pmfs = fit.histogram()
    data = pd.DataFrame({"staleness": np.arange(len(counts)), "updates": counts, **pmfs})
    share = data.assign(updates=100 * counts / counts.sum())
    share[list(pmfs)] *= 100
    labels = {"updates": "measured (%)"} | {name: f"{name} (%)" for name in pmfs}
    pictures = [
        _picture(
            f"{prefix}staleness",
            figures.staleness_histogram(counts, pmfs),
            "Histogram of staleness with fitted laws",
            f"Share of updates at each staleness, and the fitted laws. {_schedule(run)}",
            data,
            values=("staleness", share, labels),
        )
    ]
    for number, (name, pmf) in enumerate(pmfs.items()):
        pictures.append(
            _picture(
                f"{prefix}rootogram-{number + 1}",
                figures.staleness_rootogram(counts, pmf, name, number=number),
                f"Hanging rootogram of staleness under the {name}",
                f"Measured counts hung from the {name}.{'' if number else _HANGING}",
                data[["staleness", "updates", name]],
            )
        )
    return [
        *pictures,
        _picture(
            f"{prefix}staleness-time",
            figures.band_over_time(timeline, "staleness", events),
            "Staleness over the time of the run",
            f"Staleness over time.{_marked(events)}",
            timeline[_columns(timeline, "seconds", "update", "staleness")],
            values=("second", timeline[["seconds", "staleness_mean"]], {"staleness_mean": "mean"}),
        ),
        _picture(
            f"{prefix}staleness-workers",
            figures.by_worker(workers, "staleness"),
            "Staleness of each worker's gradients",
            "Staleness by worker.",
            workers[_columns(workers, "worker", "staleness")],
        ),
    ]


def activity(
    prefix: str, timeline: pd.DataFrame, workers: pd.DataFrame, events: pd.DataFrame
) -> list[Picture]:
    """Throughput over time and compute time of each worker, events marked."""
    marked = _marked(events)
    drawn = timeline.assign(compute_mean=1000 * timeline["compute_mean"])
    return [
        _picture(
            f"{prefix}throughput",
            figures.throughput(timeline, events),
            "Updates per second over the time of the run",
            f"Throughput over time.{marked}",
            timeline[["seconds", "update", "updates_per_second"]],
            values=(
                "second",
                drawn[["seconds", "updates_per_second"]],
                {"updates_per_second": "updates/s"},
            ),
        ),
        _picture(
            f"{prefix}throughput-workers",
            figures.worker_throughput(workers),
            "Updates per second of each worker",
            "Throughput by worker.",
            workers[["worker", "updates", "share", "updates_per_second"]],
        ),
        _picture(
            f"{prefix}compute-time",
            figures.band_over_time(timeline, "compute", events),
            "Compute time of a gradient over the time of the run",
            f"Compute time of a gradient over time.{marked}",
            timeline[_columns(timeline, "seconds", "update", "compute")],
            values=("second", drawn[["seconds", "compute_mean"]], {"compute_mean": "mean (ms)"}),
        ),
        _picture(
            f"{prefix}compute-workers",
            figures.by_worker(workers, "compute"),
            "Compute time of each worker's gradients",
            "Compute time of a gradient by worker.",
            workers[_columns(workers, "worker", "compute")],
        ),
    ]


def comparison(names: Sequence[str], runs: Sequence[Run], compared: Comparison) -> list[Picture]:
    """Several runs: mu, loss over time, errors of the models."""
    losses = dict(zip(names, (run.loss for run in runs), strict=True))
    data = pd.concat([table.assign(run=name) for name, table in losses.items()])
    table = compared.table
    return [
        _picture(
            "runs-loss",
            figures.loss_over_time(losses, compared.target),
            "Observed loss of each run over time",
            "Observed loss over time; target: a loss that every run reached.",
            data,
        ),
        _picture(
            "runs-target",
            figures.target_by_workers(table),
            "Time of each run to the target loss against the number of workers",
            f"Time to the target loss, {compared.target:.3g}.",
            table[["run", "workers", "updates_to_target", "seconds_to_target"]],
        ),
        _picture(
            "runs-mu",
            figures.mu_by_workers(table),
            "Fitted geometric parameter of each run against the number of workers",
            "mu of the geometric fit against 1 - 1/P.",
            table[["run", "workers", "mu", "mu_low", "mu_high", "mu_expected"]],
        ),
        _picture(
            "runs-staleness",
            figures.staleness_by_workers(table),
            "Staleness of each run against the number of workers",
            "Staleness against P - 1, the mean of every server with one gradient per worker.",
            table[["run", "workers", "mean", "staleness_q05", "staleness_q95"]],
        ),
        *_errors_by_workers(compared),
        _picture(
            "runs-speed",
            figures.speed_by_workers(table),
            "Updates per second of each run against the number of workers",
            "Throughput against the number of workers; the line is proportional to it.",
            table[["run", "workers", "updates_per_second"]],
        ),
    ]


def _errors_by_workers(compared: Comparison) -> list[Picture]:
    table, models = compared.table, compared.models
    if not models:
        return []
    return [
        _picture(
            "runs-errors",
            figures.error_by_workers(table, models, labels=compared.labels),
            "Error of each model against the number of workers",
            "Mean error of each model's predicted loss.",
            table[["run", "workers", *models]],
        )
    ]


def _marked(events: pd.DataFrame) -> str:
    return " Dashed: events." if len(events) else ""


def _schedule(run: Run) -> str:
    if run.config.cluster.schedule == "uniform":
        return (
            "Scheduled order: the server drew each next worker uniformly and waited for it; "
            "this is not the order of natural arrival."
        )
    return "Natural order: the server applied gradients as they arrived."


def _by_model(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return one column per model over `update`."""
    wide = table.pivot(index="update", columns="model", values=column)
    return wide.reset_index().rename_axis(columns=None)


def _columns(table: pd.DataFrame, *beginnings: str) -> list[str]:
    return [column for column in table.columns if column.startswith(beginnings)]


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
