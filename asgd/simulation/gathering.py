"""The gradients of each update in virtual time, under any `Policy`, and their snapshots."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from asgd.arrays import Array, Columns, Integers
from asgd.epochs import Handout
from asgd.policy import Policy
from asgd.rundir.columns import DISCARDED_COLUMNS, SHARED
from asgd.simulation.order import ServerOrder

_DISCARDED = tuple(name for name in DISCARDED_COLUMNS if name != "staleness")
# Worker, sequence, read version, seconds of computing, position and batch size of a gradient.
_Row = tuple[int, int, int, float, int, int]


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """The gradients of each update; every update has `each` of them.

    Attributes
    ----------
    worker, sequence, read_version, compute_seconds
        As in `ServerOrder`, of each gradient, shape (updates, each).
    applied_seconds
        From the start of the run to the update, shape (updates,).
    batch_size
        Samples of each gradient, shape (updates, each).
    position
        Position of each gradient's first sample in the epochs of its part, shape (updates, each);
        None if samples are drawn with replacement.
    discarded
        The columns `DISCARDED_COLUMNS`, ordered by `update`.
    resets
        (update, worker, sequence) of each number that was left out because a worker's state was
        reset, shape (resets, 3), ordered by update.
    """

    worker: Integers
    sequence: Integers
    read_version: Integers
    compute_seconds: Array
    applied_seconds: Array
    batch_size: Integers
    position: Integers | None = None
    discarded: Columns = field(default_factory=lambda: _discarded([]))
    resets: Integers = field(default_factory=lambda: np.empty((0, 3), np.int64))

    @classmethod
    def of(
        cls, order: ServerOrder, batch_size: Integers, position: Integers | None = None
    ) -> Gathering:
        """Return the gradients of updates with one gradient each; all arguments are by update."""
        return cls(
            worker=order.worker[:, np.newaxis],
            sequence=order.sequence[:, np.newaxis],
            read_version=order.read_version[:, np.newaxis],
            compute_seconds=order.compute_seconds[:, np.newaxis],
            applied_seconds=order.applied_seconds,
            batch_size=batch_size[:, np.newaxis],
            position=None if position is None else position[:, np.newaxis],
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

    def trace(self, part: slice) -> Columns:
        """Return the columns of the trace but `gradient_norm` for a part of the updates."""
        update, alone = np.arange(part.start, part.stop), self.each == 1
        read_version = self.read_version[part].min(axis=1)
        return {
            "update": update,
            "worker": self.worker[part, 0] if alone else np.full(len(update), SHARED),
            "sequence": self.sequence[part, 0] if alone else update,
            "read_version": read_version,
            "staleness": update - read_version,
            "batch_size": self.batch_size[part].sum(axis=1),
            "compute_seconds": self.compute_seconds[part].max(axis=1),
            "applied_seconds": self.applied_seconds[part],
        }

    def members(self, part: slice) -> Columns:
        """Return the columns of the members; no rows if updates have one gradient each."""
        if self.each == 1:
            part = slice(part.start, part.start)
        return {
            "update": self._update_of_each(part),
            "worker": self.worker[part].ravel(),
            "sequence": self.sequence[part].ravel(),
            "read_version": self.read_version[part].ravel(),
            "batch_size": self.batch_size[part].ravel(),
            "compute_seconds": self.compute_seconds[part].ravel(),
        }

    def positions(self, part: slice) -> Columns | None:
        """Return the columns `POSITION_COLUMNS` for a part of the updates, if there are any."""
        if self.position is None:
            return None
        return {
            "update": self._update_of_each(part),
            "worker": self.worker[part].ravel(),
            "position": self.position[part].ravel(),
        }

    def discarded_in(self, part: slice) -> Columns:
        """Return `DISCARDED_COLUMNS` for a part of the updates."""
        start, stop = np.searchsorted(self.discarded["update"], (part.start, part.stop))
        return {name: column[start:stop] for name, column in self.discarded.items()}

    def _update_of_each(self, part: slice) -> Integers:
        return np.repeat(np.arange(part.start, part.stop), self.each)

    def resets_in(self, part: slice) -> list[dict[str, int]]:
        """Return the fields of the events `state_reset` for a part of the updates."""
        start, stop = np.searchsorted(self.resets[:, 0], (part.start, part.stop))
        names = ("update", "worker", "sequence")
        return [dict(zip(names, row, strict=True)) for row in self.resets[start:stop].tolist()]


def gather(
    compute_seconds: Callable[[int, int], float],
    batch_size: Integers,
    workers: int,
    policy: Policy,
    *,
    messages: float = 0.0,
    service_time: float = 0.0,
    keeps: bool = False,
    handout: Handout | None = None,
) -> Gathering:
    """Simulate a server with a policy; the other arguments are those of `server_order`.

    The server spends its service time on updates alone. If the workers keep their state, it leaves
    out a sequence number after each discarded gradient, see `asgd.local_steps`.

    Parameters
    ----------
    batch_size
        Samples of a gradient by the version that it reads, shape (updates,); a range of an epoch
        may be shorter.
    handout
        Hands out the positions in epochs; None if samples are drawn with replacement.
    """
    updates, each = len(batch_size), policy.gradients or workers
    team = _Team(compute_seconds, batch_size.tolist(), messages, handout)
    for worker in range(workers):
        team.grant(worker, 0, 0.0)
    now, version = 0.0, 0
    group: list[_Row] = []
    used: list[_Row] = []
    discarded: list[tuple[float, ...]] = []
    resets: list[tuple[int, int, int]] = []
    applied = []
    while True:
        arrival, gradient = team.arrive()
        worker, sequence, read, seconds, _, size = gradient
        now = max(now, arrival)
        answered = [] if policy.waits else [worker]
        if version - read > policy.oldest:
            discarded.append((version, worker, sequence, read, size, seconds, now))
            answered = [worker]
            team.discard(worker, sequence)
            if keeps:
                resets.append((version, worker, team.leave_out(worker)))
        else:
            group.append(gradient)
        if len(group) == each:
            now += service_time
            version += 1
            applied.append(now)
            group.sort()
            used += group
            if version == updates:
                break
            team.use(group)
            answered = [one for one, *_ in group] if policy.waits else [worker]
            group = []
        for one in answered:
            team.grant(one, version, now)
    who, number, version_read, computed, position, sizes = (
        np.array(column).reshape(updates, each) for column in zip(*used, strict=True)
    )
    return Gathering(
        worker=who,
        sequence=number,
        read_version=version_read,
        compute_seconds=computed,
        applied_seconds=np.array(applied),
        batch_size=sizes,
        position=position if handout else None,
        discarded=_discarded(discarded),
        resets=np.array(resets, np.int64).reshape(-1, 3),
    )


class _Team:
    """The gradients of the workers, and their arrival times at the server.

    Parameters
    ----------
    compute_seconds, batch_size, messages, handout
        As in `gather`.
    """

    def __init__(
        self,
        compute_seconds: Callable[[int, int], float],
        batch_size: list[int],
        messages: float,
        handout: Handout | None,
    ) -> None:
        self._compute_seconds, self._batch_size = compute_seconds, batch_size
        self._messages, self._handout = messages, handout
        self._sequence: dict[int, int] = {}  # the next number of each worker
        self._arrivals: list[tuple[float, int, _Row]] = []
        self._snapshots = count()

    def grant(self, worker: int, version: int, now: float) -> None:
        """Let a worker compute its next gradient at a version."""
        number = self._sequence.get(worker, 0)
        self._sequence[worker] = number + 1
        seconds, size = self._compute_seconds(worker, number), self._batch_size[version]
        place = self._handout.take(worker, number, size) if self._handout else (0, size)
        gradient = worker, number, version, seconds, *place
        arrival = now + seconds + self._messages
        heapq.heappush(self._arrivals, (arrival, next(self._snapshots), gradient))

    def arrive(self) -> tuple[float, _Row]:
        """Return the next arrival and its gradient."""
        arrival, _, gradient = heapq.heappop(self._arrivals)
        return arrival, gradient

    def discard(self, worker: int, number: int) -> None:
        """Take back the positions of a gradient that is not applied."""
        if self._handout:
            self._handout.give_back(worker, number)

    def use(self, group: list[_Row]) -> None:
        """Note that gradients are applied."""
        if self._handout:
            for worker, number, _, _, position, size in group:
                self._handout.use(worker, number, position, size)

    def leave_out(self, worker: int) -> int:
        """Leave out a number of a worker, and return it."""
        self._sequence[worker] += 1
        return self._sequence[worker] - 1


def _discarded(rows: list[tuple[float, ...]]) -> Columns:
    columns = zip(*rows, strict=True) if rows else [()] * len(_DISCARDED)
    table = {
        name: np.array(column, DISCARDED_COLUMNS[name])
        for name, column in zip(_DISCARDED, columns, strict=True)
    }
    return {**table, "staleness": table["update"] - table["read_version"]}


def snapshot_slots(read_version: Integers) -> Integers:
    """Return a slot for each version, shape (updates + 1,), as few as possible.

    A version keeps its slot until the last update that reads it is made, and at least until the
    next version exists.

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
