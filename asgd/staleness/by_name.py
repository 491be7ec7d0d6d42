"""Makes a staleness law from its name."""

from __future__ import annotations

import math

from asgd.staleness.counts import Poisson
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric
from asgd.staleness.law import StalenessLaw, check


def named_law(name: str, mean: float) -> StalenessLaw:
    """Return the geometric, poisson or constant law with a given mean, in updates.

    Raises
    ------
    InputError
        The name is unknown, the mean is negative, or the constant is not a whole number.
    """
    check(0.0 <= mean < math.inf, "mean_staleness", mean, "a number >= 0")
    if name == Geometric.name:
        return Geometric(mean / (1.0 + mean))
    if name == Poisson.name:
        return Poisson(mean)
    check(name == "constant", "staleness law", repr(name), "geometric, poisson or constant")
    check(mean == int(mean), "mean_staleness", mean, "a whole number for the constant law")
    return ConstantPlusGeometric(int(mean))
