"""Plain SGD, and the base of rules that change only its learning rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asgd.arrays import Array
from asgd.rules.base import Rule
from asgd.rules.loops import sgd_loop


class Sgd(Rule):
    """x' = x - eta g, (A1)."""

    scratch = 1
    additive = True
    loop = sgd_loop

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

    def factors(self, eta: float, count: int, staleness: int | Array) -> tuple[float, ...]:
        """Return the learning rate."""
        return (float(self.rate(eta, staleness)),)
