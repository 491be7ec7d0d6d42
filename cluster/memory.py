"""Refuses a run whose parameters and gradients do not fit into this machine's memory."""

from __future__ import annotations

import re
from pathlib import Path

from asgd.config import RunConfig
from asgd.errors import InputError
from asgd.problems.base import Problem

# Vectors of parameters that each holds at most: a snapshot and a gradient of a worker, and those of
# its framework without activations; of the server see `scripts/bench_memory.py`.
_SERVER, _WORKER, _RECORDER = 5, 5, 5
_RECORDS = 4  # between server and recorder
_STATE = 4  # of an update rule that has one, old and new, and its copy for a checkpoint
_COLLECTED = 2  # of each worker, where an update is the mean of several gradients or one must wait


def check_memory(config: RunConfig, problem: Problem) -> None:
    """Refuse workers for which the free memory of this machine does not suffice.

    Raises
    ------
    InputError
        It does not suffice; the message says how much is needed.
    """
    workers, order = config.cluster.workers, (config.cluster.mode, config.cluster.schedule)
    vectors = _SERVER + _RECORDER + _RECORDS + _WORKER * workers
    if config.optimizer.rule == "momentum":
        vectors += _STATE
    if order != ("async", "free"):
        vectors += _COLLECTED * workers
    needed, free = vectors * problem.dim * problem.dtype.itemsize, _free_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"cluster.workers = {workers}: with {problem.dim:,} parameters in {problem.dtype} they "
            f"take {needed / 1e9:.1f} GB together with the server, and {free / 1e9:.1f} GB are "
            "free: expected fewer workers, or more machines (--address)"
        )


def _free_bytes() -> int | None:
    """Return the memory that can be used without swapping, None if the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
