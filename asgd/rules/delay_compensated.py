"""Delay compensation, DC-ASGD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asgd.arrays import Array
from asgd.rules.base import Rule
from asgd.rules.loops import delay_compensated_loop


@dataclass(frozen=True)
class DelayCompensated(Rule):
    """x' = x - eta (g + lambda g g (x - x_read)), entry by entry.

    A Taylor expansion of the gradient around the point where it was computed, with the diagonal of
    g g^T for the Hessian (Zheng, Meng, Wang, Chen, Yu, Ma, Liu, *Asynchronous stochastic gradient
    descent with delay compensation*, 2017, the constant lambda of DC-ASGD-c).

    Attributes
    ----------
    compensation
        lambda >= 0.
    """

    compensation: float

    scratch = 1
    reads = True
    loop = delay_compensated_loop

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
        """Apply a compensated gradient to x, in place."""
        assert read is not None  # it `reads`
        (step,) = state
        np.subtract(x, read, out=step)
        step *= gradient
        step *= gradient
        step *= self.compensation
        step += gradient
        step *= eta
        x -= step

    def factors(self, eta: float, count: int, staleness: int | Array) -> tuple[float, ...]:
        """Return eta and lambda."""
        return eta, self.compensation
