"""Finds stragglers: workers with too few updates to estimate their staleness.

The one or two gradients of a worker that slept are older than all others by orders of magnitude.
Among thousands of updates they would dominate the mean, and would prolong a start-up that waits for
every worker; the other workers are not affected by them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from asgd.rundir.columns import SHARED
from asgd.rundir.events import team_sizes
from asgd.rundir.reader import Run

_FEW = 2  # deliveries
_BEHIND = 20  # factor below an even share
_TIMES = ("never delivered", "delivered once", "delivered twice")


def stragglers(worker: npt.NDArray[Any], workers: int) -> dict[Any, int]:
    """Return the number of deliveries of each straggler, by worker.

    A straggler delivered at most twice, and an even share is at least 20 times as many and 20 more.
    Workers that never delivered are found only if the workers are numbered 0, ..., workers - 1.

    Parameters
    ----------
    worker
        Of each update, shape (m,).
    workers
        Number of workers during the whole run.
    """
    names, delivered = np.unique(worker, return_counts=True)
    return stragglers_among(dict(zip(names.tolist(), delivered.tolist(), strict=True)), workers)


def stragglers_among(delivered: Mapping[Any, int], workers: int) -> dict[Any, int]:
    """Return `stragglers`, given the number of deliveries of each worker."""
    if SHARED in delivered:
        return {}
    found, updates = dict(delivered), sum(delivered.values())
    if set(found) <= set(range(workers)):
        found |= dict.fromkeys(set(range(workers)) - set(found), 0)
    most = min(updates / workers / _BEHIND - 1.0, _FEW)
    return {name: times for name, times in sorted(found.items()) if times <= most}


def stragglers_of(run: Run) -> dict[int, int]:
    """Return the stragglers of a run; none if workers joined or left."""
    trace = run.trace
    sizes = team_sizes(run.events, run.config.cluster.workers, len(trace))
    if not len(sizes) or sizes.min() != sizes.max():
        return {}
    return stragglers(trace["worker"].to_numpy(), int(sizes[0]))


def taking_part(worker: npt.NDArray[Any], left_out: Collection[Any]) -> npt.NDArray[np.bool_]:
    """Return a mask of the updates by other workers, shape (m,)."""
    return ~np.isin(worker, list(left_out))


def in_words(left_out: Mapping[Any, int], workers: float | None) -> str:
    """Return a sentence on the stragglers, "" if there are none.

    Parameters
    ----------
    left_out
        Deliveries of each straggler.
    workers
        Number of other workers.
    """
    if not left_out:
        return ""
    parts = []
    for times in sorted(set(left_out.values())):
        names = [str(name) for name, number in left_out.items() if number == times]
        shown = names if len(names) <= 10 else [*names[:9], f"{len(names) - 9} more"]
        listed = " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
        noun = "workers" if len(names) > 1 else "worker"
        parts.append(f"{noun} {listed} {_TIMES[times]}")
    sentence = "; ".join(parts)
    rest = "" if workers is None else f" {workers:.4g}"
    return (
        f"{sentence[:1].upper()}{sentence[1:]}: left out; the results are those of the other{rest} "
        f"{'worker' if workers == 1 else 'workers'}."
    )
