"""Every staleness law by name, and a law from its description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asgd.staleness.counts import ConwayMaxwellPoisson, NegativeBinomial, Poisson
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric, GeometricMixture
from asgd.staleness.law import StalenessLaw

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


def law_of(description: Mapping[str, Any]) -> StalenessLaw:
    """Return the law of a description made by `to_dict`."""
    params = dict(description)
    return LAWS[params.pop("law")](**params)
