"""Refuses a run whose parameters and gradients do not fit into this machine's memory."""

from __future__ import annotations

import re
from pathlib import Path

from asgd.errors import InputError

# Vectors of d float64 that each holds at most, without its framework: measured with ten million
# parameters over tcp; shared memory takes less. A worker's snapshot and gradient are at the server
# too.
_SERVER, _WORKER, _RECORDER = 5, 5, 5


def check_memory(workers: int, dim: int) -> None:
    """Refuse workers for which the free memory of this machine does not suffice.

    Parameters
    ----------
    dim
        Number of parameters.

    Raises
    ------
    InputError
        It does not suffice; the message says how much is needed.
    """
    needed, free = 8 * dim * (_SERVER + _RECORDER + _WORKER * workers), _free_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"cluster.workers = {workers}: with {dim:,} parameters they take {needed / 1e9:.1f} GB "
            f"together with the server, and {free / 1e9:.1f} GB are free: expected fewer workers, "
            "or more machines (--address)"
        )


def _free_bytes() -> int | None:
    """Return the memory that can be used without swapping, None if the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
