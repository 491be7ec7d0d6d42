"""What the events of a run say: which are out of the ordinary, and each in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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


def in_words(event: dict[str, Any]) -> str:
    """Return an event as a line of text."""
    known = {
        key: value for key, value in event.items() if key not in ("event", "time", "sequences")
    }
    details = ", ".join(f"{key} {value}" for key, value in known.items())
    return f"{str(event.get('event')).replace('_', ' ')}{': ' if details else ''}{details}"
