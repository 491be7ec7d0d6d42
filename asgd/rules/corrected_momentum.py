"""Momentum minus the momentum that asynchrony adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asgd.arrays import Array
from asgd.rules.base import Rule, State, apply_rule
from asgd.rules.heavy_ball import HeavyBall

_WINDOW = 1000  # updates over which the staleness is averaged


@dataclass(frozen=True)
class CorrectedMomentum(Rule):
    """The heavy ball with the factor beta' = max(0, beta - (1 - beta) m), m the mean staleness.

    Geometric staleness of mean m is itself momentum of mu = m / (1 + m) (Mitliagkas, Zhang, Hadjis,
    Re, *Asynchrony begets momentum*, 2016). Momentum beta' of the rule and mu of the staleness
    together have (1 - beta') (1 - mu) = 1 - beta: on average the run follows the heavy ball of
    factor beta and learning rate (1 - mu) eta, to first order in the curvature. Where the staleness
    alone has more momentum than beta, the rule adds none. m is measured: a moving mean over the
    last thousand updates or so.

    Attributes
    ----------
    momentum
        beta, in [0, 1): the momentum of rule and staleness together.
    """

    momentum: float

    state = ("velocity", "mean_staleness")
    scratch = 1
    blockwise = False

    def init(self, x: Array) -> State:
        """Return a velocity like x, and a mean staleness for each path."""
        return np.zeros_like(x), np.zeros_like(x[..., :1])

    def explicit(self, mean_staleness: float) -> float:
        """Return beta' at a mean staleness."""
        return max(0.0, self.momentum - (1 - self.momentum) * mean_staleness)

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
        """Apply a gradient to x, to the velocity and to the mean staleness, in place."""
        velocity, mean, step = state
        mean += (staleness - mean) / min(count + 1, _WINDOW)
        beta = np.maximum(0.0, self.momentum - (1 - self.momentum) * mean)
        ball = HeavyBall(beta.item() if x.ndim == 1 else beta)
        apply_rule(ball, x, gradient, (velocity, step), eta, count, staleness)
