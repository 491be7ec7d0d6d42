"""Tables of worker activity, from the trace and the events of a run."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from analysis.profile.work import work_by_worker
from asgd.arrays import Array
from asgd.rundir.columns import SHARED
from asgd.rundir.events import incidents
from asgd.rundir.reader import Run

_PARTS = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
_EVENT_COLUMNS = ("seconds", "event", "worker", "update", "incident", "details")
_OUTSIDE = {"event", "time", "worker", "update", "seconds", "sha256"}


def timeline(run: Run, bins: int = 100) -> pd.DataFrame:
    """Cut a run into parts of equal duration.

    Returns
    -------
    DataFrame
        One row per part: `seconds` (its middle), `update` (the last before its end),
        `updates_per_second`, and for staleness (in updates) and compute time (in seconds) the
        columns `staleness_mean`, `_q05`, `_q25`, `_q50`, `_q75`, `_q95`, `compute_mean`, ...; nan
        in parts without updates.
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
    """Return one row per worker: contributions, staleness, speed.

    Columns: `worker`, `updates` (that contain its gradients), `share` (of all applied gradients),
    `discarded` and `discarded_share` (its other gradients; only if there are any),
    `updates_per_second`, `transport` (at its last join; "" in virtual time), `host` (its last; only
    in a cluster of several), and the columns of staleness and compute time of `timeline`, NaN for a
    worker without an applied gradient.
    """
    trace = _gradients(run)
    seconds = max(float(run.trace["applied_seconds"].max()), 1e-9)
    updates = trace.groupby("worker").size()
    work = None if run.discarded.empty else work_by_worker(run).set_index("worker")
    if work is not None:
        delivered = work.index[work["applied"] + work["discarded"] > 0]
        updates = updates.reindex(delivered, fill_value=0)
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
    hosts = {e["worker"]: str(e["host"]) for e in run.events if e["event"] == "worker_placed"}
    if hosts:
        table["host"] = [hosts.get(worker, "") for worker in updates.index]
    if work is not None:
        table.insert(2, "discarded", work["discarded"])
        table.insert(3, "discarded_share", work["discarded_share"])
    return table.join(_summary(trace, trace["worker"])).reset_index()


def _gradients(run: Run) -> pd.DataFrame:
    """Return the trace with one row per gradient: means of several gradients are split."""
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

    Columns: `seconds` since the start, `event`, `worker`, `update`, `incident` (whether it is out
    of the ordinary) and `details`.

    The server's clock starts with its first snapshot and stops while there is no server. An event
    that names an update has the time of that update. Other events are placed by wall-clock time
    relative to the latest such event, else to the first, or, without any, to the end of the run.
    """
    applied = run.trace["applied_seconds"].to_numpy(dtype=float)
    events = run.events
    seconds_of, last = _clock(events, applied)
    rows, unusual = [], incidents(events)
    for event in events:
        update, at = event.get("update"), _update_of(event)
        if isinstance(event.get("seconds"), (int, float)):
            seconds = float(event["seconds"])
        elif at is not None and len(applied):
            seconds = float(applied[min(max(at, 0), len(applied) - 1)])
        else:
            seconds = min(max(seconds_of(float(event.get("time", np.nan))), 0.0), last)
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


def _update_of(event: dict[str, Any]) -> int | None:
    """Return the update that an event is about, or at which a server was restored."""
    update = event.get("update", event.get("to_version"))
    return update if isinstance(update, int) else None


def _clock(events: list[dict[str, Any]], applied: Array) -> tuple[Callable[[float], float], float]:
    """Return the map from wall-clock time to seconds of the run, and the run's last second."""
    last = float(applied[-1]) if len(applied) else 0.0
    times = [float(event["time"]) for event in events if "time" in event]
    if not times:
        return lambda time: time, last
    ended = any(event.get("event") in ("finish", "interrupted", "failed") for event in events)
    # virtual time is unrelated to wall-clock time
    if not ended or times[-1] - times[0] < last:
        return lambda time: time - times[0], max(last, times[-1] - times[0])
    known = sorted(
        (float(event["time"]), float(applied[update]))
        for event in events
        if "time" in event
        and (update := _update_of(event)) is not None
        and 0 < update < len(applied)
    )
    if not known:  # the last event comes some time after the end
        return lambda time: time - times[-1] + last, last

    def seconds(time: float) -> float:
        number = bisect_right(known, (time, np.inf))
        moment, second = known[max(number - 1, 0)]
        following = known[number][1] if 0 < number < len(known) else last
        return min(second + time - moment, max(second, following))

    return seconds, last


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
