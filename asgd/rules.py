"""Update rules: pairs of pure functions (init, update) that turn a gradient into a step.

The server applies `x <- x - step`. `update` returns the step and the next state; it changes
neither its gradient nor its state, and writes the step into `out` where one is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from asgd.config import OptimizerConfig

Array = npt.NDArray[np.float64]
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
        The state before the first update, from x_0 of shape (d,).
    update
        The step and the next state, from a gradient of shape (d,).
    """

    init: Callable[[Array], State]
    update: Update


def sgd() -> Rule:
    """Return stochastic gradient descent, x_{k+1} = x_k - eta g, (A1); no state."""

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

    return Rule(init, update)


def make_rule(optimizer: OptimizerConfig) -> Rule:
    """Return the rule a configuration names."""
    return sgd()
