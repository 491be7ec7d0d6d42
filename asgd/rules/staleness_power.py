"""Steps that fall as a power of the staleness."""

from __future__ import annotations

from dataclasses import dataclass

from asgd.arrays import Array
from asgd.rules.sgd import Sgd


@dataclass(frozen=True)
class StalenessPower(Sgd):
    """x' = x - eta (1 + tau)^-alpha g.

    alpha = 1 is eta / (1 + tau) of Zhang, Gupta, Lian, Liu, *Staleness-aware async-SGD* (2016).

    Attributes
    ----------
    exponent
        alpha >= 0.
    """

    exponent: float

    def rate(self, eta: float, staleness: int | Array) -> float | Array:
        """Return eta (1 + tau)^-alpha."""
        return eta / (1 + staleness) ** self.exponent
