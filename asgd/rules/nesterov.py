"""SGD with the momentum of Nesterov (1983)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asgd.arrays import Array
from asgd.rules.base import Rule
from asgd.rules.loops import nesterov_loop


@dataclass(frozen=True)
class Nesterov(Rule):
    """v' = beta v - eta g, x' = x + beta v' - eta g.

    The form of Sutskever, Martens, Dahl, Hinton, *On the importance of initialization and momentum
    in deep learning* (2013), in which x is the point where gradients are computed. The state is -v.

    Attributes
    ----------
    momentum
        beta, in [0, 1).
    """

    momentum: float

    state = ("velocity",)
    scratch = 2
    additive = True
    loop = nesterov_loop

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
        """Apply a gradient to x and to the velocity, in place."""
        velocity, step, ahead = state
        velocity *= self.momentum
        velocity += np.multiply(gradient, eta, out=step)
        step += np.multiply(velocity, self.momentum, out=ahead)
        x -= step

    def factors(self, eta: float, count: int, staleness: int | Array) -> tuple[float, ...]:
        """Return eta and beta."""
        return eta, self.momentum
