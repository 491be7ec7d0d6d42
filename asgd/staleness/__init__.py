"""The definition of staleness, and staleness laws.

The staleness of an update is the number of updates applied between reading its snapshot and
applying its gradient: `staleness = update - read_version >= 0`, where `update` counts the updates
applied before this one.

A law is a probability distribution of staleness on 0, 1, 2, ... with the methods of a scipy
distribution: `pmf`, `cdf`, `mean`, `var`, `rvs`. Laws are frozen, comparable and serialisable
(`to_dict`, `law_from_dict`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from asgd.arrays import Integers
from asgd.errors import InputError
from asgd.staleness.counts import ConwayMaxwellPoisson, NegativeBinomial, Poisson
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric, GeometricMixture
from asgd.staleness.law import StalenessLaw, check
from asgd.staleness.values import whole_numbers

__all__ = [
    "LAWS",
    "ConstantPlusGeometric",
    "ConwayMaxwellPoisson",
    "Empirical",
    "Geometric",
    "GeometricMixture",
    "NegativeBinomial",
    "Poisson",
    "StalenessLaw",
    "law_from_dict",
    "named_law",
    "staleness_of",
]


@overload
def staleness_of(update: int, read_version: int) -> int: ...
@overload
def staleness_of(update: npt.ArrayLike, read_version: npt.ArrayLike) -> Integers: ...
def staleness_of(update: Any, read_version: Any) -> Any:
    """Return update - read_version, in updates.

    Parameters
    ----------
    update
        Number of updates applied before this one, an integer or of shape (m,).
    read_version
        Version of the snapshot, same shape.

    Raises
    ------
    InputError
        A value is negative or not a whole number, a version is later than its update, or the
        shapes differ.
    """
    single = np.ndim(update) == 0 and np.ndim(read_version) == 0
    updates = whole_numbers([update] if single else update, "update", least=0)
    versions = whole_numbers([read_version] if single else read_version, "read_version", least=0)
    if updates.shape != versions.shape:
        raise InputError(f"read_version.shape = {versions.shape}: expected {updates.shape}")
    early = np.flatnonzero(versions > updates)
    if early.size:
        at = early[0]
        where = "" if single else f"[{at}]"
        raise InputError(f"read_version{where} = {versions[at]}: expected 0 to {updates[at]}")
    return int(updates[0] - versions[0]) if single else updates - versions


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
        raise InputError(f"law {name!r}: {error}") from None


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
