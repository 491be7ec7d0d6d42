"""Update rules: pure functions of a gradient and a state, that return a step and the next state.

The server applies `x <- x - step`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asgd.arrays import Array
from asgd.config import OptimizerConfig

State = tuple[Array, ...]


@dataclass(frozen=True)
class Rule:
    """An update rule; the default is SGD, x_{k+1} = x_k - eta g (A1).

    Attributes
    ----------
    momentum
        zeta of the heavy ball, v_{k+1} = zeta v_k - eta g, x_{k+1} = x_k + v_{k+1} (An, Lu, Ying,
        section 2.1, before (L4)). 0 is SGD without a state.
    staleness_aware
        Whether the step is eta / (1 + tau) (Zhang et al., Staleness-aware async-SGD, 2016).
    clip_norm
        Gradients are clipped to this length: g min(1, clip_norm / |g|). None clips nothing.
    """

    momentum: float = 0.0
    staleness_aware: bool = False
    clip_norm: float | None = None

    @property
    def blockwise(self) -> bool:
        """Whether `update` may be applied to one block of the vector at a time."""
        return self.momentum == 0.0 and self.clip_norm is None

    def init(self, x: Array) -> State:
        """Return the state before the first update: -v, shape (d,), for the heavy ball."""
        return (np.zeros_like(x),) if self.momentum else ()

    def update(
        self,
        gradient: Array,
        state: State,
        *,
        learning_rate: float,
        staleness: int | Array,
        out: Array | None = None,
    ) -> tuple[Array, State]:
        """Return the step, shape (d,), and the next state; the arguments are not modified.

        Parameters
        ----------
        gradient
            Shape (d,), or (paths, d).
        staleness
            A number, or one per path, shape (paths, 1).
        out
            Array for the step; it may be the gradient, which is then overwritten.
        """
        if self.clip_norm is not None:
            length = np.linalg.norm(gradient, axis=-1, keepdims=True)
            if np.any(length > self.clip_norm):
                gradient = gradient * (self.clip_norm / np.maximum(length, self.clip_norm))
        eta = learning_rate / (1 + staleness) if self.staleness_aware else learning_rate
        step = np.multiply(gradient, eta, out=out)
        if not self.momentum:
            return step, state
        velocity = self.momentum * state[0]
        velocity += step
        return velocity, (velocity,)


def make_rule(optimizer: OptimizerConfig) -> Rule:
    """Return the configured rule."""
    return Rule(
        optimizer.momentum if optimizer.rule == "momentum" else 0.0,
        optimizer.rule == "staleness_aware",
        optimizer.clip_norm,
    )
