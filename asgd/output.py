"""What commands print: columns of text, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import click

from asgd.printable import printable


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of text in columns, each row in a line of printable characters."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in shown
    ]


def print_json(data: Any) -> None:
    """Print data as JSON in one line; what is not a finite number is null."""
    click.echo(json.dumps(_finite(data), allow_nan=False))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text in columns."""
    for line in aligned(rows):
        click.echo(line)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
