"""Workers that hardly take part in a run: a staleness law of theirs cannot be told.

The one or two gradients of a worker that sleeps are older than everything else by orders of
magnitude. Among thousands of updates they would decide on the mean, and on the start-up if that
lasted until each worker has delivered; the other workers behave as if it were not there.
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
_BEHIND = 20  # times as many that an even share would be
_TIMES = ("never", "once", "twice")


def stragglers(worker: npt.NDArray[Any], workers: int) -> dict[Any, int]:
    """Return how often each worker delivered that hardly took part, by its name.

    That is at most twice, where an even share would be 20 times as often and 20 times more. Whoever
    never delivered is known where the workers have the numbers 0, ..., workers - 1.

    Parameters
    ----------
    worker
        Of each update, shape (m,).
    workers
        How many there were, from the first update to the last.
    """
    names, delivered = np.unique(worker, return_counts=True)
    if SHARED in names.tolist():
        return {}
    found = dict(zip(names.tolist(), delivered.tolist(), strict=True))
    if set(found) <= set(range(workers)):
        found |= dict.fromkeys(set(range(workers)) - set(found), 0)
    most = min(len(worker) / workers / _BEHIND - 1.0, _FEW)
    return {name: times for name, times in sorted(found.items()) if times <= most}


def stragglers_of(run: Run) -> dict[int, int]:
    """Return the stragglers of a run; none where workers came or left."""
    trace = run.trace
    sizes = team_sizes(run.events, run.config.cluster.workers, len(trace))
    if not len(sizes) or sizes.min() != sizes.max():
        return {}
    return stragglers(trace["worker"].to_numpy(), int(sizes[0]))


def taking_part(worker: npt.NDArray[Any], left_out: Collection[Any]) -> npt.NDArray[np.bool_]:
    """Return which updates are not of these workers, shape (m,)."""
    return ~np.isin(worker, list(left_out))


def in_words(left_out: Mapping[Any, int], workers: float | None) -> str:
    """Return the sentence on workers that are left out, "" where there is none.

    Parameters
    ----------
    left_out
        How often each delivered.
    workers
        The number of the others.
    """
    if not left_out:
        return ""
    parts = []
    for times in sorted(set(left_out.values())):
        names = [str(name) for name, number in left_out.items() if number == times]
        shown = names if len(names) <= 10 else [*names[:9], f"{len(names) - 9} more"]
        listed = " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
        noun = "workers" if len(names) > 1 else "worker"
        parts.append(f"{noun} {listed} delivered {_TIMES[times]}")
    sentence = "; ".join(parts)
    rest = "" if workers is None else f" {workers:.4g}"
    return (
        f"{sentence[:1].upper()}{sentence[1:]}: left out, what follows is of the other{rest} "
        f"{'worker' if workers == 1 else 'workers'}."
    )
