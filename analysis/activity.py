"""What the workers of a run did, when: tables of its trace and events."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import pandas as pd

from asgd.events import incidents
from asgd.trace import SHARED, Run

Array = npt.NDArray[np.float64]

_PARTS = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
_EVENT_COLUMNS = ("seconds", "event", "worker", "update", "incident", "details")
_OUTSIDE = {"event", "time", "worker", "update", "seconds"}


def timeline(run: Run, bins: int = 100) -> pd.DataFrame:
    """Cut a run into equal parts of its time.

    Returns
    -------
    DataFrame
        One row per part: `seconds` (its middle), `update` (the last one before its end),
        `updates_per_second`, and of staleness (in updates) and compute time (in seconds) the
        columns `staleness_mean`, `_q05`, `_q25`, `_q50`, `_q75`, `_q95`, `compute_mean`, ...; nan
        where nothing was applied.
    """
    trace = run.trace
    seconds = trace["applied_seconds"].to_numpy(dtype=float)
    bins = max(1, min(bins, len(trace) // 20))
    edges = np.linspace(0.0, max(float(seconds.max(initial=0.0)), 1e-9), bins + 1)
    part = np.clip(np.searchsorted(edges, seconds, "left") - 1, 0, bins - 1)
    count = np.bincount(part, minlength=bins)
    table = pd.DataFrame(
        {
            "seconds": (edges[1:] + edges[:-1]) / 2,
            "update": np.cumsum(count),
            "updates_per_second": count / np.diff(edges),
        }
    )
    return table.join(_summary(trace, pd.Series(part, name="part")))


def workers_table(run: Run) -> pd.DataFrame:
    """Return one row per worker: what it did, how stale, how fast.

    Columns: `worker`, `updates` (its gradients went into), `share` (of all gradients),
    `updates_per_second`, `transport` (how it joined last; "" in virtual time), and of staleness
    and compute time those of `timeline`.
    """
    trace = _gradients(run)
    seconds = max(float(run.trace["applied_seconds"].max()), 1e-9)
    updates = trace.groupby("worker").size()
    joined = [event for event in run.events if event.get("event") == "worker_joined"]
    transports = {event.get("worker"): str(event.get("transport", "")) for event in joined}
    table = pd.DataFrame(
        {
            "updates": updates,
            "share": updates / len(trace),
            "updates_per_second": updates / seconds,
            "transport": [transports.get(worker, "") for worker in updates.index],
        }
    )
    return table.join(_summary(trace, trace["worker"])).reset_index()


def _gradients(run: Run) -> pd.DataFrame:
    """Return one row per gradient: the trace, means of several workers' gradients taken apart."""
    trace, members = run.trace, run.members
    if members.empty:
        return trace
    members = members.assign(staleness=members["update"] - members["read_version"])
    columns = ["worker", "staleness", "compute_seconds"]
    own = trace[trace["worker"] != SHARED]
    return pd.concat([own[columns], members[columns]], ignore_index=True)


def _summary(trace: pd.DataFrame, group: pd.Series[int]) -> pd.DataFrame:
    columns = {}
    for name, column in (("staleness", "staleness"), ("compute", "compute_seconds")):
        grouped = trace[column].groupby(group.to_numpy())
        columns[f"{name}_mean"] = grouped.mean()
        quantiles = grouped.quantile(np.array(list(_PARTS.values()))).unstack()
        for (key, _), (_, values) in zip(_PARTS.items(), quantiles.items(), strict=True):
            columns[f"{name}_{key}"] = values
    return pd.DataFrame(columns)


def events_table(run: Run) -> pd.DataFrame:
    """Return one row per event.

    Columns: `seconds` since the start, `event`, `worker`, `update`, `incident` (out of the
    ordinary) and `details`.

    The server's clock starts with its first snapshot. An event that names an update happened when
    that was applied; any other is placed by the time of day, measured from such events, or else
    back from the end of the run, where it has one.
    """
    applied = run.trace["applied_seconds"].to_numpy(dtype=float)
    events = run.events
    start, last = _anchor(events, applied)
    rows, unusual = [], incidents(events)
    for event in events:
        update = event.get("update")
        if isinstance(event.get("seconds"), (int, float)):
            seconds = float(event["seconds"])
        elif isinstance(update, int) and len(applied):
            seconds = float(applied[min(max(update, 0), len(applied) - 1)])
        else:
            seconds = min(max(float(event.get("time", np.nan)) - start, 0.0), last)
        details = {key: value for key, value in event.items() if key not in _OUTSIDE}
        rows.append(
            {
                "seconds": seconds,
                "event": str(event.get("event", "")),
                "worker": event.get("worker"),
                "update": update,
                "incident": event in unusual,
                "details": ", ".join(f"{key} {_text(value)}" for key, value in details.items()),
            }
        )
    return pd.DataFrame(rows, columns=list(_EVENT_COLUMNS))


def _anchor(events: list[dict[str, object]], applied: Array) -> tuple[float, float]:
    """Return the time of day of second 0, and the last second of the run."""
    last = float(applied[-1]) if len(applied) else 0.0
    times = [float(str(e["time"])) for e in events if "time" in e]
    if not times:
        return 0.0, last
    ended = any(e.get("event") in ("finish", "interrupted", "failed") for e in events)
    # virtual time has nothing to do with the time of day
    if ended and times[-1] - times[0] >= last:
        # the run's clock starts with a snapshot, its last event comes some time after its end
        starts = [
            float(str(event["time"])) - float(applied[update])
            for event in events
            if "time" in event
            and isinstance(update := event.get("update"), int)
            and 0 < update < len(applied)
        ]
        if starts:
            return float(np.median(starts)), last
        return times[-1] - last, last
    return times[0], max(last, times[-1] - times[0])


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
