"""Summaries of runs on disk: state and headline numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asgd.errors import AsgdError, InputError
from asgd.rundir.events import in_words, incidents
from asgd.rundir.reader import Run, read_run, summary

_LOSSES = 1000


def find_runs(directory: str | Path) -> list[Path]:
    """Return the run directories in a directory, including repeats, sorted by name.

    Raises
    ------
    InputError
        There is no such directory.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; `asgd run` makes runs under runs/")
    found = sorted(path.parent for path in directory.rglob("config.json"))
    return [path for path in found if (path / "events.jsonl").exists()]


def status(run: Run) -> dict[str, Any]:
    """Return the `summary` of a run with more details.

    Additional keys: `recent_staleness` (over the last tenth of the updates), `seconds`, `by_worker`
    (updates of each worker; "-1": means of several), `losses` (at most a thousand at equal
    distances, with the last), and `events` (incidents, in words).
    """
    found = run.outline
    return {
        **summary(run),
        "recent_staleness": found.recent_staleness,
        "seconds": found.seconds,
        "by_worker": {str(worker): count for worker, count in found.by_worker.items()},
        "losses": run.some_losses(_LOSSES),
        "events": [in_words(event) for event in incidents(run.events)],
    }


def list_runs(directory: str | Path) -> list[dict[str, Any]]:
    """Return the summary of each run in a directory, or the reason why it cannot be read."""
    rows = []
    for path in find_runs(directory):
        try:
            rows.append(summary(read_run(path)))
        except (AsgdError, MemoryError) as error:
            reason = str(error) or "there is not enough memory to read it"
            rows.append({"run": str(path), "state": "unreadable", "reason": reason})
    return rows
