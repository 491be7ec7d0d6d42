"""What workers push: the gradient of a mini-batch or the change made by local steps, compressed.

With `optimizer.local_steps` H, a worker starts at its snapshot x, makes H steps of its local rule,
each on a mini-batch of its own, and pushes the pseudo-gradient

    x - x_H,                                                                                 (D1)

which the server applies like a gradient (McMahan, Moore, Ramage, Hampson, Arcas, *Communication-
efficient learning of deep networks from decentralized data*, 2017; Douillard et al., *DiLoCo*,
2023). Local step j of push s of a worker draws the batch with the number s H + j of its stream.

If the state of the local rule is kept, push s continues with the state after push s - 1 of the same
worker. A missing number means that a gradient or a state was lost, and the state is reset. So a
replay needs only the recorded numbers. The same holds for the rest that a compression leaves
(`asgd.compression`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from asgd.arrays import Array, Integers, converted, number_type, sent_as
from asgd.compression import SCRATCH, ErrorFeedback, compression_of
from asgd.config.tables import RunConfig
from asgd.problems.base import Indices, Problem, gradient_of_batch
from asgd.rules.base import Optimizer, Rule
from asgd.rules.make import make_local_rule

_FEW = 8  # for fewer gradients, single draws are faster than array code


class Draws(Protocol):
    """The batches of workers, see `asgd.draws.WorkerDraws`."""

    def batch(self, worker: int, number: int, size: int, position: int, /) -> Indices:
        """Return the sample numbers of a gradient of a worker, shape (size,)."""

    def batches(self, worker: Integers, number: Integers, size: int, /) -> Indices:
        """Return the sample numbers of a gradient of each of these workers, (gradients, size)."""


@dataclass
class LocalState:
    """The state of a local rule between two pushes.

    Attributes
    ----------
    optimizer
        The rule with its arrays.
    steps
        Steps made since the arrays were new.
    following
        Number of the push that continues from this state.
    """

    optimizer: Optimizer
    steps: int
    following: int


class LocalSteps:
    """Makes the steps of workers by a local rule.

    Parameters
    ----------
    rule, learning_rate
        The local rule.
    steps
        H.
    keeps
        Whether the state of the rule is kept from push to push.
    """

    def __init__(self, rule: Rule, learning_rate: float, steps: int, keeps: bool) -> None:
        self.rule, self.learning_rate, self.steps = rule, learning_rate, steps
        self.keeps = keeps and bool(rule.state)
        self._states: dict[int, LocalState] = {}

    @classmethod
    def of(cls, config: RunConfig) -> LocalSteps | None:
        """Return the local steps of a run; None if it has none."""
        optimizer, rule = config.optimizer, make_local_rule(config)
        if rule is None or optimizer.local is None:
            return None
        rate, keeps = optimizer.local.learning_rate, optimizer.local_state == "keep"
        return cls(rule, rate, optimizer.gradients_per_push, keeps)

    def difference(
        self, worker: int, sequence: int, start: Array, gradient: Callable[[int, Array], Array]
    ) -> Array:
        """Return the change made by H steps, (D1).

        Parameters
        ----------
        worker, sequence
            The worker, and the number of its push; pushes of a worker come in order.
        start
            Where the steps start, shape (d,), or (paths, d) for as many workers or paths.
        gradient
            Returns the gradient of local step j at a point, of the shape of `start`.

        Returns
        -------
        Array
            x - x_H, of the shape of `start`; new memory.
        """
        change = np.zeros_like(start)
        state = self._states.get(worker) if self.keeps else None
        if state is None or state.following != sequence:
            state = LocalState(Optimizer(self.rule, start), 0, 0)
        point, apply, rate = start, state.optimizer.apply, self.learning_rate
        for j in range(self.steps):
            found = gradient(j, point)
            if self.rule.additive:
                # Summed apart from x, the difference is not rounded to the precision of x, and one
                # step of SGD is eta g to the last bit.
                apply(change, found, rate, state.steps, 0)
                if j + 1 < self.steps:
                    point = start + change
            else:
                point = point.copy() if point is start else point
                apply(point, found, rate, state.steps, 0)
            state.steps += 1
        if self.keeps:
            state.following = sequence + 1
            self._states[worker] = state
        return np.negative(change, out=change) if self.rule.additive else start - point


def not_a_gradient(config: RunConfig) -> str | None:
    """Return the key by which a push is not the gradient of a batch, or None.

    Theory and plans are about gradients.
    """
    if config.optimizer.local_steps is not None:
        return f"optimizer.local_steps = {config.optimizer.local_steps}"
    compression = config.cluster.compression
    return None if compression == "none" else f"cluster.compression = {compression!r}"


class PushRule:
    """Makes a push of gradients: by the local steps of a run, then by its compression.

    Parameters
    ----------
    local
        The local steps, None if a push is one gradient.
    feedback
        Compresses pushes, None if they are sent whole.
    """

    def __init__(self, local: LocalSteps | None, feedback: ErrorFeedback | None) -> None:
        self._local, self._feedback = local, feedback
        self.steps = 1 if local is None else local.steps
        self.compresses = feedback is not None
        self.keeps = self.compresses or (local is not None and local.keeps)

    @classmethod
    def of(
        cls, config: RunConfig, rounded: Callable[[Array], Array] = lambda vector: vector
    ) -> PushRule:
        """Return the rule of a run; `rounded` rounds what is sent, by default not at all."""
        compression = compression_of(config.cluster)
        feedback = None if compression is None else ErrorFeedback(compression, rounded)
        return cls(LocalSteps.of(config), feedback)

    def vectors(self, workers: int) -> int:
        """Return the vectors that this holds for so many workers, and at most while it works."""
        local, held = self._local, 0
        if local is not None:
            held = len(local.rule.state) * (workers if local.keeps else 1) + local.rule.scratch
        return held + (workers + SCRATCH if self.compresses else 0)

    def push(
        self, worker: int, sequence: int, start: Array, gradient: Callable[[int, Array], Array]
    ) -> Array:
        """Return a push; arguments and shapes are those of `LocalSteps.difference`."""
        local = self._local
        if local is None:
            found = gradient(0, start)
        else:
            found = local.difference(worker, sequence, start, gradient)
        if self._feedback is None or found.shape != start.shape:  # the server refuses the latter
            return found
        return self._feedback.sent(worker, sequence, found)


class Pushes:
    """Computes what workers push.

    Parameters
    ----------
    config
        The run.
    problem
        Its problem.
    draws
        The batches of the workers.
    """

    def __init__(self, config: RunConfig, problem: Problem, draws: Draws) -> None:
        self._problem, self._draws = problem, draws
        self._rule = PushRule.of(config, self._sent)
        self._sent_as = number_type(sent_as(config.cluster.wire_dtype, problem.dtype))

    def push(
        self, worker: int, sequence: int, start: Array, samples: int, position: int = 0
    ) -> Array:
        """Return the push of a worker as the server gets it: `start` and push are rounded as sent.

        Parameters
        ----------
        worker, sequence
            The worker, and the number of its push; pushes of a worker come in order.
        start
            Its snapshot, shape (d,).
        samples
            Number of samples in all of its batches together.
        position
            Position of the first sample in the epochs (`asgd.epochs`); unused without epochs.

        Returns
        -------
        Array
            Shape (d,), in the precision of `start`; the problem may own its memory.
        """
        found = self._push(worker, sequence, self._sent(start), samples, position)
        return self._sent(found)

    def _push(self, worker: int, sequence: int, start: Array, samples: int, position: int) -> Array:
        steps = self._rule.steps
        first, size = sequence * steps, samples // steps
        return self._rule.push(
            worker,
            sequence,
            start,
            lambda j, x: self._gradient(worker, first + j, x, size, position),
        )

    def pushes(
        self, worker: Integers, sequence: Integers, start: Array, samples: int, *, distinct: bool
    ) -> Array:
        """Return `push` for several pushes, shape (pushes, d).

        Parameters
        ----------
        start
            Their snapshots, shape (pushes, d).
        samples
            Number of samples in all batches of one push together.
        distinct
            Whether no worker occurs twice.
        """
        return self._sent(self._pushes(worker, sequence, self._sent(start), samples, distinct))

    def _pushes(
        self, worker: Integers, sequence: Integers, start: Array, samples: int, distinct: bool
    ) -> Array:
        rule = self._rule
        if len(start) == 1:  # the same call as in a real worker
            return self._push(int(worker[0]), int(sequence[0]), start[0], samples, 0)[None]
        if rule.keeps:
            each = zip(worker.tolist(), sequence.tolist(), start, strict=True)
            return np.stack([self._push(*one, samples, 0) for one in each])
        first, size = sequence * rule.steps, samples // rule.steps
        return rule.push(
            0, 0, start, lambda j, x: self._gradients(worker, first + j, x, size, distinct)
        )

    def _sent(self, vectors: Array) -> Array:
        """Return vectors rounded to `cluster.wire_dtype`, in their own precision."""
        if self._sent_as == self._problem.dtype:
            return vectors
        return converted(converted(vectors, self._sent_as), vectors.dtype)

    def _gradient(self, worker: int, number: int, x: Array, size: int, position: int) -> Array:
        indices = self._draws.batch(worker, number, size, position)
        return gradient_of_batch(self._problem, x, indices)

    def _gradients(
        self, worker: Integers, number: Integers, x: Array, size: int, distinct: bool
    ) -> Array:
        if distinct and len(x) >= _FEW:
            batches = self._draws.batches(worker, number, size)
        else:
            addresses = zip(worker.tolist(), number.tolist(), strict=True)
            each = [self._draws.batch(*address, size, 0) for address in addresses]
            batches = np.concatenate(each).reshape(-1, size)
        return converted(self._problem.gradient(x, batches), x.dtype)
