"""Paths of a choice: servers in virtual time with the run's own rule and mini-batches (ours).

They repeat a run of the choice many times without workers: turns from `analysis.planning.turns`,
the real snapshots, mini-batches from the data, any update rule. Nothing is assumed small or linear,
so paths show directly whether they stay bounded. A path diverges at the loss where a run would
stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from analysis.planning.turns import ServerTurns, UpdateReads
from asgd.arrays import Array, Integers
from asgd.problems.base import Problem
from asgd.problems.plugin import PluginProblem
from asgd.rules.base import Optimizer, Rule

TurnsOf = Callable[[int, np.random.Generator], ServerTurns]

# Share of the paths: if more diverge, the rest is given up.
_ENOUGH_DIVERGED = 0.25

# Overhead of an update of one path, and of a call of a user's method, in numbers that are processed
# in the same time; and the most numbers that all paths may hold together.
_UPDATE_NUMBERS, _CALL_NUMBERS = 1_000, 20_000
_LARGEST_STATE = 2**27


@dataclass(frozen=True, kw_only=True)
class PathSetting:
    """The common settings of all paths of a choice.

    Attributes
    ----------
    problem, initial
        The problem, and x_0, shape (d,).
    rule
        Update rule that turns gradients into steps.
    learning_rate
        Of each update, shape (updates,).
    batch_size
        Samples per gradient, by version of the snapshot, shape (updates,).
    turns
        Makes the turns of a number of servers.
    record
        Updates to record, ascending from 0, shape (m,).
    largest_loss
        Loss above which a path has diverged.
    dtype
        float64 or float32, the precision of the paths.
    """

    problem: Problem
    initial: Array
    rule: Rule
    learning_rate: Array
    batch_size: Integers
    turns: TurnsOf
    record: Integers
    largest_loss: float
    dtype: npt.DTypeLike


@dataclass(frozen=True)
class PlannedPaths:
    """Losses of some paths.

    Attributes
    ----------
    update
        Shape (m,).
    loss
        Shape (m, paths), nan after a path diverged or after all were given up.
    seconds
        Time of each update, averaged over the paths, shape (m,).
    diverged
        Whether each path diverged, shape (paths,).
    final
        x after the last update, shape (paths, d); diverged paths restarted at x_0.
    """

    update: Integers
    loss: Array
    seconds: Array
    diverged: npt.NDArray[np.bool_]
    final: Array

    @property
    def paths(self) -> int:
        """Number of paths."""
        return int(self.loss.shape[1])

    @property
    def reached(self) -> int:
        """The last recorded update of any path."""
        return int(self.update[np.isfinite(self.loss).any(axis=1)][-1])

    def joined(self, other: PlannedPaths) -> PlannedPaths:
        """Return the paths of both."""
        share = self.paths / (self.paths + other.paths)
        return PlannedPaths(
            self.update,
            np.concatenate([self.loss, other.loss], axis=1),
            share * self.seconds + (1.0 - share) * other.seconds,
            np.concatenate([self.diverged, other.diverged]),
            np.concatenate([self.final, other.final]),
        )


def planned_paths(
    setting: PathSetting,
    paths: int,
    rng: np.random.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> PlannedPaths:
    """Simulate some paths.

    If a quarter of them diverges, the others are given up.

    Parameters
    ----------
    progress
        Called as progress(done, total) at every record.
    """
    record, last = setting.record, int(setting.record[-1])
    loss = np.full((len(record), paths), np.nan)
    seconds = np.full(len(record), np.nan)
    servers, row = _Servers(setting, paths, rng), 0
    # One BLAS thread: products of single paths are too small to share.
    with np.errstate(over="ignore", invalid="ignore"), threadpool_limits(1, user_api="blas"):
        for k in range(last + 1):
            if k == record[row]:
                value = np.asarray(setting.problem.loss(servers.x), dtype=float)
                servers.restart(~(value <= setting.largest_loss))
                loss[row] = np.where(servers.diverged, np.nan, value)
                seconds[row] = servers.turns.seconds.mean()
                row += 1
                if progress is not None:
                    progress(k, last)
                if servers.diverged.mean() > _ENOUGH_DIVERGED:
                    break
            if k < last:
                servers.step(k)
    return PlannedPaths(record, loss, seconds, servers.diverged, servers.x)


class _Servers:
    """A block of servers that advance together, one update at a time."""

    def __init__(self, setting: PathSetting, paths: int, rng: np.random.Generator) -> None:
        self.turns = setting.turns(paths, rng)
        self._setting, self._rng = setting, rng
        self._start = setting.initial.astype(setting.dtype)
        self.x = np.tile(self._start, (paths, 1))
        self.diverged = np.zeros(paths, dtype=bool)
        self._held = np.repeat(self.x[:, None], self.turns.slots, axis=1)
        self._optimizer = Optimizer(setting.rule, self.x)
        self._rate = setting.learning_rate.tolist()
        self._one_size = bool(np.all(setting.batch_size == setting.batch_size[0]))

    def step(self, k: int) -> None:
        """Advance every server from update k to update k + 1."""
        reads = self.turns.next(k)
        points = self._held[reads.path, reads.slot]
        gradient, staleness = self._gradient(points, reads), k - reads.version
        if len(reads.path) > len(self.x):  # average the gradients that are applied together
            first = np.searchsorted(reads.path, np.arange(len(self.x)))
            count = np.diff(first, append=len(reads.path))[:, None]
            gradient = np.add.reduceat(gradient, first) / count.astype(gradient.dtype)
            staleness = np.maximum.reduceat(staleness, first)
        lag = staleness[:, None].astype(gradient.dtype)
        self._optimizer.apply(self.x, gradient, self._rate[k], k, lag, points)
        lost = ~np.isfinite(self.x).all(axis=1)
        if lost.any():
            self.restart(lost)
        self._held[reads.path, reads.new_slot] = self.x[reads.path]

    def restart(self, diverged: npt.NDArray[np.bool_]) -> None:
        """Mark diverged paths and restart them from finite numbers."""
        if not diverged.any():
            return
        self.diverged = self.diverged | diverged
        self.x[diverged] = self._start
        self._held[diverged] = self._start
        rule, state = self._optimizer.rule, self._optimizer.state
        for array, first in zip(state, rule.init(self._start), strict=True):
            array[diverged] = first

    def _gradient(self, points: Array, reads: UpdateReads) -> Array:
        sizes = self._setting.batch_size
        if self._one_size:
            return self._of_batches(points, int(sizes[0]))
        own = sizes[reads.version]
        gradient = np.empty_like(points)
        for size in np.unique(own).tolist():
            chosen = own == size
            gradient[chosen] = self._of_batches(points[chosen], size)
        return gradient

    def _of_batches(self, points: Array, size: int) -> Array:
        problem = self._setting.problem
        batches = self._rng.integers(problem.n_samples, size=(len(points), size))
        return np.asarray(problem.gradient(points, batches), dtype=points.dtype)


def path_count(setting: PathSetting, slots: int, *, numbers: float, fewest: int, most: int) -> int:
    """Return the number of paths; it depends on the choice, not on the machine.

    Parameters
    ----------
    slots
        Snapshots per path.
    numbers
        Total numbers to process: d for each sample of a gradient or of a recorded loss, plus the
        overhead of calls per update.
    """
    problem, updates = setting.problem, len(setting.batch_size)
    samples = float(setting.batch_size.sum()) + len(setting.record) * problem.n_samples
    each = updates * _UPDATE_NUMBERS + samples * problem.dim
    if isinstance(problem, PluginProblem):  # one call per path
        each += updates * _CALL_NUMBERS
    rule = setting.rule
    arrays = slots + 3 + len(rule.state) + rule.scratch  # with x, the points read and gradients
    held = _LARGEST_STATE // (problem.dim * arrays)
    return max(2, min(held, max(fewest, min(most, math.floor(numbers / each)))))
