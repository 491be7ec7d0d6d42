"""The task of processes that write one log. Imports little, because each process imports it."""

from __future__ import annotations

from multiprocessing.synchronize import Barrier

import asgd


def append(log: asgd.StalenessLog, worker: int, ready: Barrier) -> None:
    """Log 400 items once all processes have started."""
    ready.wait()
    for _ in range(400):
        log.applied(worker, log.computed(log.read()))
