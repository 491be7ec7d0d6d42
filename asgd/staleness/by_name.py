"""Makes a staleness law from its name or its description."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from asgd.errors import InputError
from asgd.staleness.counts import ConwayMaxwellPoisson, NegativeBinomial, Poisson
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric, GeometricMixture
from asgd.staleness.law import StalenessLaw, check

LAWS: dict[str, type[StalenessLaw]] = {
    law.name: law
    for law in (
        Geometric,
        GeometricMixture,
        NegativeBinomial,
        Poisson,
        ConwayMaxwellPoisson,
        ConstantPlusGeometric,
        Empirical,
    )
}


def law_from_dict(description: Mapping[str, Any]) -> StalenessLaw:
    """Return the law of a description made by `to_dict`.

    Raises
    ------
    InputError
        The law or one of its parameters is unknown.
    """
    params = dict(description)
    name = params.pop("law", None)
    if name not in LAWS:
        raise InputError(f"law = {name!r}: expected one of {', '.join(LAWS)}")
    try:
        return LAWS[name](**params)
    except TypeError as error:
        raise InputError(f"law = {name!r}: {error}") from None


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
