"""Update rules: pairs of pure functions (init, update) that turn a gradient into a step.

The server applies `x <- x - step`. `update` returns the step and the next state. It does not modify
its gradient or its state, and writes the step into `out` if given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from asgd.arrays import Array
from asgd.config import OptimizerConfig

State = tuple[Array, ...]


class Update(Protocol):
    """Turns one gradient into one step."""

    def __call__(
        self,
        gradient: Array,
        state: State,
        *,
        learning_rate: float,
        staleness: int,
        out: Array | None = None,
    ) -> tuple[Array, State]:
        """Return the step, shape (d,), and the next state."""
        ...


class Rule(NamedTuple):
    """An update rule.

    Attributes
    ----------
    init
        Returns the state before the first update, given x_0 of shape (d,).
    update
        Returns the step and the next state, given a gradient of shape (d,).
    blockwise
        Whether the rule is elementwise and has no state, so that `update` may be applied to one
        block of the vector at a time.
    momentum, staleness_aware
        For linear theory: the factor of the heavy ball, and whether the step is divided by
        1 + staleness.
    """

    init: Callable[[Array], State]
    update: Update
    blockwise: bool = False
    momentum: float = 0.0
    staleness_aware: bool = False


def sgd() -> Rule:
    """Return stochastic gradient descent, x_{k+1} = x_k - eta g (A1). It has no state."""

    def init(x: Array) -> State:
        return ()

    def update(
        gradient: Array,
        state: State,
        *,
        learning_rate: float,
        staleness: int,
        out: Array | None = None,
    ) -> tuple[Array, State]:
        return np.multiply(gradient, learning_rate, out=out), state

    return Rule(init, update, blockwise=True)


def momentum(zeta: float) -> Rule:
    """Return the heavy ball, v_{k+1} = zeta v_k - eta g, x_{k+1} = x_k + v_{k+1}.

    An, Lu, Ying, section 2.1, before (L4). The state is -v, shape (d,).
    """

    def init(x: Array) -> State:
        return (np.zeros_like(x),)

    def update(
        gradient: Array,
        state: State,
        *,
        learning_rate: float,
        staleness: int,
        out: Array | None = None,
    ) -> tuple[Array, State]:
        velocity = zeta * state[0]
        velocity += np.multiply(gradient, learning_rate, out=out)
        return velocity, (velocity,)

    return Rule(init, update, momentum=zeta)


def staleness_aware() -> Rule:
    """Return SGD with step eta / (1 + tau) (Zhang et al., Staleness-aware async-SGD, 2016)."""
    plain = sgd()

    def update(
        gradient: Array,
        state: State,
        *,
        learning_rate: float,
        staleness: int,
        out: Array | None = None,
    ) -> tuple[Array, State]:
        reduced = learning_rate / (1 + staleness)
        return plain.update(gradient, state, learning_rate=reduced, staleness=staleness, out=out)

    return Rule(plain.init, update, blockwise=True, staleness_aware=True)


def clipped(rule: Rule, norm: float) -> Rule:
    """Return `rule` with gradients clipped to length `norm`: g min(1, norm / |g|)."""

    def update(
        gradient: Array,
        state: State,
        *,
        learning_rate: float,
        staleness: int,
        out: Array | None = None,
    ) -> tuple[Array, State]:
        length = np.linalg.norm(gradient, axis=-1, keepdims=True)
        if np.any(length > norm):
            gradient = gradient * (norm / np.maximum(length, norm))
        return rule.update(
            gradient, state, learning_rate=learning_rate, staleness=staleness, out=out
        )

    return rule._replace(update=update, blockwise=False)


def make_rule(optimizer: OptimizerConfig) -> Rule:
    """Return the configured rule."""
    if optimizer.rule == "momentum":
        rule = momentum(optimizer.momentum)
    else:
        rule = staleness_aware() if optimizer.rule == "staleness_aware" else sgd()
    return rule if optimizer.clip_norm is None else clipped(rule, optimizer.clip_norm)
