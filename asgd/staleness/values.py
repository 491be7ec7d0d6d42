"""Staleness as a number: its definition, and the values that it may have."""

from __future__ import annotations

import numbers
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from asgd.arguments import shown
from asgd.arrays import Integers
from asgd.errors import InputError

LARGEST = 10**9  # largest `run.updates` of a configuration


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


def whole_numbers(
    values: npt.ArrayLike, name: str, largest: int = LARGEST, least: int = 1
) -> npt.NDArray[np.int64]:
    """Return a series of at least `least` whole numbers from 0 to `largest`, as int64.

    Raises
    ------
    InputError
        It is not a series, is too short, or has a bad or masked entry; the message gives its
        position.
    """
    accepted = f"whole numbers from 0 to {largest:,}"
    try:
        given: Any = np.ma.asanyarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged or not convertible
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: expected {accepted}, shape (m,) ({reason})") from None
    if given.ndim == 0:
        raise InputError(f"{name} = {shown(values)}: expected {accepted}, shape (m,)")
    if given.ndim != 1 or given.size < least:
        raise InputError(f"{name}.shape = {given.shape}: expected (m,) with m >= {least}")
    masked = np.flatnonzero(np.ma.getmaskarray(given))
    if masked.size:
        raise InputError(f"{name}[{masked[0]}] is masked: expected {accepted}; `.compressed()`?")
    series = np.asarray(np.ma.getdata(given))
    if series.dtype.kind in "iuf":
        with np.errstate(invalid="ignore"):
            fits = (series >= 0) & (series <= largest) & (series == np.floor(series))
    else:
        fits = np.array([_is_whole(value, largest) for value in series.tolist()])
    if not fits.all():
        at = int(np.argmin(fits))
        raise InputError(f"{name}[{at}] = {shown(series.tolist()[at])}: expected {accepted}")
    return series.astype(np.int64)


def _is_whole(value: Any, largest: int) -> bool:
    number = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    return number and 0 <= value <= largest and value == int(value)
