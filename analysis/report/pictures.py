"""The figures of a report, each with data, caption and alternative text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import figures
from analysis.prediction.model import LABELS
from analysis.prediction.predict import Prediction
from analysis.prediction.score import Score
from analysis.profile.fit import StalenessFit
from analysis.report.clock import AXIS, clock_of
from analysis.report.comparison import Comparison
from asgd.printable import printable
from asgd.rundir.files import replace_file
from asgd.rundir.reader import Run

# Points per curve with values shown under the pointer.
_HOVER = 400
_HANGING = (
    " The top of each bar is the count under the law, its length the measured count, both as "
    "square roots. A bar that ends above zero was measured less often than the law says, one that "
    "ends below zero more often. The strip is the range of independent scatter."
)
_MOST_METRICS = 6  # drawn
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_CUT = " Larger values are cut off."
_FALLEN = 0.95  # share of the fall of the loss at which the transient ends
_SHORT = 0.4  # share of a run below which the transient gets a figure of its own
_NO_CURVES = pd.DataFrame(columns=["model", "update", "loss_mean"])


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes
    ----------
    id
        Unique name in the report: id in the page and stem of the files.
    svg
        For the page, without legend if the page has one.
    file
        Standalone SVG.
    caption
        A sentence on the content.
    data
        The data drawn.
    values
        Values that the page shows under the pointer, as JSON; or None.
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
        table = self.data.rename(columns=_escaped).map(_escaped)
        replace_file(directory / f"{self.id}.csv", table.to_csv(index=False).encode())


def _escaped(cell: Any) -> Any:
    """Return text that a spreadsheet does not take for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def draw(
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
    file = figures.to_svg(axes, description, taller=not legend)
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


def overlay(
    prefix: str, runs: Sequence[Run], prediction: Prediction | None, until: int | None = None
) -> Picture:
    """Draw the observed loss of a run or its repeats, with mean and band of each model.

    Parameters
    ----------
    until
        Last update to show.
    """
    losses = pd.concat([run.loss for run in runs])
    observed = losses.groupby("update", as_index=False)[["seconds", "loss"]].mean()
    if prediction is None:
        return draw(
            f"{prefix}loss",
            figures.loss_overlay([run.loss for run in runs], _NO_CURVES),
            "Observed loss over updates",
            "Observed loss." if len(runs) == 1 else "Observed loss of each repeat.",
            observed,
            legend=False,
            values=("update", observed[["update", "loss"]], {"loss": "loss"}),
        )
    shown = prediction.curves
    if until is not None:
        shown, observed = (table[table["update"] <= until] for table in (shown, observed))
    wide = _by_model(shown, "loss_mean").merge(observed, on="update", how="left")
    data = shown.merge(observed, on="update", how="left")
    name = "observed" if len(runs) == 1 else f"observed, mean of {len(runs)}"
    labels = {"loss": name} | {name: prediction.label(name) for name in prediction.models}
    paths = sorted({count for name in prediction.models if (count := prediction.paths(name))})
    number = f" over {paths[0]:,} paths" if len(paths) == 1 else ""
    id = f"{prefix}loss" if until is None else f"{prefix}loss-start"
    axes = figures.loss_overlay(
        [run.loss for run in runs], shown, until=until, group=id, labels=labels
    )
    caption = (
        f"Lines: observed loss, and each model's mean{number}. Bands: central 90 % of a single "
        "run, as each model predicts it."
        if until is None
        else f"The first {until:,} updates, in which the loss falls."
    )
    return draw(
        id,
        axes,
        f"Observed loss and the loss predicted by {len(prediction.models)} models over updates",
        caption + (_CUT if figures.is_cut(axes) else ""),
        data,
        legend=False,
        values=("update", wide, labels),
    )


def metrics(prefix: str, runs: Sequence[Run]) -> list[Picture]:
    """Draw the first metrics of the problem, a picture each."""
    names = [str(name) for name in runs[0].metrics][:_MOST_METRICS]
    drawn = []
    for number, name in enumerate(names):
        tables = [run.metrics[[name]].dropna().reset_index() for run in runs if name in run.metrics]
        observed = pd.concat(tables).groupby("update", as_index=False).mean()
        last = float(observed[name].iloc[-1]) if len(observed) else math.nan
        text = f"{printable(name)} beside the loss; at the end {last:.4g}."
        picture = draw(
            f"{prefix}metric-{number}",
            figures.metric_over_updates(tables, name),
            f"{printable(name)} over updates",
            text if len(runs) == 1 else text.replace("at the end", "mean at the end"),
            observed,
            legend=False,
            values=("update", observed, {name: name}),
        )
        drawn.append(picture)
    return drawn


def transient(runs: Sequence[Run]) -> int | None:
    """Return twice the update at which the transient ends, or None if that is not early.

    The models differ in this transient, which needs an axis of its own.
    """
    observed = pd.concat([run.loss for run in runs]).groupby("update")["loss"].mean()
    lowest = float(observed.min())
    limit = lowest + (1.0 - _FALLEN) * (float(observed.iloc[0]) - lowest)
    until = 2 * int(observed.index[int(np.argmax(observed.to_numpy() <= limit))])
    seen = int((observed.index <= until).sum())
    return until if seen > 4 and until <= _SHORT * int(observed.index[-1]) else None


def errors(prefix: str, score: Score) -> Picture:
    """Draw the error of each model over updates."""
    table = score.errors
    wide = _by_model(table.assign(error=100 * table["error"]), "error")
    labels = {name: f"{score.labels[name]} (%)" for name in table["model"].unique()}
    axes = figures.error_over_time(table, group=f"{prefix}errors", labels=score.labels)
    cut = _CUT if figures.is_cut(axes) else ""
    return draw(
        f"{prefix}errors",
        axes,
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
    """Draw the histogram with its laws, rootograms, staleness over time and by worker."""
    counts, pmfs = fit.histogram()
    data = pd.DataFrame({"staleness": np.arange(len(counts)), "updates": counts, **pmfs})
    share = data.assign(updates=100 * counts / counts.sum())
    share[list(pmfs)] *= 100
    labels = {"updates": "measured (%)"} | {name: f"{name} (%)" for name in pmfs}
    pictures = [
        draw(
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
            draw(
                f"{prefix}rootogram-{number + 1}",
                figures.staleness_rootogram(counts, pmf, name, number=number),
                f"Hanging rootogram of staleness under the {name}",
                f"Measured counts hung from the {name}.{'' if number else _HANGING}",
                data[["staleness", "updates", name]],
            )
        )
    return [
        *pictures,
        draw(
            f"{prefix}staleness-time",
            figures.band_over_time(timeline, "staleness", events, clock=AXIS[clock_of(run)]),
            "Staleness over the time of the run",
            f"Staleness over time.{_marked(events)}",
            timeline[_columns(timeline, "seconds", "update", "staleness")],
            values=("second", timeline[["seconds", "staleness_mean"]], {"staleness_mean": "mean"}),
        ),
        draw(
            f"{prefix}staleness-workers",
            figures.by_worker(workers, "staleness"),
            "Staleness of each worker's gradients",
            "Staleness by worker.",
            workers[_columns(workers, "worker", "staleness")],
        ),
    ]


def activity(
    prefix: str, run: Run, timeline: pd.DataFrame, workers: pd.DataFrame, events: pd.DataFrame
) -> list[Picture]:
    """Draw throughput over time and compute time of each worker, with events."""
    marked, clock = _marked(events), AXIS[clock_of(run)]
    drawn = timeline.assign(compute_mean=1000 * timeline["compute_mean"])
    return [
        draw(
            f"{prefix}throughput",
            figures.throughput(timeline, events, clock=clock),
            "Updates per second over the time of the run",
            f"Throughput over time.{marked}",
            timeline[["seconds", "update", "updates_per_second"]],
            values=(
                "second",
                drawn[["seconds", "updates_per_second"]],
                {"updates_per_second": "updates/s"},
            ),
        ),
        draw(
            f"{prefix}contributions",
            figures.contributions(workers),
            "Gradients of each worker, applied and discarded"
            if "discarded" in workers
            else "Gradients of each worker that were applied",
            "Contribution of each worker.",
            workers[_columns(workers, "worker", "updates", "discarded", "share")],
        ),
        draw(
            f"{prefix}compute-time",
            figures.band_over_time(timeline, "compute", events, clock=clock),
            "Compute time of a gradient over the time of the run",
            f"Compute time of a gradient over time.{marked}",
            timeline[_columns(timeline, "seconds", "update", "compute")],
            values=("second", drawn[["seconds", "compute_mean"]], {"compute_mean": "mean (ms)"}),
        ),
        draw(
            f"{prefix}compute-workers",
            figures.by_worker(workers, "compute"),
            "Compute time of each worker's gradients",
            "Compute time of a gradient by worker.",
            workers[_columns(workers, "worker", "compute")],
        ),
    ]


def comparison(names: Sequence[str], runs: Sequence[Run], compared: Comparison) -> list[Picture]:
    """Draw loss, mu and model errors of several runs; also over time if they share a clock."""
    named = [f"{name} ({clock_of(run)})" for name, run in zip(names, runs, strict=True)]
    losses = dict(zip(named, (run.loss for run in runs), strict=True))
    data = pd.concat([table.assign(run=name) for name, table in losses.items()])
    table = compared.table
    if compared.clock == "mixed":
        over, unit = "updates", "updates"
        of_loss = figures.loss_over_time(losses, compared.target, column="update")
        of_target = figures.target_by_workers(table, column="updates_to_target", unit=unit)
    else:
        unit = AXIS[compared.clock]
        over = unit.removesuffix(" (s)")
        of_loss = figures.loss_over_time(losses, compared.target, clock=unit)
        of_target = figures.target_by_workers(table, unit=unit)
    return [
        draw(
            "runs-loss",
            of_loss,
            f"Observed loss of each run over {over}",
            f"Observed loss over {over}; target: a loss that every run reached.",
            data,
        ),
        draw(
            "runs-target",
            of_target,
            f"{unit} of each run to the target loss against the number of workers",
            f"{over.capitalize()} to the target loss, {compared.target:.3g}.",
            table[["run", "clock", "workers", "updates_to_target", "seconds_to_target"]],
        ),
        draw(
            "runs-mu",
            figures.mu_by_workers(table),
            "Fitted geometric parameter of each run against the number of workers",
            "mu of the geometric fit against 1 - 1/P; each staleness is mu times as likely as the "
            "one below it.",
            table[["run", "workers", "mu", "mu_low", "mu_high", "mu_expected"]],
        ),
        draw(
            "runs-staleness",
            figures.staleness_by_workers(table),
            "Staleness of each run against the number of workers",
            "Staleness against P - 1, the mean of every server with one gradient per worker.",
            table[["run", "workers", "mean", "staleness_q05", "staleness_q95"]],
        ),
        *_errors_by_workers(compared),
        *_speed_by_workers(compared),
    ]


def _speed_by_workers(compared: Comparison) -> list[Picture]:
    if compared.clock == "mixed":
        return []
    return [
        draw(
            "runs-speed",
            figures.speed_by_workers(compared.table),
            "Updates per second of each run against the number of workers",
            "Throughput against the number of workers; the line is proportional to it.",
            compared.table[["run", "workers", "updates_per_second"]],
        )
    ]


def _errors_by_workers(compared: Comparison) -> list[Picture]:
    table, models = compared.table, compared.models
    if not models:
        return []
    return [
        draw(
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
