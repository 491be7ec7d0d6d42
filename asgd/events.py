"""What the events of a run say: which are out of the ordinary, and each in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from asgd.printable import printable

_ORDINARY = {"start", "metrics", "finish"}


def incidents(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events, in order, that an undisturbed run does not have.

    Every worker joins once; whoever joins again came back.
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
    """Return how many workers were there at each update, shape (updates,).

    Parameters
    ----------
    events
        Of the run: `worker_joined`, `worker_removed` and `worker_lost` count where they tell the
        update; what was cut off by `server_restored` does not.
    workers
        Of the configuration, all there at update 0.
    updates
        Updates applied.
    """
    present = set(range(workers))
    changes = [(0, workers)]
    # The launcher writes what it notes at once, the recorder some time later.
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
    found: npt.NDArray[np.int64] = sizes[np.searchsorted(starts, np.arange(updates), "right") - 1]
    return found


def in_words(event: dict[str, Any]) -> str:
    """Return an event as a line of printable text."""
    known = {
        key: value for key, value in event.items() if key not in ("event", "time", "sequences")
    }
    details = ", ".join(f"{key} {value}" for key, value in known.items())
    kind = str(event.get("event")).replace("_", " ")
    return printable(f"{kind}{': ' if details else ''}{details}")
