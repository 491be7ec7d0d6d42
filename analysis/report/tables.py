"""Tables of a page: cells with text and sort value, equal precision within a column."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any, TypeGuard

import numpy as np
import pandas as pd

Interval = tuple[float, float] | tuple[()]

_NOTHING = 1e-9  # smaller numbers are shown as 0
_LARGE_END = 100.0  # interval ends from here on are formatted separately
_DIGITS, _DIGITS_OF_PERCENT = 4, 3  # significant digits of the largest number of a column


def page_table(
    name: str,
    table: pd.DataFrame,
    percent: Sequence[str] = (),
    ranges: Mapping[str, Sequence[Interval]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return columns and rows of cells for the template.

    Parameters
    ----------
    name
        Label of the table for screen readers.
    percent
        Columns of shares to show in per cent.
    ranges
        For a column of numbers, the interval to show in brackets after each; () for none.
    """
    columns = [
        _cells(list(table[column]), column in percent, ranges.get(column, ()))
        for column in table.columns
    ]
    heads = [
        {"name": column, "text": bool(cells) and cells[0]["value"] is None}
        for column, cells in zip(table.columns, columns, strict=True)
    ]
    return {
        "name": name,
        "columns": heads,
        "rows": [list(row) for row in zip(*columns, strict=True)],
    }


def _cells(
    values: Sequence[object], percent: bool, ranges: Sequence[Interval]
) -> list[dict[str, Any]]:
    """Return the cells of one column."""
    scale, unit = (100.0, "\N{NO-BREAK SPACE}%") if percent else (1.0, "")
    ranges = [pair if all(map(_is_number, pair)) else () for pair in ranges]
    numbers = [scale * float(value) for value in values if _is_number(value)]
    ends = [scale * float(end) for end in itertools.chain.from_iterable(ranges)]
    texts = iter(aligned_numbers(numbers, _DIGITS_OF_PERCENT if percent else _DIGITS, ends))
    cells: list[dict[str, Any]] = []
    for value in values:
        if _is_number(value):
            cells.append({"text": next(texts) + unit, "value": repr(float(value))})
        elif value is None or isinstance(value, float):
            cells.append({"text": "", "value": ""})
        else:
            cells.append({"text": str(value), "value": None})
    for cell, pair in zip(cells, ranges, strict=False):
        if pair:
            cell["range"] = f"({next(texts)} to {next(texts)}{unit})"
    return cells


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not math.isnan(value)


def aligned_numbers(
    numbers: Sequence[float], digits: int = _DIGITS, ends: Sequence[float] = ()
) -> list[str]:
    """Return the numbers of a column as text with the same number of decimals.

    The largest has `digits` significant digits, and the smallest two if one more decimal allows it;
    common trailing zeros are dropped. Numbers of too different size, very large numbers and those
    that are not finite are formatted individually. Interval `ends` follow the numbers; from 100 on
    they are formatted individually, smaller ones have the decimals of the numbers.
    """
    numbers, ends = (
        [0.0 if abs(number) < _NOTHING else number for number in part] for part in (numbers, ends)
    )
    alone = [plain_number(number, digits) for number in (*numbers, *ends)]
    sizes = [abs(number) for number in numbers if number]
    if not sizes or not max(sizes) < 1e9:
        return alone
    decimals = max(0, digits - _leading(max(sizes)))
    if decimals + _leading(min(sizes)) < 2 and min(sizes) < 10:
        decimals += 1
    if min(sizes) < 0.5 * 10.0**-decimals:
        return alone
    small = [end for end in ends if abs(end) < _LARGE_END]
    while decimals and all(f"{one:.{decimals}f}".endswith("0") for one in (*numbers, *small)):
        decimals -= 1
    text = f"{{:,.{decimals}f}}".format
    shown = [text(end) if abs(end) < _LARGE_END else plain_number(end, digits) for end in ends]
    return [*map(text, numbers), *shown]


def _leading(size: float) -> int:
    """Return the number of digits before the point; 0 or less below 0.1."""
    return int(np.floor(np.log10(size))) + 1


def plain_number(number: float, digits: int = _DIGITS) -> str:
    """Return a number as text, without exponent if possible."""
    if not np.isfinite(number):
        return str(number)
    if abs(number) < _NOTHING or (number == int(number) and abs(number) < 1e9):
        return f"{int(number):,}"
    if abs(number) >= 1e9:
        return f"{number:.{digits}g}"
    return f"{number:,.{digits}g}" if abs(number) < 10**digits else f"{number:,.0f}"
