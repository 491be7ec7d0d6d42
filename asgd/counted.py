"""Numbers with their nouns in messages."""

from __future__ import annotations


def counted(number: int | str, nouns: str) -> str:
    """Return a number and its noun, of which the plural is given: "1 step", "2,000 steps"."""
    shown = number if isinstance(number, str) else f"{number:,}"
    return f"{shown} {nouns.removesuffix('s') if shown == '1' else nouns}"
