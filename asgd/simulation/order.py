"""The order in which a parameter server applies gradients, in virtual time.

The order depends on times alone, not on parameters. One cycle of a worker is

    snapshot -> message_time -> compute -> message_time -> queue -> service_time -> next snapshot

All times are in seconds. The server handles one gradient at a time, first come, first served.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count

import numpy as np

from asgd.arguments import count as whole
from asgd.arguments import shown
from asgd.arrays import Array, Integers
from asgd.delays import ComputeTime, CycleTimes
from asgd.errors import InputError

_CHUNK = 4096  # compute times drawn together


@dataclass(frozen=True)
class ServerOrder:
    """Worker, versions and times of each update; all arrays have shape (updates,).

    Attributes
    ----------
    worker
        Worker that computed the gradient.
    sequence
        Number of the gradient among those of its worker.
    read_version
        Version of the snapshot: the number of updates applied before it was read.
    compute_seconds
        From snapshot received to gradient ready.
    applied_seconds
        From the start of the run to the update.
    """

    worker: Integers
    sequence: Integers
    read_version: Integers
    compute_seconds: Array
    applied_seconds: Array

    @property
    def staleness(self) -> Integers:
        """Updates applied between reading the snapshot and applying the gradient."""
        return np.arange(len(self.worker)) - self.read_version


def simulate_staleness(
    compute_time: ComputeTime,
    updates: int,
    rng: np.random.Generator,
    *,
    schedule: str = "free",
    gradient_time: float = 0.0,
    message_time: float = 0.0,
    service_time: float = 0.0,
) -> ServerOrder:
    """Simulate the order of updates without computing gradients.

    >>> times = asgd.ComputeTime("constant", [1.0, 1.0])
    >>> asgd.simulate_staleness(times, 5, np.random.default_rng(0)).read_version.tolist()
    [0, 0, 1, 2, 3]

    Parameters
    ----------
    compute_time
        Compute-time law with one mean per worker; its length is the number of workers.
    updates
        Number of updates.
    rng
        Draws compute times and, under the uniform schedule, turns.
    schedule
        "free" applies gradients as they arrive; "uniform" draws the next worker uniformly and
        waits for its gradient.
    gradient_time, message_time, service_time
        Seconds added to every compute time, per message (one way), and per update on the server.

    Raises
    ------
    InputError
        A time, `schedule`, `updates` or `rng` is not valid.
    """
    times, workers = CycleTimes(gradient_time, message_time, service_time), len(compute_time.mean)
    if not isinstance(rng, np.random.Generator):
        raise InputError(f"rng = {shown(rng)}: expected a numpy Generator")
    updates = whole(updates, "updates")
    if schedule not in ("free", "uniform"):
        raise InputError(f"schedule = {schedule!r}: expected free or uniform")
    turns = rng.integers(workers, size=updates) if schedule == "uniform" else None
    chunks = (compute_time.draw_relative(_CHUNK, rng).tolist() for _ in count())
    relative = chain.from_iterable(chunks)
    mean = compute_time.mean.tolist()
    return server_order(
        lambda worker, _: times.gradient_time + mean[worker] * next(relative),
        workers,
        updates,
        turns=turns,
        messages=times.messages,
        service_time=times.service_time,
    )


def server_order(
    compute_seconds: Callable[[int, int], float],
    workers: int,
    updates: int,
    *,
    turns: Integers | None = None,
    messages: float = 0.0,
    service_time: float = 0.0,
) -> ServerOrder:
    """Simulate the order of updates, given the compute times.

    Parameters
    ----------
    compute_seconds
        Returns the time from snapshot received to gradient ready for (worker, sequence). It is
        called once for each pair, with the sequence numbers of a worker in order.
    turns
        Worker of each update, shape (updates,). None takes the worker that arrives first; among
        simultaneous arrivals, the one with the older snapshot.
    messages, service_time
        Seconds of both messages of a cycle, and of each update on the server.
    """
    computing = [compute_seconds(worker, 0) for worker in range(workers)]
    arrival = [seconds + messages for seconds in computing]
    turn = _first_come(arrival) if turns is None else iter(turns.tolist())
    sequence = [0] * workers
    chosen, computed, applied = [], [], []
    now = 0.0
    for _ in range(updates):
        worker = next(turn)
        now = max(now, arrival[worker]) + service_time
        chosen.append(worker)
        applied.append(now)
        computed.append(computing[worker])
        sequence[worker] += 1
        computing[worker] = seconds = compute_seconds(worker, sequence[worker])
        arrival[worker] = now + seconds + messages
    worker_of = np.array(chosen, dtype=np.int64)
    order, previous = _previous_turns(worker_of)
    return ServerOrder(worker_of, order, previous + 1, np.array(computed), np.array(applied))


def unhindered_order(
    draw: Callable[[int, int, int], Array],
    workers: int,
    updates: int,
    messages: float = 0.0,
) -> ServerOrder | None:
    """Return `server_order` for a service time of zero, many times faster.

    Without service time there is no queue: the arrivals of each worker are cumulative sums of its
    own times, and only have to be merged. Returns None if two gradients arrive at the same time,
    because the queue of `server_order` then decides the order.

    Parameters
    ----------
    draw
        Returns the compute times of `(worker, first block, number of blocks)`; all blocks have the
        same length.
    workers, updates, messages
        As in `server_order`.
    """
    known = [_Arrivals(messages) for _ in range(workers)]
    behind = list(range(workers))
    while behind:
        for worker in behind:
            own = known[worker]
            more = max(1, own.blocks)
            own.extend(draw(worker, own.blocks, more), more)
        arrival = np.concatenate([own.arrival for own in known])
        # Every worker's arrivals up to `last` must be known.
        last = np.partition(arrival, updates - 1)[updates - 1] if len(arrival) >= updates else None
        behind = [w for w, own in enumerate(known) if last is None or own.arrival[-1] <= last]
    first = np.argsort(arrival, kind="stable")[:updates]
    applied = arrival[first]
    if (np.diff(applied) == 0.0).any():
        return None
    who = np.repeat(np.arange(workers), [len(own.arrival) for own in known])[first]
    sequence, previous = _previous_turns(who)
    computing = np.concatenate([own.computing for own in known])[first]
    return ServerOrder(who, sequence, previous + 1, computing, applied)


class _Arrivals:
    """Arrival times of one worker's gradients at a server without a queue."""

    def __init__(self, messages: float) -> None:
        self.blocks = 0
        self.computing = np.empty(0)
        self.arrival = np.empty(0)
        self._messages = messages

    def extend(self, computing: Array, blocks: int) -> None:
        """Append the arrivals after `blocks` more blocks of compute times."""
        # Adding in the order of events gives the same rounding as `server_order`.
        times = np.empty(1 + 2 * len(computing))
        times[0] = self.arrival[-1] if self.blocks else 0.0
        times[1::2], times[2::2] = computing, self._messages
        self.arrival = np.append(self.arrival, np.cumsum(times)[2::2])
        self.computing = np.append(self.computing, computing)
        self.blocks += blocks


def _first_come(arrival: list[float]) -> Iterator[int]:
    """Yield the next worker to arrive; the caller updates `arrival` before the next iteration."""
    heap = [(time, number, number) for number, time in enumerate(arrival)]
    heapq.heapify(heap)
    for number in count(len(arrival)):
        worker = heap[0][2]
        yield worker
        heapq.heapreplace(heap, (arrival[worker], number, worker))


def _previous_turns(worker: Integers) -> tuple[Integers, Integers]:
    """Return, for each turn, how many earlier turns its worker had, and the last of them or -1."""
    by_worker = np.argsort(worker, kind="stable")
    sorted_worker = worker[by_worker]
    first = np.ones(len(worker), dtype=bool)
    first[1:] = sorted_worker[1:] != sorted_worker[:-1]
    place = np.arange(len(worker))
    start = np.maximum.accumulate(np.where(first, place, 0))
    number, previous = np.empty_like(worker), np.empty_like(worker)
    number[by_worker] = place - start
    previous[by_worker] = np.where(first, -1, np.roll(by_worker, 1))
    return number, previous
