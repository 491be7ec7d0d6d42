"""The gradients behind each update of many servers in virtual time, by mode (ours).

The order of pushes depends only on times, never on parameters. Every path is a separate server;
arrays run over paths, so one update of all paths costs a few array operations.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from analysis.profile.queueing import ServerTimes
from asgd.arrays import Array, Integers
from asgd.staleness.law import StalenessLaw


class UpdateReads(NamedTuple):
    """The snapshots that one update of every path uses; several per path are averaged.

    Attributes
    ----------
    path
        Path of each read, ascending, each at least once, shape (r,).
    slot
        Slot of the snapshot, shape (r,).
    new_slot
        Slot that receives the new point, shape (r,).
    version
        Updates made before the snapshot was read, shape (r,).
    """

    path: Integers
    slot: Integers
    new_slot: Integers
    version: Integers


class ServerTurns(Protocol):
    """The turns of many servers.

    Attributes
    ----------
    slots
        Snapshots per path; all are x_0 at first.
    seconds
        Time of the last update of each path, shape (paths,).
    """

    slots: int
    seconds: Array

    def next(self, k: int) -> UpdateReads:
        """Return the reads of update k; call in order."""


class QueueReads:
    """Workers that push when they are ready, modes async and bounded.

    With a bound on staleness, a gradient read at version v is due at update v + bound. That update
    waits for all gradients due at it and applies their mean; other updates take the next arrival.

    Parameters
    ----------
    server
        Times of the workers and of the server.
    paths, rng
        Number of independent servers, and the generator of their times.
    bound
        Bound on the staleness; None for none.
    drawn
        Whether the next worker is drawn uniformly, and the server waits for it.
    """

    def __init__(
        self,
        server: ServerTimes,
        paths: int,
        rng: np.random.Generator,
        *,
        bound: int | None = None,
        drawn: bool = False,
    ) -> None:
        self.slots = server.workers
        self.seconds = np.zeros(paths)
        self._server, self._rng, self._bound, self._drawn = server, rng, bound, drawn
        self._path = np.arange(paths)
        self._read = np.zeros((paths, self.slots), dtype=np.int64)
        worker = np.tile(np.arange(self.slots), paths)
        self._arrival = self._cycle(worker).reshape(paths, self.slots)

    def next(self, k: int) -> UpdateReads:
        """Return the reads of update k; call in order."""
        path, worker = self._path, self._next_worker()
        if self._bound is not None:
            due = self._read + self._bound <= k
            some = due.any(axis=1)
            if some.any():
                due[~some, worker[~some]] = True
                path, worker = np.nonzero(due)
        ready = self._arrival[path, worker]
        if len(path) > len(self._path):
            ready = np.maximum.reduceat(ready, np.searchsorted(path, self._path))
        self.seconds = np.maximum(self.seconds, ready) + self._server.service_time
        version = self._read[path, worker]
        self._read[path, worker] = k + 1
        self._arrival[path, worker] = self.seconds[path] + self._cycle(worker)
        return UpdateReads(path, worker, worker, version)

    def _next_worker(self) -> Integers:
        if self._drawn:
            return self._rng.integers(self.slots, size=len(self._path))
        from analysis.models.compiled import first_come

        worker = np.empty(len(self._path), dtype=np.int64)
        first_come(self._arrival, self._read, worker)
        return worker

    def _cycle(self, worker: Integers) -> Array:
        return self._server.times.draw_each(worker, self._rng) + self._server.dead_time


class Rounds:
    """Mode sync: a round waits for the slowest worker, then applies the mean of all gradients.

    The mean is one gradient over the samples of all workers.
    """

    def __init__(self, server: ServerTimes, paths: int, rng: np.random.Generator) -> None:
        self.slots = 1
        self.seconds = np.zeros(paths)
        self._server, self._rng = server, rng
        self._path, self._slot = np.arange(paths), np.zeros(paths, dtype=np.int64)
        self._worker = np.tile(np.arange(server.workers), paths)

    def next(self, k: int) -> UpdateReads:
        """Return the reads of update k; call in order."""
        server = self._server
        times = server.times.draw_each(self._worker, self._rng)
        slowest = times.reshape(len(self._path), server.workers).max(axis=1)
        # a new array, because callers may keep the old one
        self.seconds = self.seconds + slowest + server.dead_time
        self.seconds += server.workers * server.service_time
        return UpdateReads(self._path, self._slot, self._slot, np.full_like(self._path, k))


class IndependentReads:
    """Staleness drawn independently at every update (An, Lu, Ying), at an even pace."""

    def __init__(
        self, law: StalenessLaw, pace: float, paths: int, rng: np.random.Generator
    ) -> None:
        self.slots = law.support_length() + 1
        self.seconds = np.zeros(paths)
        self._law, self._rng, self._pace = law, rng, pace
        self._path = np.arange(paths)

    def next(self, k: int) -> UpdateReads:
        """Return the reads of update k; call in order."""
        drawn = self._law.rvs(len(self._path), self._rng)
        version = k - np.minimum(drawn, min(k, self.slots - 1))
        self.seconds = np.full(len(self._path), (k + 1) / self._pace)
        new = np.full_like(version, (k + 1) % self.slots)
        return UpdateReads(self._path, version % self.slots, new, version)
