"""Which gradients make each update in virtual time, under any `Policy`, and their snapshots."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array, Integers
from asgd.policy import Policy
from asgd.rundir.columns import DISCARDED_COLUMNS, SHARED
from asgd.simulation.order import ServerOrder

Table = dict[str, npt.NDArray[Any]]

# All but the batch size, which follows from the version read.
_DISCARDED = tuple(name for name in DISCARDED_COLUMNS if name not in ("staleness", "batch_size"))


@dataclass(frozen=True)
class Gathering:
    """The gradients of each update, the same number `each` of every one.

    Attributes
    ----------
    worker, sequence, read_version, compute_seconds
        As in `ServerOrder`, of each gradient, shape (updates, each).
    applied_seconds
        From the start of the run to the update, shape (updates,).
    discarded
        The columns `DISCARDED_COLUMNS` without `batch_size`, ordered by `update`.
    resets
        (update, worker, sequence) of the numbers that are left out because a worker's state began
        anew, shape (resets, 3), ordered by update.
    """

    worker: Integers
    sequence: Integers
    read_version: Integers
    compute_seconds: Array
    applied_seconds: Array
    discarded: Table = field(default_factory=lambda: _discarded([]))
    resets: Integers = field(default_factory=lambda: np.empty((0, 3), np.int64))

    @classmethod
    def of(cls, order: ServerOrder) -> Gathering:
        """Return the gradients of updates that have one each."""
        return cls(
            order.worker[:, np.newaxis],
            order.sequence[:, np.newaxis],
            order.read_version[:, np.newaxis],
            order.compute_seconds[:, np.newaxis],
            order.applied_seconds,
        )

    def __len__(self) -> int:
        """Return the number of updates."""
        return len(self.worker)

    @property
    def each(self) -> int:
        """The number of gradients of an update."""
        return int(self.worker.shape[1])

    @property
    def staleness(self) -> Integers:
        """The staleness of the oldest gradient of each update, shape (updates,)."""
        return np.asarray(np.arange(len(self)) - self.read_version.min(axis=1))

    def trace(self, part: slice, batch_size: Integers) -> Table:
        """Return the columns of the trace but `gradient_norm` for a part of the updates.

        `batch_size` is that of each gradient, shape (updates, each).
        """
        update, alone = np.arange(part.start, part.stop), self.each == 1
        read_version = self.read_version[part].min(axis=1)
        return {
            "update": update,
            "worker": self.worker[part, 0] if alone else np.full(len(update), SHARED),
            "sequence": self.sequence[part, 0] if alone else update,
            "read_version": read_version,
            "staleness": update - read_version,
            "batch_size": batch_size[part].sum(axis=1),
            "compute_seconds": self.compute_seconds[part].max(axis=1),
            "applied_seconds": self.applied_seconds[part],
        }

    def members(self, part: slice, batch_size: Integers) -> Table:
        """Return the columns of the members; no rows if updates have one gradient each."""
        if self.each == 1:
            part = slice(part.start, part.start)
        return {
            "update": np.repeat(np.arange(part.start, part.stop), self.each),
            "worker": self.worker[part].ravel(),
            "sequence": self.sequence[part].ravel(),
            "read_version": self.read_version[part].ravel(),
            "batch_size": batch_size[part].ravel(),
            "compute_seconds": self.compute_seconds[part].ravel(),
        }

    def discarded_in(self, part: slice, batch_size: Integers) -> Table:
        """Return `DISCARDED_COLUMNS` for a part of the updates; `batch_size` is by version."""
        start, stop = np.searchsorted(self.discarded["update"], (part.start, part.stop))
        table = {name: column[start:stop] for name, column in self.discarded.items()}
        return {**table, "batch_size": batch_size[table["read_version"]]}

    def resets_in(self, part: slice) -> list[dict[str, int]]:
        """Return the fields of the events `state_reset` for a part of the updates."""
        start, stop = np.searchsorted(self.resets[:, 0], (part.start, part.stop))
        names = ("update", "worker", "sequence")
        return [dict(zip(names, row, strict=True)) for row in self.resets[start:stop].tolist()]


def gather(
    compute_seconds: Callable[[int, int], float],
    workers: int,
    updates: int,
    policy: Policy,
    *,
    messages: float = 0.0,
    service_time: float = 0.0,
    keeps: bool = False,
) -> Gathering:
    """Simulate a server with a policy; the other arguments are those of `server_order`.

    The server spends its service time on updates alone. If the workers have state that they keep,
    it leaves out a number after a gradient that was discarded, see `asgd.local_steps`.
    """
    each = policy.gradients or workers
    read, sequence = [0] * workers, [0] * workers
    computing = [compute_seconds(worker, 0) for worker in range(workers)]
    arrivals = [(seconds + messages, number, number) for number, seconds in enumerate(computing)]
    heapq.heapify(arrivals)
    snapshots = count(workers)
    now, version = 0.0, 0
    group: list[tuple[int, int, int, float]] = []
    used: list[tuple[int, int, int, float]] = []
    discarded: list[tuple[float, ...]] = []
    resets: list[tuple[int, int, int]] = []
    applied = []
    while version < updates:
        arrival, _, worker = heapq.heappop(arrivals)
        now = max(now, arrival)
        gradient = worker, sequence[worker], read[worker], computing[worker]
        answered = [] if policy.waits else [worker]
        if version - read[worker] > policy.oldest:
            discarded.append((version, *gradient, now))
            answered = [worker]
            if keeps:
                sequence[worker] += 1
                resets.append((version, worker, sequence[worker]))
        else:
            group.append(gradient)
        if len(group) == each:
            now += service_time
            version += 1
            applied.append(now)
            group.sort()
            used += group
            answered = [one for one, *_ in group] if policy.waits else [worker]
            group = []
        for one in answered:
            sequence[one] += 1
            computing[one] = seconds = compute_seconds(one, sequence[one])
            read[one] = version
            heapq.heappush(arrivals, (now + seconds + messages, next(snapshots), one))
    who, number, version_read, computed = (
        np.array(column).reshape(updates, each) for column in zip(*used, strict=True)
    )
    begun_anew = np.array(resets, np.int64).reshape(-1, 3)
    applied_at, dropped = np.array(applied), _discarded(discarded)
    return Gathering(who, number, version_read, computed, applied_at, dropped, begun_anew)


def _discarded(rows: list[tuple[float, ...]]) -> Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(_DISCARDED)
    table = {
        name: np.array(column, DISCARDED_COLUMNS[name])
        for name, column in zip(_DISCARDED, columns, strict=True)
    }
    return {**table, "staleness": table["update"] - table["read_version"]}


def snapshot_slots(read_version: Integers) -> Integers:
    """Return a slot for each version, shape (updates + 1,), as few as possible.

    A version keeps its slot until the last update that reads it has been made, and at least until
    the next version is there.

    Parameters
    ----------
    read_version
        Versions that each update reads, shape (updates, each).
    """
    updates = len(read_version)
    last_read = np.arange(updates + 1)
    np.maximum.at(last_read, read_version, np.arange(updates)[:, np.newaxis])
    ends = np.searchsorted(np.sort(last_read), np.arange(updates + 1)).tolist()
    leaving = np.argsort(last_read, kind="stable").tolist()
    slots: list[int] = []
    free: list[int] = []
    left = used = 0
    for version in range(updates + 1):
        free += [slots[one] for one in leaving[left : ends[version]]]
        left = ends[version]
        if not free:
            free.append(used)
            used += 1
        slots.append(free.pop())
    return np.array(slots)
