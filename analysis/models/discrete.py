"""The discrete algorithms, many paths at once, to compare the models with.

Every update of every path draws its own sample indices; no noise is Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Unpack

import numpy as np

from analysis.models.blocks import BlockMaker
from analysis.models.descent import Descent, DescentBlock, SampledDescent
from analysis.models.ensemble import Ensemble, PathOptions, PerUpdate, run_ensemble
from analysis.models.history import History, ReadPoints
from asgd.arguments import count, number
from asgd.arrays import Array
from asgd.problems.base import Problem
from asgd.staleness.law import StalenessLaw, checked_law
from asgd.streams import Seed

# Lags beyond this tail mass, one in 1e9 updates, read the oldest kept point.
LAG_TAIL = 1e-9


class AsgdIid(SampledDescent):
    """A block of paths of (A1): x' = x - eta grad f_gamma(x_{k - tau}), tau i.i.d. of any law."""

    def __init__(
        self,
        descent: Descent,
        law: StalenessLaw,
        length: int,
        x: Array,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(descent, x, rng)
        self.law = law
        self.past = History(law.weights(length), x)

    def read(self, k: int) -> list[Array]:
        """Return the point of each path at a drawn lag."""
        lag = np.minimum(self.law.rvs(len(self.x), self.rng), self.past.length - 1)
        return [self.past.pick(lag)]

    def sampled_gradient(self, x: Array, k: int) -> Array:
        """Return the gradient of a mini-batch, for every problem."""
        return self.batch_gradient(x, k)

    def apply(self, gradients: Iterator[Array], k: int) -> None:
        """Apply the gradient and keep the new point."""
        super().apply(gradients, k)
        self.past.push(self.x)


class AsgdIidReads(SampledDescent):
    """`AsgdIid` for many parameters: lags are drawn at the start, unread points are not kept."""

    def __init__(
        self, descent: Descent, law: StalenessLaw, x: Array, rng: np.random.Generator
    ) -> None:
        super().__init__(descent, x, rng)
        updates, paths = len(self.learning_rate), len(x)
        lag = law.rvs(updates * paths, rng).reshape(updates, paths)
        self.past = ReadPoints(np.maximum(np.arange(updates)[:, None] - lag, 0), x)

    def read(self, k: int) -> list[Array]:
        """Return the point of each path that its lag chooses."""
        return [self.past.read(k)]

    def sampled_gradient(self, x: Array, k: int) -> Array:
        """Return the gradient of a mini-batch, for every problem."""
        return self.batch_gradient(x, k)

    def apply(self, gradients: Iterator[Array], k: int) -> None:
        """Apply the gradient and keep the new point."""
        super().apply(gradients, k)
        self.past.keep(k + 1, self.x)


def independent_lags(descent: Descent, law: StalenessLaw) -> tuple[BlockMaker, int]:
    """Return the maker of blocks of (A1), and about how many vectors it holds for each path."""
    updates = len(descent.learning_rate)
    length = min(law.support_length(LAG_TAIL), updates + 1)
    if length * descent.problem.dim <= updates:  # the lags would take more memory
        return partial(AsgdIid, descent, law, length), length + 4
    return partial(AsgdIidReads, descent, law), math.ceil(2 * law.mean()) + 6


class AsgdServer(DescentBlock):
    """A block of paths of a parameter server with P memoryless workers of equal rates.

    Each worker holds a snapshot. The next to push is uniform, and receives the new point.
    """

    def __init__(self, descent: Descent, workers: int, x: Array, rng: np.random.Generator) -> None:
        super().__init__(descent, x, rng)
        self.snapshots = np.tile(x, (workers, 1, 1))
        self._path = np.arange(len(x))

    def step(self, k: int) -> None:
        """Apply the gradient of one worker of each path and hand it the new point."""
        worker = self.rng.integers(len(self.snapshots), size=len(self.x))
        used = self.snapshots[worker, self._path]
        self.descend(self.batch_gradient(used, k), k)
        self.snapshots[worker, self._path] = self.x


class MomentumSgd(DescentBlock):
    """A block of paths of v' = zeta v - eta grad f_gamma(x), x' = x + v'; zeta = 0 is SGD."""

    def __init__(self, descent: Descent, zeta: float, x: Array, rng: np.random.Generator) -> None:
        super().__init__(descent, x, rng)
        self.zeta, self.v = zeta, np.zeros_like(x)

    def step(self, k: int) -> None:
        """Apply one batch gradient at the current point of each path."""
        self.v *= self.zeta
        self.v -= self.learning_rate[k] * self.batch_gradient(self.x, k)
        self.x += self.v


def asgd_iid(
    problem: Problem,
    learning_rate: PerUpdate,
    law: StalenessLaw,
    updates: int,
    paths: int,
    seed: Seed,
    *,
    batch_size: PerUpdate = 1,
    **options: Unpack[PathOptions],
) -> Ensemble:
    """Run ASGD with independent staleness of any law (A1); An, Lu, Ying, section 1.

    Parameters
    ----------
    learning_rate, batch_size
        A number or one for each update; batches share one stale point.
    law
        The staleness law; reads before version 0 read x_0.
    updates, paths
        Numbers of updates and of paths.
    options
        See `run_ensemble`.

    Raises
    ------
    InputError
        If an argument is invalid.
    """
    descent = Descent.of(problem, learning_rate, batch_size, updates)
    block, copies = independent_lags(descent, checked_law(law))
    return run_ensemble(block, problem, updates, paths, seed, "asgd_iid", copies, **options)


def asgd_server(
    problem: Problem,
    learning_rate: PerUpdate,
    workers: int,
    updates: int,
    paths: int,
    seed: Seed,
    *,
    batch_size: PerUpdate = 1,
    **options: Unpack[PathOptions],
) -> Ensemble:
    """Run ASGD on a parameter server with memoryless workers; staleness is geometric.

    Each snapshot is used exactly once, so lags depend on each other; mu = 1 - 1/workers. (P1) has
    its moments (ours).

    Parameters
    ----------
    workers
        P >= 1; all start from x_0. Other arguments as in `asgd_iid`.

    Raises
    ------
    InputError
        If an argument is invalid.
    """
    workers = count(workers, "workers")
    descent = Descent.of(problem, learning_rate, batch_size, updates)
    block = partial(AsgdServer, descent, workers)
    return run_ensemble(block, problem, updates, paths, seed, "asgd_server", workers + 4, **options)


def momentum_sgd(
    problem: Problem,
    learning_rate: PerUpdate,
    zeta: float,
    updates: int,
    paths: int,
    seed: Seed,
    *,
    batch_size: PerUpdate = 1,
    **options: Unpack[PathOptions],
) -> Ensemble:
    """Run momentum SGD from rest, v' = zeta v - eta grad f_gamma(x), x' = x + v'.

    Its limit is (L4); An, Lu, Ying, section 2.1.

    Parameters
    ----------
    zeta
        Factor of the velocity, in [0, 1). Other arguments as in `asgd_iid`.

    Raises
    ------
    InputError
        If an argument is invalid.
    """
    number(zeta, "zeta", least=0.0, below=1.0)
    descent = Descent.of(problem, learning_rate, batch_size, updates)
    block = partial(MomentumSgd, descent, zeta)
    return run_ensemble(block, problem, updates, paths, seed, "momentum_sgd", 4, **options)


def sgd(
    problem: Problem,
    learning_rate: PerUpdate,
    updates: int,
    paths: int,
    seed: Seed,
    *,
    batch_size: PerUpdate = 1,
    **options: Unpack[PathOptions],
) -> Ensemble:
    """Run SGD without staleness, arguments and errors as in `asgd_iid`."""
    return momentum_sgd(
        problem, learning_rate, 0.0, updates, paths, seed, batch_size=batch_size, **options
    )
