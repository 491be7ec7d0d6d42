"""Reads the events of a run, selects incidents and describes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asgd.errors import InputError
from asgd.printable import printable
from asgd.seals import is_sealed
from asgd.stored_json import parse_json, read_bounded

_ORDINARY = {"start", "problem", "metrics", "server_placed", "worker_placed", "finish"}
_TORN = (b"{", b"\0")  # first bytes of a partly written line
_NUMBERS = {"time", "seconds", "restart_seconds"}
_INTEGERS = {
    "worker",
    "update",
    "sequence",
    "epoch",
    "from_version",
    "to_version",
    "updates_lost",
    "updates_from_log",
    "before",
    "after",
}
_NEEDED = {
    "server_restored": ("to_version",),
    "workers_changed": ("after", "workers"),
    "worker_placed": ("worker", "host"),
}


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events in a file, in order; none if there is no file. Torn lines are skipped.

    Raises
    ------
    InputError
        A line is not an event.
    """
    try:
        lines = read_bounded(path).splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason})") from None
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = parse_json(line)
            is_sealed(line)
        except ValueError as error:
            if not line or _is_torn(line, error):
                continue
            raise InputError(f"{path}: line {number} is not an event ({error})") from None
        defect = _defect(event)
        if defect:
            raise InputError(f"{path}: line {number} is not an event ({defect})")
        event.pop("check", None)
        events.append(event)
    return events


def _is_torn(line: bytes, error: ValueError) -> bool:
    """Whether a line was written partly."""
    if isinstance(error, json.JSONDecodeError):
        ends_within = not line.endswith(b"}") or error.pos >= len(line)
    else:
        ends_within = isinstance(error, UnicodeDecodeError) and not line.endswith(b"}")
    return line.startswith(_TORN) and ends_within


def _defect(event: Any) -> str | None:
    """Return the first fault in the fields of an event that this project reads, or None."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return "expected an object that names its event"
    for name in _NEEDED.get(event["event"], ()):
        if name not in event:
            return f"{name} is missing"
    for name, value in event.items():
        if name in _INTEGERS and type(value) is not int:
            return f"{name} = {value!r:.40}: expected an integer"
        if value is None and name == "restart_seconds":  # the worker is given up
            continue
        if name in _NUMBERS and (type(value) not in (int, float) or not np.isfinite(value)):
            return f"{name} = {value!r:.40}: expected a number"
    if event["event"] == "workers_changed":
        workers = event["workers"]
        if not isinstance(workers, list) or any(type(w) is not int or w < 0 for w in workers):
            return "workers: expected a list of their numbers"
    sequences = event.get("sequences", {})
    if not isinstance(sequences, dict) or not all(
        worker.isdecimal() and isinstance(sequence, int) for worker, sequence in sequences.items()
    ):
        return "sequences: expected a number for each worker"
    return None


def incidents(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events, in order, that do not occur in an undisturbed run.

    The second and later `worker_joined` of a worker count as incidents.
    """
    found, joined = [], set()
    for event in events:
        kind, worker = event.get("event"), event.get("worker")
        first = kind == "worker_joined" and worker not in joined
        if first:
            joined.add(worker)
        if not first and kind not in _ORDINARY:
            found.append(event)
    return found


def team_sizes(
    events: Iterable[dict[str, Any]], workers: int, updates: int
) -> npt.NDArray[np.int64]:
    """Return the number of workers at each update, shape (updates,); see `team_changes`."""
    starts, sizes = team_changes(events, workers)
    found: npt.NDArray[np.int64] = sizes[np.searchsorted(starts, np.arange(updates), "right") - 1]
    return found


def team_changes(
    events: Iterable[dict[str, Any]], workers: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the updates at which the number of workers changed, and the new numbers.

    Parameters
    ----------
    events
        Events of the run. `worker_joined`, `worker_removed` and `worker_lost` count if they contain
        the update and are not void because of a later `server_restored`.
    workers
        Configured number of workers, all present at update 0, where the first entry is.
    """
    present = set(range(workers))
    changes = [(0, workers)]
    # The launcher writes its events at once, the recorder later.
    for event in sorted(events, key=lambda event: float(event.get("time", 0.0))):
        kind, update = event.get("event"), event.get("update")
        if kind == "server_restored":
            cut = int(event["to_version"])
            changes = [*(change for change in changes if change[0] < cut), (cut, len(present))]
        elif kind in ("worker_joined", "worker_removed", "worker_lost") and update is not None:
            change = present.add if kind == "worker_joined" else present.discard
            change(int(event["worker"]))
            changes.append((max(int(update), changes[-1][0]), len(present)))
    starts = np.array([start for start, _ in changes])
    sizes = np.array([size for _, size in changes])
    return starts, sizes


def in_words(event: dict[str, Any]) -> str:
    """Describe an event in one line of printable text."""
    known = {
        key: value
        for key, value in event.items()
        if key not in ("event", "time", "sequences", "sha256")
    }
    details = ", ".join(f"{key} {value}" for key, value in known.items())
    kind = str(event.get("event")).replace("_", " ")
    return printable(f"{kind}{': ' if details else ''}{details}")
