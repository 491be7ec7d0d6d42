"""Trace replay: (G1) with the measured staleness of every update (ours)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, Unpack, cast

import numpy as np
import numpy.typing as npt

from analysis.models.descent import Descent, DescentBlock
from analysis.models.ensemble import Ensemble, PathOptions, PerUpdate, run_ensemble
from analysis.models.recorded_batches import RecordedBatches, RedrawnBatches
from asgd.arrays import Array, Integers
from asgd.errors import InputError
from asgd.problems.base import Problem
from asgd.rules.base import Optimizer, Rule
from asgd.rules.sgd import Sgd
from asgd.staleness.values import whole_numbers
from asgd.streams import Seed


class Replay(DescentBlock):
    """A block of paths of x_{k+1} = x_k - eta (grad f(x_{k - tau_k}) + xi_k), xi_k ~ N(0, S/b).

    The noise may be that of a mini-batch (`sampled_gradient`), or of `batches` drawn as in a run.
    An update with several reads takes the mean of such gradients, with noise of their own.

    Keeps only points that a later update reads. The gradient is drawn at its use, so two reads of
    one version have independent noise, as with two workers.
    """

    def __init__(
        self,
        descent: Descent,
        read_version: Integers,
        last_read: Integers,
        rule: Rule,
        batches: RecordedBatches | None,
        x: Array,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(descent, x, rng)
        self.batches = RedrawnBatches(batches, rng) if batches else None
        self.optimizer = Optimizer(rule, x)
        self.read_version, self.last_read = read_version, last_read
        self.snapshots = {0: x.copy()}

    def step(self, k: int) -> None:
        """Apply update k at the versions that the trace reads."""
        versions = self.read_version[k].tolist()
        oldest = min(versions)
        sample = self._sample([self.snapshots[version] for version in versions], k)
        read = self.snapshots[oldest]
        for version in set(versions):
            if self.last_read[version] == k:
                del self.snapshots[version]
        self.optimizer.apply(self.x, sample, self.learning_rate[k], k, k - oldest, read)
        if self.last_read[k + 1] >= 0:
            self.snapshots[k + 1] = self.x.copy()

    def _sample(self, points: Sequence[Array], k: int) -> Array:
        """Return the mean of the gradients of update k, one at each point."""
        if self.batches is not None:
            return self.batches.gradient(self.problem, points, k)
        sample = self.sampled_gradient(points[0], k)
        if len(points) > 1:
            sample = sample / len(points)  # new memory: the problem may use its own again
            for point in points[1:]:
                sample += self.sampled_gradient(point, k) / len(points)
        return sample


class Stepping(Protocol):
    """A block of paths."""

    def step(self, k: int, /) -> None:
        """Make update k."""


class Replays:
    """A block of paths divided among several recorded runs; each path replays one."""

    def __init__(
        self,
        makers: Sequence[Callable[[Array, np.random.Generator], Stepping]],
        x: Array,
        rng: np.random.Generator,
    ) -> None:
        self.x = x
        # Blocks are small, so chance decides which runs get one path more.
        chosen = rng.permutation(len(makers))
        parts = np.array_split(x, len(makers))
        self.replays = [
            makers[i](part, rng) for i, part in zip(chosen, parts, strict=True) if len(part)
        ]

    def step(self, k: int) -> None:
        """Apply update k at the versions that the traces read."""
        for replay in self.replays:
            replay.step(k)

    def position(self) -> Array:
        """Return x, shape (paths, d)."""
        return self.x


def sme_replay(
    problem: Problem,
    learning_rate: PerUpdate,
    staleness: npt.ArrayLike | Sequence[npt.ArrayLike],
    paths: int,
    seed: Seed,
    *,
    updates: int | None = None,
    batch_size: PerUpdate = 1,
    rule: Rule | None = None,
    batches: Sequence[RecordedBatches] | None = None,
    **options: Unpack[PathOptions],
) -> Ensemble:
    """Simulate paths that read the same versions as recorded runs did, with Gaussian noise.

    Arguments that are not listed are those of `sme_asgd`.

    Parameters
    ----------
    staleness
        tau_0, tau_1, ..., whole numbers with 0 <= tau_k <= k; or such a sequence for each of
        several runs, which share the paths evenly. In an array of shape (updates, each), row k has
        those of the gradients whose mean is update k; `batch_size` is then that of each.
    updates
        Updates to replay. Default: all of the shortest sequence.
    rule
        Update rule that turns each gradient into a step; default plain SGD.
    batches
        Of each run, to draw batches as it did; default independent draws from all samples.

    Raises
    ------
    InputError
        If a sequence is not staleness, or another argument is invalid.
    """
    several = isinstance(staleness, Sequence) and len(staleness) > 0 and np.ndim(staleness[0]) > 0
    given: Sequence[Any] = cast(Sequence[Any], staleness) if several else [staleness]
    sequences = [_checked(tau) for tau in given]
    updates = min(len(tau) for tau in sequences) if updates is None else updates
    descent = Descent.of(problem, learning_rate, batch_size, updates)
    makers, copies, rule = [], 0, rule or Sgd()
    own = [None] * len(sequences) if batches is None else batches
    for tau, drawn in zip(sequences, own, strict=True):
        read_version = _read_versions(tau, updates)
        last_read = np.full(updates + 1, -1)
        np.maximum.at(last_read, read_version, np.arange(updates)[:, np.newaxis])
        held = np.cumsum(np.bincount(np.unique(read_version), minlength=updates + 1))[:-1]
        held -= np.cumsum(np.bincount(last_read[last_read >= 0], minlength=updates))
        copies = max(copies, int(held.max()) + 4 + max(1, len(rule.state) + rule.scratch - 1))
        makers.append(partial(Replay, descent, read_version, last_read, rule, drawn))
    block = partial(Replays, makers) if several else makers[0]
    return run_ensemble(
        block, problem, updates, paths, seed, "sme_replay", copies, len(makers), **options
    )


def _checked(staleness: npt.ArrayLike) -> Integers:
    """Return staleness as whole numbers, shape (updates, each)."""
    several = isinstance(staleness, np.ndarray) and staleness.ndim == 2
    shape = np.shape(staleness) if several else (-1, 1)
    flat = np.ravel(staleness) if several else staleness
    return whole_numbers(flat, "staleness").reshape(shape)


def _read_versions(tau: Integers, updates: int) -> Integers:
    """Return the versions that each update reads, shape (updates, each)."""
    if not 0 < updates <= len(tau):
        raise InputError(f"staleness.shape = ({len(tau)},): expected ({updates},) or longer")
    version: Integers = np.arange(updates)[:, np.newaxis] - tau[:updates]
    bad = np.argwhere(version < 0)
    if bad.size:
        k, one = bad[0].tolist()
        raise InputError(f"staleness[{k}] = {tau[k, one]}: expected a whole number from 0 to {k}")
    return version
