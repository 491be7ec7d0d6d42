"""Mini-batches drawn as a run drew them, for paths that share its workers and their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from asgd.arrays import Array, Integers
from asgd.problems.base import Problem
from asgd.rundir.reader import Run
from asgd.shards import Shards
from asgd.simulation.replay import Gradients


@dataclass(frozen=True, eq=False)
class RecordedBatches:
    """The workers, sizes and positions of the batches of a run.

    Attributes
    ----------
    gradients
        All gradients of the run.
    shards
        The parts of the samples.
    by_epochs
        Whether the samples of a part are used once an epoch, not drawn with replacement.
    each
        Batches of a row: one, or one for each local step.
    """

    gradients: Gradients
    shards: Shards
    by_epochs: bool
    each: int

    @classmethod
    def of(cls, run: Run, problem: Problem) -> RecordedBatches:
        """Take the batches from a run."""
        by_epochs = run.config.data.sampling == "epoch"
        each = run.config.optimizer.gradients_per_push
        return cls(Gradients.of(run), Shards.of(run.config, problem), by_epochs, each)

    @cached_property
    def last_use(self) -> dict[tuple[int, int], int]:
        """The last gradient of each (part, epoch), by its row."""
        return {self.epoch(row)[:2]: row for row in range(len(self.gradients.worker))}

    def epoch(self, row: int) -> tuple[int, int, int]:
        """Return the part of a gradient, its epoch, and the place of its first sample there."""
        part = self.shards.part_of(int(self.gradients.worker[row]))
        epoch, first = divmod(int(self.gradients.position[row]), self.shards.size(part))
        return part, epoch, first


class RedrawnBatches:
    """Batches of a block of paths, with the workers and sizes of a run but other samples.

    Each path draws its own samples from the part of the worker that computed a gradient, or goes
    through the epochs of the part in its own random orders.

    Parameters
    ----------
    recorded
        The batches of the run.
    rng
        The generator of the block.
    """

    def __init__(self, recorded: RecordedBatches, rng: np.random.Generator) -> None:
        self._recorded, self._rng = recorded, rng
        self._orders: dict[tuple[int, int], Integers] = {}

    def gradient(self, problem: Problem, points: Sequence[Array], k: int) -> Array:
        """Return the gradient of update k for a batch of each path, shape (paths, d).

        If the update is a mean, this is the mean over the batches of its members; there is a point
        for each member, or one for all, shape (paths, d).
        """
        starts = self._recorded.gradients.starts
        rows = range(starts[k], starts[k + 1])
        read = points if len(points) > 1 else list(points) * len(rows)
        members = zip(rows, read, strict=True)
        total = sum(self.gradient_of(problem, x, row) for row, x in members)
        return np.asarray(total) / points[0].dtype.type(len(rows))

    def gradient_of(self, problem: Problem, x: Array, row: int) -> Array:
        """Return the gradient for one batch of a row of the gradients, shape (paths, d)."""
        found = problem.gradient(x, self._batches(row, len(x)))
        return found.astype(x.dtype, copy=False)

    def _batches(self, row: int, paths: int) -> Integers:
        recorded = self._recorded
        worker = int(recorded.gradients.worker[row])
        size = int(recorded.gradients.batch_size[row]) // recorded.each
        if not recorded.by_epochs:
            return recorded.shards.choose(worker, (paths, size), self._rng)
        part, epoch, first = recorded.epoch(row)
        orders = self._orders.pop((part, epoch), None)
        if orders is None:
            samples = np.tile(recorded.shards.samples(part), (paths, 1))
            orders = self._rng.permuted(samples, axis=1)
        if recorded.last_use[part, epoch] > row:
            self._orders[part, epoch] = orders
        batches: Integers = orders[:, first : first + size]
        return batches
