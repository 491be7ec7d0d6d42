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

from analysis.profile.queueing import ServerTimes
from asgd.arrays import Array, Integers
from asgd.staleness import StalenessLaw


class Turns(Protocol):
    """The point that each path uses next and replaces by the new one."""

    def next(self) -> Integers:
        """Return the slot each path reads, shape (paths,), and advance one update."""

    def keep(self, index: Integers) -> None:
        """Replace the paths by those at `index`, shape (paths,)."""


TurnMaker = Callable[[int, np.random.Generator], Turns]


class QueueTurns:
    """Turns by the times of a server: the first to arrive is next."""

    def __init__(self, server: ServerTimes, paths: int, rng: np.random.Generator) -> None:
        self.rng, self._server = rng, server
        shape = paths, server.workers
        worker = np.tile(np.arange(server.workers), paths)
        seconds = server.times.draw_each(worker, rng) + server.dead_time
        self._arrival = seconds.reshape(shape) * rng.random(shape)
        self._since = np.zeros(shape, dtype=np.int64)
        self._now, self._turn = np.zeros(paths), 0

    def next(self) -> Integers:
        """Return the snapshot each path uses, shape (paths,), and schedule its next arrival."""
        from analysis.models.compiled import come_again, first_come

        slot, server = np.empty(len(self._now), dtype=np.int64), self._server
        first_come(self._arrival, self._since, slot)
        seconds = server.times.draw_each(slot, self.rng)
        self._turn += 1
        queue = self._arrival, self._since, self._now
        come_again(*queue, slot, seconds, server.dead_time, server.service_time, self._turn)
        return slot

    def keep(self, index: Integers) -> None:
        """Replace the paths by those at `index`, shape (paths,)."""
        self._arrival, self._since = self._arrival[index], self._since[index]
        self._now = self._now[index]


class IndependentLags:
    """Independent lags from the law; the last points are kept in a ring."""

    def __init__(self, law: StalenessLaw, length: int, paths: int, rng: np.random.Generator):
        self.rng, self._length, self._paths, self._turn = rng, length, paths, 0
        self._below = np.cumsum(law.weights(length))[:-1]

    def next(self) -> Integers:
        """Return the slot of the point each path reads, shape (paths,)."""
        lag = np.searchsorted(self._below, self.rng.random(self._paths), "right")
        place: Integers = (self._turn - lag) % self._length
        self._turn += 1
        return place

    def keep(self, index: Integers) -> None:
        """Replace the paths by those at `index`; they have no turns, so nothing changes."""


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

    turns: TurnMaker
    slots: int
    momentum: float = 0.0
    staleness_aware: bool = False
    circular: bool = False

    def draw(self, turns: Turns, updates: int) -> Integers:
        """Return the slots read in the next updates, shape (paths, updates)."""
        return np.ascontiguousarray(np.stack([turns.next() for _ in range(updates)], axis=1))


class Paths:
    """The points of some paths of a recursion, initially one."""

    def __init__(self, recursion: Recursion, paths: int) -> None:
        self._recursion, self._turn = recursion, 0
        self._x, self._v = np.ones(paths), np.zeros(paths)
        self._s = np.ones((paths, recursion.slots))
        self._version = np.zeros(self._s.shape, dtype=np.int64)

    def follow(self, read: Integers, step: float) -> Array:
        """Return the log growth of each path along these turns, shape (paths,)."""
        from analysis.models.compiled import grow

        recursion, updates = self._recursion, read.shape[1]
        write = read
        if recursion.circular:
            places = (self._turn + 1 + np.arange(updates)) % recursion.slots
            write = np.ascontiguousarray(np.broadcast_to(places, read.shape))
        growth = np.zeros(len(read))
        aware, first = recursion.staleness_aware, self._turn
        points = self._x, self._v, self._s, self._version
        grow(read, write, step, recursion.momentum, aware, first, *points, growth)
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
        turns = recursion.turns(paths, rng)
        return cls(recursion, recursion.draw(turns, start_up + updates), start_up)

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
        paths = Paths(self.recursion, len(self.read))
        paths.follow(np.ascontiguousarray(self.read[:, : self.start_up]), step)
        late = np.ascontiguousarray(self.read[:, self.start_up :])
        growth: Array = paths.follow(late, step) / late.shape[1]
        return growth


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
    weight, total, begun = np.zeros(paths), 0.0, 0.0
    block = max(1, min(recursion.slots // 2, 16))
    start_up, blocks = -(-start_up // block), -(-updates // block)
    for number in range(start_up + blocks):
        if number == start_up:
            begun = total + _log_mean(weight)
        weight += 2.0 * points.follow(recursion.draw(turns, block), step)
        share = np.exp(weight - weight.max())
        share /= share.sum()
        if 1.0 / (share @ share) < paths / 2:
            total += _log_mean(weight)
            at = (np.arange(paths) + rng.random()) / paths
            index = np.searchsorted(np.cumsum(share)[:-1], at, "right")
            points.keep(index)
            turns.keep(index)
            weight = np.zeros(paths)
    return (total + _log_mean(weight) - begun) / (blocks * block)


def _log_mean(weight: Array) -> float:
    top = float(weight.max())
    return top + float(np.log(np.mean(np.exp(weight - top))))
