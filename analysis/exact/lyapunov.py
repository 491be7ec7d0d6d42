"""Growth rates of x' = x - h s_j along the turns j of a server (ours).

A mode of curvature a follows v' = beta v - h s_j, x' = x + v', s_j := x' with h = eta a, or
h / (1 + tau) for a staleness-aware step. Given the turns this is a product of random matrices. Its
exponents per update are

    L(0) = lim log |x_k| / k, of almost every run;   L(2) = lim log E |x_k|^2 / k              (Y1)

Long independent paths give the first. The second needs populations of paths with independent turns,
resampled in proportion to the squared growth: almost all runs are smaller than sqrt(E |x_k|^2), so
plain sampling would miss the few that dominate it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from analysis.profile.queueing import ServerTimes, TimeTable
from asgd.arrays import Array, Integers
from asgd.staleness.law import StalenessLaw


class PathTurns(Protocol):
    """The points that each path uses and replaces by new ones."""

    def several(self, updates: int) -> Integers:
        """Return the slots each path reads in the next updates, shape (paths, updates)."""

    def keep(self, index: Integers) -> None:
        """Replace the paths by those at `index`, shape (paths,)."""


PathTurnsMaker = Callable[[int, np.random.Generator], PathTurns]


class QueueTurns:
    """Turns by the times of a server: the first to arrive is next."""

    def __init__(self, server: ServerTimes, paths: int, rng: np.random.Generator) -> None:
        self.rng, self._server, self._table = rng, server, TimeTable.of(server.times)
        shape = paths, server.workers
        worker = np.tile(np.arange(server.workers), paths)
        seconds = server.times.draw_each(worker, rng) + server.dead_time
        self._arrival = seconds.reshape(shape) * rng.random(shape)
        self._heap = np.argsort(self._arrival, axis=1, kind="stable")
        self._since = np.zeros(shape, dtype=np.int64)
        self._now, self._turn = np.zeros(paths), 0

    def several(self, updates: int) -> Integers:
        """Return the snapshots each path uses in the next updates, shape (paths, updates)."""
        from analysis.models.compiled import serve

        paths, server, table = len(self._now), self._server, self._table
        slot = np.empty((paths, updates), dtype=np.int64)
        queue = self._heap, self._arrival, self._since, self._now
        drawn = table.draw(updates * paths, self.rng).reshape(updates, paths)
        times = table.times, table.begin, table.size
        serve(*queue, *times, drawn, server.dead_time, server.service_time, self._turn, slot)
        self._turn += updates
        return slot

    def keep(self, index: Integers) -> None:
        """Replace the paths by those at `index`, shape (paths,)."""
        self._arrival, self._since = self._arrival[index], self._since[index]
        self._heap, self._now = self._heap[index], self._now[index]


class IndependentLags:
    """Independent lags from the law; the last points are kept in a ring."""

    def __init__(self, law: StalenessLaw, length: int, paths: int, rng: np.random.Generator):
        self.rng, self._length, self._paths, self._turn = rng, length, paths, 0
        self._below = np.cumsum(law.weights(length))[:-1]

    def several(self, updates: int) -> Integers:
        """Return the slots of the points each path reads, shape (paths, updates)."""
        lag = np.searchsorted(self._below, self.rng.random((self._paths, updates)), "right")
        place: Integers = (self._turn + np.arange(updates) - lag) % self._length
        self._turn += updates
        return place

    def keep(self, index: Integers) -> None:
        """Do nothing: the lags of all paths are independent of their past."""


@dataclass(frozen=True)
class Recursion:
    """A linear recursion along random turns.

    Attributes
    ----------
    turns
        Makes the turns of a number of paths.
    slots
        Points kept: P, or the length of the law for independent lags.
    momentum
        beta of the heavy ball.
    staleness_aware
        Whether the step is divided by one plus the staleness.
    circular
        Whether points are replaced in a ring: independent lags. On a server the new point replaces
        the one used.
    """

    turns: PathTurnsMaker
    slots: int
    momentum: float = 0.0
    staleness_aware: bool = False
    circular: bool = False


def block_of(recursion: Recursion) -> int:
    """Return the updates between two norms: at most half an oscillation, which takes 4 P or more.

    Shorter blocks cost time and change nothing.
    """
    return max(4, min(recursion.slots // 2, 16))


def tapered_mean(growth: Array) -> Array:
    """Return the mean growth rate over time, shape (blocks, ...), with little weight at both ends.

    Paths that start alike oscillate together near the limit of a narrow law, and the logarithm of
    an oscillation rises and falls by more than it grows. A smooth window averages over it.
    """
    weight = np.hanning(len(growth) + 2)[1:-1]
    return np.asarray(weight @ growth / weight.sum())


class Paths:
    """The points of independent paths of a recursion, all 1 at first."""

    def __init__(self, recursion: Recursion, paths: int) -> None:
        self._recursion, self._turn = recursion, 0
        self._x, self._v = np.ones(paths), np.zeros(paths)
        self._s = np.ones((paths, recursion.slots))
        self._version = np.zeros(self._s.shape, dtype=np.int64)

    def follow(self, read: Integers, step: float, block: int = 0) -> Array:
        """Return the log growth of each path along these turns, shape (paths, blocks).

        `block` is the number of updates in a block, 0 for all; an incomplete last block is ignored.
        """
        from analysis.models.compiled import grow

        recursion, updates = self._recursion, read.shape[1]
        block = block or updates
        write = read
        if recursion.circular:
            places = (self._turn + 1 + np.arange(updates)) % recursion.slots
            write = np.ascontiguousarray(np.broadcast_to(places, read.shape))
        growth = np.zeros((len(read), updates // block))
        aware, first, points = recursion.staleness_aware, self._turn, (self._x, self._v)
        held = self._s, self._version
        grow(read, write, step, recursion.momentum, aware, first, *points, *held, block, growth)
        self._turn += updates
        return growth

    def keep(self, index: Integers) -> None:
        """Replace the paths by those at `index`."""
        self._x, self._v, self._s = self._x[index], self._v[index], self._s[index]
        self._version = self._version[index]


@dataclass(frozen=True)
class TypicalGrowth:
    """L(0) as a function of the step; continuous, because all steps share one set of turns.

    Attributes
    ----------
    recursion
        The recursion.
    read
        Slots read, shape (paths, updates).
    start_up
        Updates not counted.
    """

    recursion: Recursion
    read: Integers
    start_up: int

    @classmethod
    def draw(
        cls, recursion: Recursion, paths: int, updates: int, start_up: int, rng: np.random.Generator
    ) -> TypicalGrowth:
        """Draw the turns."""
        read = recursion.turns(paths, rng).several(start_up + updates)
        return cls(recursion, read, start_up)

    def part(self, paths: int) -> TypicalGrowth:
        """Return the same function along the first `paths` paths."""
        return TypicalGrowth(self.recursion, self.read[:paths], self.start_up)

    def staleness(self) -> Integers:
        """Return the staleness of the counted updates, shape (paths, updates)."""
        from analysis.models.compiled import ages_at_use

        version = np.zeros((len(self.read), self.recursion.slots), dtype=np.int64)
        age = np.empty_like(self.read)
        ages_at_use(self.read, version, age)
        return age[:, self.start_up :]

    def __call__(self, step: float) -> float:
        """Return the estimate of L(0)."""
        return float(self.of_paths(step).mean())

    def of_paths(self, step: float) -> Array:
        """Return an independent estimate from each path, shape (paths,)."""
        paths, block = Paths(self.recursion, len(self.read)), block_of(self.recursion)
        paths.follow(np.ascontiguousarray(self.read[:, : self.start_up]), step)
        late = np.ascontiguousarray(self.read[:, self.start_up :])
        return tapered_mean(paths.follow(late, step, block).T) / block


def mean_square_growth(
    recursion: Recursion,
    step: float,
    *,
    paths: int,
    updates: int,
    start_up: int,
    rng: np.random.Generator,
) -> float:
    """Return an estimate of L(2) from `updates` updates after the start-up.

    Go with the winners (Grassberger, 2002): the mean squared growth between two resamplings is an
    unbiased factor of E |x_k|^2.
    """
    turns, points = recursion.turns(paths, rng), Paths(recursion, paths)
    weight, total, grown = np.zeros(paths), 0.0, []
    block = block_of(recursion)
    for _ in range(-(-(start_up + updates) // block)):
        weight += 2.0 * points.follow(turns.several(block), step)[:, 0]
        grown.append(total + _log_mean(weight))
        share = np.exp(weight - weight.max())
        share /= share.sum()
        if 1.0 / (share @ share) < paths / 2:
            total = grown[-1]
            at = (np.arange(paths) + rng.random()) / paths
            index = np.searchsorted(np.cumsum(share)[:-1], at, "right")
            points.keep(index)
            turns.keep(index)
            weight = np.zeros(paths)
    counted = np.array(grown[start_up // block :])
    return float(tapered_mean(np.diff(counted))) / block


def _log_mean(weight: Array) -> float:
    top = float(weight.max())
    return top + float(np.log(np.mean(np.exp(weight - top))))
