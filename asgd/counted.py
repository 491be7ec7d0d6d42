"""Numbers and lists in messages."""

from __future__ import annotations

import math
from collections.abc import Sequence


def counted(number: int | str, nouns: str) -> str:
    """Return a number and its noun, given in the plural: "1 step", "2,000 steps"."""
    shown = number if isinstance(number, str) else f"{number:,}"
    return f"{shown} {nouns.removesuffix('s') if shown == '1' else nouns}"


def percent(share: float) -> str:
    """Return a share in per cent, with two digits if it is small."""
    if math.isinf(share):
        return "infinite"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def listed(names: Sequence[str]) -> str:
    """Return names joined by commas and a final "and"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def abridged(names: Sequence[str], most: int) -> str:
    """Return the first names joined by commas, with ", ..." if there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
