"""The discrete algorithms themselves, many paths at once: what the models are compared with.

Every update of every path draws its own sample indices; nothing here is Gaussian.
"""

from __future__ import annotations

from functools import partial
from typing import Unpack

import numpy as np
import numpy.typing as npt

from analysis.models.ensemble import Ensemble, PathOptions, PerUpdate, per_update, run_ensemble
from analysis.models.history import History
from asgd.arguments import count, number
from asgd.errors import InputError
from asgd.problems.base import Array, Problem
from asgd.staleness import StalenessLaw
from asgd.staleness.law import a_law
from asgd.streams import Seed

Schedule = npt.NDArray[np.float64]

# Lags beyond this tail mass read the oldest point kept: no run meets one in 1e9 updates.
LAG_TAIL = 1e-9


class SampledGradients:
    """Gradients over batches drawn uniformly with replacement, one batch for each path."""

    def __init__(self, problem: Problem, batch_size: Schedule, rng: np.random.Generator) -> None:
        if np.any(batch_size != np.floor(batch_size)):
            raise InputError(f"batch_size: {batch_size}; accepted: whole numbers of samples")
        self.problem, self.rng = problem, rng
        self.batch_size = batch_size.astype(np.int64)

    def at(self, x: Array, k: int) -> Array:
        """Return the gradient of update k at the points x, shape (paths, d)."""
        shape = (len(x), int(self.batch_size[k]))
        return self.problem.gradient(x, self.rng.integers(self.problem.n_samples, size=shape))


class AsgdIid:
    """A block of paths of (A1): x' = x - eta grad f_gamma(x_{k - tau}), tau i.i.d. of any law."""

    def __init__(
        self,
        problem: Problem,
        learning_rate: Schedule,
        law: StalenessLaw,
        length: int,
        batch_size: Schedule,
        x: Array,
        rng: np.random.Generator,
    ) -> None:
        self.gradients = SampledGradients(problem, batch_size, rng)
        self.learning_rate, self.law, self.rng = learning_rate, law, rng
        self.x = x
        self.past = History(law.weights(length), x)

    def step(self, k: int) -> None:
        """Draw a lag and a batch for each path and apply their gradients."""
        lag = np.minimum(self.law.rvs(len(self.x), self.rng), self.past.length - 1)
        self.x -= self.learning_rate[k] * self.gradients.at(self.past.pick(lag), k)
        self.past.push(self.x)

    def position(self) -> Array:
        """Return x, shape (paths, d)."""
        return self.x


class AsgdServer:
    """A block of paths of a parameter server with P memoryless workers of equal rates.

    Each worker holds a snapshot; the next to push is uniform, and leaves with the new one.
    """

    def __init__(
        self,
        problem: Problem,
        learning_rate: Schedule,
        workers: int,
        batch_size: Schedule,
        x: Array,
        rng: np.random.Generator,
    ) -> None:
        self.gradients = SampledGradients(problem, batch_size, rng)
        self.learning_rate, self.rng = learning_rate, rng
        self.x = x
        self.snapshots = np.tile(x, (workers, 1, 1))
        self._path = np.arange(len(x))

    def step(self, k: int) -> None:
        """Apply the gradient of one worker of each path and hand it the new point."""
        worker = self.rng.integers(len(self.snapshots), size=len(self.x))
        used = self.snapshots[worker, self._path]
        self.x -= self.learning_rate[k] * self.gradients.at(used, k)
        self.snapshots[worker, self._path] = self.x

    def position(self) -> Array:
        """Return x, shape (paths, d)."""
        return self.x


class MomentumSgd:
    """A block of paths of v' = zeta v - eta grad f_gamma(x), x' = x + v'; zeta = 0 is SGD."""

    def __init__(
        self,
        problem: Problem,
        learning_rate: Schedule,
        zeta: float,
        batch_size: Schedule,
        x: Array,
        rng: np.random.Generator,
    ) -> None:
        self.gradients = SampledGradients(problem, batch_size, rng)
        self.learning_rate, self.zeta = learning_rate, zeta
        self.x, self.v = x, np.zeros_like(x)

    def step(self, k: int) -> None:
        """Apply one batch gradient at the current point of each path."""
        self.v *= self.zeta
        self.v -= self.learning_rate[k] * self.gradients.at(self.x, k)
        self.x += self.v

    def position(self) -> Array:
        """Return x, shape (paths, d)."""
        return self.x


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
        If an argument cannot be used.
    """
    eta = per_update(learning_rate, updates, "learning_rate")
    batch = per_update(batch_size, updates, "batch_size")
    length = min(a_law(law).support_length(LAG_TAIL), updates + 1)
    block = partial(AsgdIid, problem, eta, law, length, batch)
    return run_ensemble(block, problem, updates, paths, seed, "asgd_iid", length + 4, **options)


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
    """Run ASGD as a parameter server with memoryless workers does; staleness is geometric.

    Its lags depend on each other, as every snapshot is used exactly once: mu = 1 - 1/workers.

    Parameters
    ----------
    workers
        P >= 1; all start from x_0. The others as in `asgd_iid`.
    """
    workers = count(workers, "workers")
    eta = per_update(learning_rate, updates, "learning_rate")
    batch = per_update(batch_size, updates, "batch_size")
    block = partial(AsgdServer, problem, eta, workers, batch)
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

    Parameters
    ----------
    zeta
        Share of the velocity kept, in [0, 1). The others as in `asgd_iid`.
    """
    number(zeta, "zeta", least=0.0, below=1.0)
    eta = per_update(learning_rate, updates, "learning_rate")
    batch = per_update(batch_size, updates, "batch_size")
    block = partial(MomentumSgd, problem, eta, zeta, batch)
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
    """Run SGD without staleness, arguments as in `asgd_iid`."""
    return momentum_sgd(
        problem, learning_rate, 0.0, updates, paths, seed, batch_size=batch_size, **options
    )
