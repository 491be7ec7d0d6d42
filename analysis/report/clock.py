"""The clock of a run, real or virtual, and the wall-clock time that its user waited.

Real and virtual seconds are not comparable, so runs on different clocks are compared in updates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from asgd.rundir.reader import Run

Clock = Literal["real", "simulated", "mixed"]

_CUT_SHORT = ("interrupted", "failed", "server_restored")  # events with idle time around them
AXIS = {"real": "time (s)", "simulated": "virtual time (s)"}


def clock_of(run: Run) -> Literal["real", "simulated"]:
    """Return whether a run has real workers or virtual time."""
    joined = any(event.get("event") == "worker_joined" for event in run.events)
    return "real" if joined or (run.path / "checkpoints").is_dir() else "simulated"


def common_clock(runs: Iterable[Run]) -> Clock:
    """Return the common clock of all runs, "mixed" if they differ."""
    clocks = {clock_of(run) for run in runs}
    return clocks.pop() if len(clocks) == 1 else "mixed"


def seconds_waited(run: Run) -> float | None:
    """Return the seconds from the start of a run to its end, with start-up and evaluation.

    None if the run did not finish without interruption.
    """
    kinds = [event.get("event") for event in run.events]
    if not {"start", "finish"} <= set(kinds) or set(kinds).intersection(_CUT_SHORT):
        return None
    first, last = (run.events[kinds.index(kind)].get("time") for kind in ("start", "finish"))
    if not isinstance(first, int | float) or not isinstance(last, int | float):
        return None
    return float(last) - float(first)
