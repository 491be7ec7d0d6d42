"""Plain SGD, and the step of rules that change nothing but its length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asgd.arrays import Array
from asgd.rules.base import Rule, alike
from asgd.rules.loops import sgd_loop


class Sgd(Rule):
    """x' = x - eta g, (A1)."""

    scratch = 1
    additive = True

    def rate(self, eta: float, staleness: int | Array) -> float | Array:
        """Return the learning rate of a gradient; a number, or one per path, shape (paths, 1)."""
        return eta

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
        """Apply a gradient to x, in place."""
        x -= np.multiply(gradient, self.rate(eta, staleness), out=state[0])

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
        if not alike(x, gradient):
            super().update_long(x, gradient, state, eta, count, staleness, read)
            return
        sgd_loop(x, gradient, float(self.rate(eta, staleness)))
