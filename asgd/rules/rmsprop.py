"""RMSProp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asgd.arrays import Array
from asgd.rules.base import Rule
from asgd.rules.loops import rmsprop_loop


@dataclass(frozen=True)
class RmsProp(Rule):
    """v' = beta2 v + (1 - beta2) g^2, x' = x - eta g / (sqrt(v') + epsilon).

    Tieleman, Hinton, *Lecture 6.5, RMSProp* (2012). The state is v / (1 - beta2).

    Attributes
    ----------
    beta2
        In [0, 1).
    epsilon
        > 0.
    """

    beta2: float
    epsilon: float

    state = ("second_moment",)
    scratch = 1
    additive = True
    loop = rmsprop_loop

    @property
    def _scale(self) -> float:
        """Square root of state / v."""
        return 1 / math.sqrt(1 - self.beta2)

    def update(
        self,
        x: Array,
        gradient: Array,
        state: Sequence[Array],
        eta: float,
        count: int,
        staleness: int | Array,
        read: Array | None = None,
    ) -> None:
        """Apply a gradient to x and to the second moment, in place."""
        second, step = state
        second *= self.beta2
        second += np.multiply(gradient, gradient, out=step)
        scale = self._scale
        np.sqrt(second, out=step)
        step += self.epsilon * scale
        np.divide(gradient, step, out=step)
        step *= eta * scale
        x -= step

    def factors(self, eta: float, count: int, staleness: int | Array) -> tuple[float, ...]:
        """Return beta2, and epsilon and learning rate for the scaled state."""
        return self.beta2, self.epsilon * self._scale, eta * self._scale
