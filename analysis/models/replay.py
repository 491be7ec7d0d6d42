"""Trace replay: (G1) with the measured staleness of every update (ours)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Unpack, cast

import numpy as np
import numpy.typing as npt

from analysis.models.blocks import Block, PathModel
from analysis.models.descent import Descent, DescentBlock, SampledDescent
from analysis.models.ensemble import Ensemble, PathOptions, PerUpdate, run_ensembles
from analysis.models.recorded_batches import RecordedBatches, RedrawnBatches
from asgd.arrays import Array, Integers
from asgd.errors import InputError
from asgd.problems.base import Problem
from asgd.rules.base import Optimizer, Rule
from asgd.rules.sgd import Sgd
from asgd.staleness.values import whole_numbers
from asgd.streams import Seed


class Replayed(DescentBlock):
    """The state of paths with the reads of a run; keeps only points that a later update reads."""

    def __init__(
        self,
        descent: Descent,
        read_version: Integers,
        last_read: Integers,
        rule: Rule,
        x: Array,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(descent, x, rng)
        self.optimizer = Optimizer(rule, x)
        self.read_version, self.last_read = read_version, last_read
        self.snapshots = {0: x.copy()}

    def versions(self, k: int) -> list[int]:
        """Return the versions that update k reads."""
        read: list[int] = self.read_version[k].tolist()
        return read

    def read(self, k: int) -> list[Array]:
        """Return the points at the versions that update k reads."""
        return [self.snapshots[version] for version in self.versions(k)]

    def use(self, gradient: Array, k: int) -> None:
        """Apply the gradient of update k, shape (paths, d)."""
        versions = self.versions(k)
        oldest = min(versions)
        read = self.snapshots[oldest]
        for version in set(versions):
            if self.last_read[version] == k:
                del self.snapshots[version]
        self.optimizer.apply(self.x, gradient, self.learning_rate[k], k, k - oldest, read)
        if self.last_read[k + 1] >= 0:
            self.snapshots[k + 1] = self.x.copy()


class SampledReplay(Replayed, SampledDescent):
    """A block of paths of x_{k+1} = x_k - eta (grad f(x_{k - tau_k}) + xi_k), xi_k ~ N(0, S/b).

    The noise may be that of a mini-batch (`sampled_gradient`). It is drawn when a gradient is used,
    so two reads of one version have independent noise, as with two workers. An update with several
    reads takes the mean of such gradients.
    """

    def apply(self, gradients: Iterator[Array], k: int) -> None:
        """Apply the mean of the gradients at the versions that update k reads."""
        each = self.read_version.shape[1]
        sample = next(gradients)
        if each > 1:
            sample = sample / each  # new memory, because the problem may reuse its own
            for gradient in gradients:
                sample += gradient / each
        self.use(sample, k)


class RedrawnReplay(Replayed):
    """A block of paths like `SampledReplay`, with `batches` drawn as in the run."""

    def __init__(
        self,
        descent: Descent,
        read_version: Integers,
        last_read: Integers,
        rule: Rule,
        batches: RecordedBatches,
        x: Array,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(descent, read_version, last_read, rule, x, rng)
        self.batches = RedrawnBatches(batches, rng)

    def step(self, k: int) -> None:
        """Apply update k at the versions that the trace reads."""
        self.use(self.batches.gradient(self.problem, self.read(k), k), k)


class Replays(DescentBlock):
    """A block of paths divided among several recorded runs; each path replays one.

    Parameters
    ----------
    makers
        Make the block of each run.
    run
        The run of each path, ascending.
    """

    replays: list[Any]

    def __init__(
        self,
        descent: Descent,
        makers: Sequence[Callable[[Array, np.random.Generator], Block]],
        x: Array,
        rng: np.random.Generator,
        run: Integers,
    ) -> None:
        super().__init__(descent, x, rng)
        chosen, first = np.unique(run, return_index=True)
        parts = zip(chosen, np.split(x, first[1:]), strict=True)
        self.replays = [makers[i](part, rng) for i, part in parts]

    def step(self, k: int) -> None:
        """Apply update k of every run."""
        for replay in self.replays:
            replay.step(k)


class SampledReplays(SampledDescent, Replays):
    """`Replays` of blocks that sample."""

    replays: list[SampledReplay]

    def read(self, k: int) -> list[Array]:
        """Return the points of every replay, one after another."""
        return [x for replay in self.replays for x in replay.read(k)]

    def apply(self, gradients: Iterator[Array], k: int) -> None:
        """Apply to every replay its own gradients."""
        for replay in self.replays:
            replay.apply(islice(gradients, replay.read_version.shape[1]), k)


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

    >>> staleness = run.trace["staleness"]
    >>> analysis.sme_replay(problem, 0.05, staleness, paths=64, seed=0).loss_mean.shape
    (301,)

    Arguments that are not listed are those of `sme_asgd`.

    Parameters
    ----------
    staleness
        tau_0, tau_1, ..., whole numbers with 0 <= tau_k <= k; or such a sequence for each of
        several runs, which share the paths evenly. In an array of shape (updates, each), row k has
        the staleness of each gradient in the mean of update k; `batch_size` is that of each.
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
    if updates is None:
        updates = min(len(tau) for tau in _sequences(staleness))
    descent = Descent.of(problem, learning_rate, batch_size, updates)
    model = replay_paths(descent, staleness, rule, batches)
    return run_ensembles([model], problem, updates, paths, seed, **options)[0]


def replay_paths(
    descent: Descent,
    staleness: npt.ArrayLike | Sequence[npt.ArrayLike],
    rule: Rule | None = None,
    batches: Sequence[RecordedBatches] | None = None,
) -> PathModel:
    """Return the model of `sme_replay` to simulate with others; arguments and errors as there."""
    sequences, updates = _sequences(staleness), len(descent.learning_rate)
    makers: list[Any] = []
    copies, rule = 0, rule or Sgd()
    own = [None] * len(sequences) if batches is None else batches
    for tau, drawn in zip(sequences, own, strict=True):
        read_version = _read_versions(tau, updates)
        last_read = np.full(updates + 1, -1)
        np.maximum.at(last_read, read_version, np.arange(updates)[:, np.newaxis])
        held = np.cumsum(np.bincount(np.unique(read_version), minlength=updates + 1))[:-1]
        held -= np.cumsum(np.bincount(last_read[last_read >= 0], minlength=updates))
        copies = max(copies, int(held.max()) + 4 + max(1, len(rule.state) + rule.scratch - 1))
        common = (descent, read_version, last_read, rule)
        makers.append(
            partial(SampledReplay, *common)
            if drawn is None
            else partial(RedrawnReplay, *common, drawn)
        )
    block = makers[0]
    if len(makers) > 1:
        block = partial(Replays if batches else SampledReplays, descent, makers)
    return PathModel(block, "sme_replay", copies, len(makers))


def _sequences(staleness: npt.ArrayLike | Sequence[npt.ArrayLike]) -> list[Integers]:
    """Return the staleness of each run, shape (updates, each)."""
    several = isinstance(staleness, Sequence) and len(staleness) > 0 and np.ndim(staleness[0]) > 0
    given: Sequence[Any] = cast(Sequence[Any], staleness) if several else [staleness]
    return [_checked(tau) for tau in given]


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
