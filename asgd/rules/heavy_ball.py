"""SGD with momentum in the form of Polyak (1964), the heavy ball."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asgd.arrays import Array
from asgd.rules.base import Rule, alike
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

    def update_long(
        self,
        x: Array,
        gradient: Array,
        state: Sequence[Array],
        eta: float,
        count: int,
        staleness: int | Array,
        read: Array | None = None,
    ) -> None:
        """Do what `update` does, by a compiled loop."""
        if not alike(x, gradient, state[0]):
            super().update_long(x, gradient, state, eta, count, staleness, read)
            return
        heavy_ball_loop(x, gradient, state[0], eta, float(self.momentum))
