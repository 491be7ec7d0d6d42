"""SGD with momentum in the form of Polyak (1964), the heavy ball."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asgd.arrays import Array
from asgd.rules.base import Rule
from asgd.rules.loops import heavy_ball_loop


@dataclass(frozen=True)
class HeavyBall(Rule):
    """v' = beta v - eta g, x' = x + v' (An, Lu, Ying, section 2.1, before (L4)).

    The state is -v.

    Attributes
    ----------
    momentum
        beta, in [0, 1); or one per path, shape (paths, 1).
    """

    momentum: float | Array

    state = ("velocity",)
    scratch = 1
    additive = True
    loop = heavy_ball_loop

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
        velocity, step = state
        velocity *= self.momentum
        velocity += np.multiply(gradient, eta, out=step)
        x -= velocity

    def factors(self, eta: float, count: int, staleness: int | Array) -> tuple[float, ...]:
        """Return eta and beta."""
        return eta, float(self.momentum)
