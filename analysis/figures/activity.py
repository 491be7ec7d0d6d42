"""Figures of worker activity: staleness, compute time and throughput over a run."""

from __future__ import annotations

from typing import Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.figures.canvas import (
    BAND,
    BAR,
    BLUE,
    EVENT_COLOURS,
    INK,
    ORANGE,
    cycle,
    finish,
    key,
    new_axes,
)

_LONGEST_LABEL = 20  # letters, so that two labels fit side by side

# Label of the axis, and the factor from the table's unit to its unit.
_SCALES = {"staleness": (r"staleness $\tau$ (updates)", 1.0), "compute": ("compute time (ms)", 1e3)}


def band_over_time(
    table: pd.DataFrame,
    quantity: Literal["staleness", "compute"],
    events: pd.DataFrame | None = None,
    ax: Axes | None = None,
    *,
    clock: str = "time (s)",
) -> Axes:
    """Draw mean and central 90 % of a quantity over the seconds of a run, with events.

    Parameters
    ----------
    table
        Columns `seconds`, `<quantity>_mean`, `<quantity>_q05`, `<quantity>_q95`, as from
        `analysis.timeline`.
    events
        Columns `seconds` and `event`, as from `analysis.events_table`.
    clock
        Label of the seconds.
    """
    ax = ax or new_axes(height=_height(events))
    label, scale = _SCALES[quantity]
    low, high, mean = (scale * table[f"{quantity}_{part}"] for part in ("q05", "q95", "mean"))
    ax.fill_between(table["seconds"], low, high, color=BLUE, alpha=BAND, lw=0, label="central 90 %")
    ax.plot(table["seconds"], mean, color=BLUE, lw=1.5, label="mean")
    ax.set(xlabel=clock, ylabel=label)
    ax.set_ylim(0, 1.1 * float(high.max()) or 1.0)
    _mark(ax, events)
    key(ax, columns=2, place="above")
    return finish(ax)


def throughput(
    table: pd.DataFrame,
    events: pd.DataFrame | None = None,
    ax: Axes | None = None,
    *,
    clock: str = "time (s)",
) -> Axes:
    """Draw updates per second over the seconds of a run, with events.

    Parameters
    ----------
    table
        Columns `seconds`, `updates_per_second`, as from `analysis.timeline`.
    events
        Columns `seconds` and `event`, as from `analysis.events_table`.
    clock
        Label of the seconds.
    """
    ax = ax or new_axes(height=_height(events))
    ax.step(
        table["seconds"],
        table["updates_per_second"],
        where="mid",
        color=BLUE,
        lw=1.4,
        label="all workers",
    )
    ax.set(xlabel=clock, ylabel="updates/s")
    ax.set_ylim(0, 1.1 * float(table["updates_per_second"].max()) or 1.0)
    _mark(ax, events)
    if events is not None and len(events):
        key(ax, columns=2, place="above")
    return finish(ax)


def by_worker(
    table: pd.DataFrame, quantity: Literal["staleness", "compute"], ax: Axes | None = None
) -> Axes:
    """Draw mean, middle half and central 90 % of a quantity for each worker.

    Parameters
    ----------
    table
        Columns `worker`, and `<quantity>_` followed by `mean`, `q05`, `q25`, `q50`, `q75`, `q95`,
        as from `analysis.workers_table`.
    """
    ax = ax or new_axes(height=2.5)
    worker = table["worker"]
    label, scale = _SCALES[quantity]
    parts = ("mean", "q05", "q25", "q50", "q75", "q95")
    q = {part: scale * table[f"{quantity}_{part}"] for part in parts}
    width = max(1.5, min(9.0, 120.0 / len(table)))
    ax.vlines(worker, q["q05"], q["q95"], color=BLUE, lw=1, label="central 90 %")
    ax.vlines(worker, q["q25"], q["q75"], color=BLUE, lw=width, alpha=0.5, label="middle half")
    ax.plot(worker, q["q50"], "_", color=INK, ms=width + 3, label="median")
    ax.plot(worker, q["mean"], "o", color=ORANGE, ms=3.5, label="mean")
    ax.set(xlabel="worker", ylabel=label)
    ax.set_ylim(0, 1.05 * float(q["q95"].max()) or 1.0)
    _worker_axis(ax, worker)
    key(ax, columns=4, place="above")
    return finish(ax)


def contributions(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the number of applied gradients of each worker, and of discarded ones above it.

    Parameters
    ----------
    table
        Columns `worker`, `updates` and, if there are any, `discarded`, as from
        `analysis.workers_table`.
    """
    ax = ax or new_axes(height=2.5)
    worker, applied = table["worker"], table["updates"]
    ax.bar(worker, applied, width=0.7, color=BAR, label="applied")
    ax.set(xlabel="worker", ylabel="gradients applied")
    if "discarded" in table:
        discarded = ax.bar(worker, table["discarded"], 0.7, applied, fill=False, label="discarded")
        for bar in discarded:
            bar.set(edgecolor=ORANGE, hatch="///", linewidth=0.8)
        ax.set_ylabel("gradients")
        key(ax, columns=2, place="above")
    _worker_axis(ax, table["worker"])
    return finish(ax)


def speed_by_workers(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw updates per second of several runs against their workers, with a proportional line.

    Parameters
    ----------
    table
        Columns `workers` and `updates_per_second`.
    """
    ax = ax or new_axes()
    table = table.sort_values("workers")
    workers = table["workers"].to_numpy(dtype=float)
    speed = table["updates_per_second"].to_numpy(dtype=float)
    line = speed[0] / workers[0] * workers
    ax.plot(workers, line, color=ORANGE, ls=(0, (5, 2)), lw=1.2, label="proportional")
    ax.plot(workers, speed, "o", color=BLUE, ms=5, label="measured")
    ax.set(xlabel="workers $P$", ylabel="updates/s")
    ax.set_xlim(left=0)
    ax.set_ylim(0, 1.25 * float(speed.max()))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    key(ax, columns=2, place="above")
    return finish(ax)


def target_by_workers(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    column: Literal["seconds_to_target", "updates_to_target"] = "seconds_to_target",
    unit: str = "time (s)",
) -> Axes:
    """Draw the time or updates of several runs to a common loss against their workers.

    Parameters
    ----------
    table
        Columns `clock` (real or simulated), `workers` and `column`.
    unit
        Label of the values.
    """
    ax = ax or new_axes()
    table = table.sort_values("workers")
    kinds = table["clock"].unique()
    for kind in kinds:
        of_kind = table[table["clock"] == kind]
        mark, face = ("o", BLUE) if kind == "real" else ("D", "none")
        ax.plot(
            of_kind["workers"], of_kind[column], mark, color=BLUE, mfc=face, ms=5, label=str(kind)
        )
    ax.set(xlabel="workers $P$", ylabel=f"{unit} to the target loss")
    ax.set_xlim(left=0)
    ax.set_ylim(0, 1.1 * float(table[column].max()) or 1.0)
    if len(kinds) > 1:
        key(ax, columns=2, place="above")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax)


def _worker_axis(ax: Axes, worker: pd.Series[int]) -> None:
    ax.set_xlim(float(worker.min()) - 0.6, float(worker.max()) + 0.6)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _height(events: pd.DataFrame | None) -> float:
    """Return the height in inches that fits the events into the legend."""
    return 2.5 + 0.1 * (0 if events is None else events["event"].nunique())


def _mark(ax: Axes, events: pd.DataFrame | None) -> None:
    """Draw a line at each event; many of one kind share a legend entry."""
    if events is None:
        return
    kinds = events.groupby("event", sort=False)
    for (kind, table), colour in zip(kinds, cycle(kinds.ngroups, EVENT_COLOURS), strict=True):
        top = float(ax.get_ylim()[1])
        seconds = table["seconds"].dropna()
        label = str(kind)[:_LONGEST_LABEL].replace("_", " ").replace("$", r"\$")
        ax.vlines(seconds, 0, top, color=colour, lw=1.1, ls=(0, (4, 2)), label=label)
