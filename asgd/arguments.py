"""Checks of the arguments of public functions: one clear line instead of a traceback."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from asgd.errors import InputError


def number(
    value: Any,
    key: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Return a finite number with value >= least, > above and < below.

    Raises
    ------
    InputError
        The value is not a number, not finite, or out of bounds.
    """
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in ((">=", least), (">", above), ("<", below))
        if math.isfinite(bound)
    ]
    single = isinstance(value, numbers.Real) or (isinstance(value, np.ndarray) and not value.ndim)
    fits = single and not isinstance(value, bool | np.bool_) and math.isfinite(value)
    if not fits or not (least <= value < below and value > above):
        accepted = " ".join(["a number", " and ".join(bounds)]).rstrip()
        raise InputError(f"{key} = {shown(value)}: expected {accepted}")
    return float(value)


def count(value: Any, key: str, least: int = 1) -> int:
    """Return a whole number that is at least `least`.

    Raises
    ------
    InputError
        The value is not such a number.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least:
        raise InputError(f"{key} = {shown(value)}: expected a whole number >= {least}")
    return int(value)


def shown(value: Any) -> str:
    """Return a value as one short line of text."""
    text = str(value) if isinstance(value, numbers.Number) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:60]}..."
