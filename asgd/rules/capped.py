"""A learning rate with a cap that falls with the staleness."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asgd.arrays import Array
from asgd.rules.sgd import Sgd


@dataclass(frozen=True)
class Capped(Sgd):
    """x' = x - min(eta, c / tau) g.

    Mishchenko, Bach, Even, Woodworth, *Asynchronous SGD beats minibatch SGD under arbitrary delays*
    (2022); Koloskova, Stich, Jaggi, *Sharper convergence guarantees for asynchronous SGD* (2022),
    where c is of the order of one over the largest curvature. A very slow worker then does no harm.

    Attributes
    ----------
    cap
        c > 0, in units of the learning rate.
    """

    cap: float

    def rate(self, eta: float, staleness: int | Array) -> float | Array:
        """Return min(eta, c / tau)."""
        if isinstance(staleness, np.ndarray):
            return np.where(
                staleness > 0, np.minimum(eta, self.cap / np.maximum(staleness, 1)), eta
            )
        return min(eta, self.cap / staleness) if staleness else eta
