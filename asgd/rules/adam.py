"""Adam, and AdamW with decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asgd.arrays import Array
from asgd.rules.base import Rule
from asgd.rules.loops import adam_loop


@dataclass(frozen=True)
class Adam(Rule):
    """x' = x - eta m^ / (sqrt(v^) + epsilon) (Kingma, Ba, *Adam*, 2015).

    m' = beta1 m + (1 - beta1) g and v' = beta2 v + (1 - beta2) g^2 are corrected for their start at
    zero: m^ = m' / (1 - beta1^t), v^ = v' / (1 - beta2^t). t counts the updates of the server,
    this one included, whichever worker they came from. The state is m / (1 - beta1) and
    v / (1 - beta2), which saves two passes.

    Attributes
    ----------
    beta1, beta2
        In [0, 1).
    epsilon
        > 0.
    """

    beta1: float
    beta2: float
    epsilon: float

    state = ("first_moment", "second_moment")
    scratch = 1
    additive = True
    loop = adam_loop

    def kept(self, eta: float) -> float:
        """Return the factor of x before the step."""
        return 1.0

    def _of_state(self, eta: float, count: int) -> tuple[float, float]:
        """Return epsilon and learning rate, converted for the scaled state."""
        scale = math.sqrt((1 - self.beta2 ** (count + 1)) / (1 - self.beta2))
        rate = eta * scale * (1 - self.beta1) / (1 - self.beta1 ** (count + 1))
        return self.epsilon * scale, rate

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
        """Apply a gradient to x and to the moments, in place."""
        first, second, step = state
        first *= self.beta1
        first += gradient
        second *= self.beta2
        second += np.multiply(gradient, gradient, out=step)
        epsilon, rate = self._of_state(eta, count)
        np.sqrt(second, out=step)
        step += epsilon
        np.divide(first, step, out=step)
        step *= rate
        kept = self.kept(eta)
        if kept != 1.0:
            x *= kept
        x -= step

    def factors(self, eta: float, count: int, staleness: int | Array) -> tuple[float, ...]:
        """Return both betas, epsilon and rate for the scaled state, and the factor of x."""
        return self.beta1, self.beta2, *self._of_state(eta, count), self.kept(eta)


@dataclass(frozen=True)
class AdamW(Adam):
    """x' = (1 - eta lambda) x - eta m^ / (sqrt(v^) + epsilon).

    Adam with weight decay that does not pass through the moments (Loshchilov, Hutter, *Decoupled
    weight decay regularization*, 2019).

    Attributes
    ----------
    weight_decay
        lambda >= 0.
    """

    weight_decay: float

    additive = False

    def kept(self, eta: float) -> float:
        """Return 1 - eta lambda."""
        return 1 - eta * self.weight_decay
