"""Replay of runs whose workers make local steps or compress what they push (ours).

Each path replays every push of the record: H steps of the local rule from the version that its
worker read, each with the noise of one mini-batch, (D1) of `asgd.local_steps`, then the compression
with error feedback, (K1) of `asgd.compression`. The server's rule applies the push, or the mean of
several. The state of a worker continues or is reset as in the record.

Noise is Gaussian. Under a compression it is that of a mini-batch instead, because its tails matter
then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from analysis.models.blocks import PathModel
from analysis.models.descent import Descent
from analysis.models.recorded_batches import RecordedBatches, RedrawnBatches
from analysis.models.replay import Replayed, Replays
from asgd.arrays import Array, Integers
from asgd.local_steps import PushRule
from asgd.rules.base import Rule
from asgd.simulation.replay import Gradients


@dataclass(frozen=True, eq=False)
class RecordedPushes:
    """The pushes of recorded runs.

    Attributes
    ----------
    rule
        Makes the rule of the pushes for one replay; it keeps state.
    runs
        The pushes of each run.
    feature
        The configuration key by which a push is not a gradient.
    """

    rule: Callable[[], PushRule]
    runs: tuple[Gradients, ...]
    feature: str


class PushReplay(Replayed):
    """A block of paths that replay the recorded pushes of one run."""

    def __init__(
        self,
        descent: Descent,
        x: Array,
        rng: np.random.Generator,
        *,
        push_rule: Callable[[], PushRule],
        pushes: Gradients,
        last_read: Integers,
        rule: Rule,
        batches: RecordedBatches | None,
    ) -> None:
        super().__init__(descent, pushes.read_version, last_read, rule, x, rng)
        self.batches = RedrawnBatches(batches, rng) if batches else None
        self.push_rule, self.pushes = push_rule(), pushes
        self.batch_size = (pushes.batch_size / self.push_rule.steps).tolist()  # of each push

    def versions(self, k: int) -> list[int]:
        """Return the versions that the pushes of update k read."""
        rows = slice(*self.pushes.starts[k : k + 2].tolist())
        read: list[int] = self.read_version[rows].tolist()
        return read

    def step(self, k: int) -> None:
        """Apply update k, the mean of its pushes."""
        pushes = self.pushes
        rows = range(*pushes.starts[k : k + 2].tolist())
        total = sum(
            self.push_rule.push(
                int(pushes.worker[row]),
                int(pushes.sequence[row]),
                start,
                partial(self._gradient, row),
            )
            for row, start in zip(rows, self.read(k), strict=True)
        )
        self.use(np.asarray(total) / np.asarray(len(rows), self.x.dtype), k)

    def _gradient(self, row: int, step: int, x: Array) -> Array:
        if self.batches is not None:
            return self.batches.gradient_of(self.problem, x, row)
        if self.push_rule.compresses:
            return self.batch_gradient(x, row)
        return self.sampled_gradient(x, row)


def push_replay_paths(
    descent: Descent,
    pushes: RecordedPushes,
    rule: Rule,
    batches: Sequence[RecordedBatches] | None = None,
) -> PathModel:
    """Return the model that replays the pushes of recorded runs, with other noise.

    Parameters
    ----------
    descent
        With the learning rate of the server; the batch size is that of each push.
    pushes
        Of one run, or of several, which share the paths.
    rule
        Of the server.
    batches
        Of each run, to draw batches as it did; default independent draws from all samples.
    """
    updates, push_rule = len(descent.learning_rate), pushes.rule()
    makers, copies = [], 0
    own_batches = [None] * len(pushes.runs) if batches is None else batches
    for run, drawn in zip(pushes.runs, own_batches, strict=True):
        rows = int(run.starts[updates])
        last_read = np.full(updates + 1, -1)
        made = np.repeat(np.arange(updates), np.diff(run.starts[: updates + 1]))
        np.maximum.at(last_read, run.read_version[:rows], made)
        read = np.flatnonzero(last_read >= 0)
        held = np.bincount(read, minlength=updates + 1)[:-1].cumsum()
        held -= np.bincount(last_read[read], minlength=updates).cumsum()
        own = push_rule.vectors(len(np.unique(run.worker[:rows])))
        copies = max(copies, int(held.max()) + 6 + own + len(rule.state) + rule.scratch)
        makers.append(
            partial(
                PushReplay,
                descent,
                push_rule=pushes.rule,
                pushes=run,
                last_read=last_read,
                rule=rule,
                batches=drawn,
            )
        )
    block = partial(Replays, descent, makers) if len(makers) > 1 else makers[0]
    return PathModel(block, "push_replay", copies, len(makers))
