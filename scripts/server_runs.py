"""What the benchmarks of the server read of a run: its rate and its processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from asgd.rundir.reader import Run

ROLES = {"ray::ServerActo": "server", "ray::WorkerActo": "worker", "ray::RecorderAc": "recorder"}


def steady_rate(run: Run) -> float:
    """Return updates/s after the first tenth of a run."""
    seconds = run.trace["applied_seconds"].to_numpy()
    first = len(seconds) // 10
    return float((len(seconds) - 1 - first) / (seconds[-1] - seconds[first]))


def actors() -> Iterator[tuple[Path, str]]:
    """Yield the directory in /proc and the role of each process that this user's runs have."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            role = ROLES.get((process / "comm").read_text().strip())
            if role is not None and process.stat().st_uid == os.getuid():
                yield process, role
