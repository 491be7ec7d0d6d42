"""Prints the results of commands as columns of text or as JSON."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import click

from asgd.errors import InputError, did_you_mean
from asgd.printable import printable

_RESULTS = "asgd.results"


class Command(click.Command):
    """Reserves standard output for results; other prints, as in a plug-in, go to standard error."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        ctx.meta[_RESULTS] = sys.stdout
        with redirect_stdout(sys.stderr):
            return super().invoke(ctx)


class Commands(click.Group):
    """Suggests a command for a misspelt one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or refuse the name with a hint."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            hint, accepted = did_you_mean(args[0], self.commands), ", ".join(self.commands)
            raise InputError(f"{args[0]}: unknown command; {hint}expected {accepted}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of their definition."""
        return list(self.commands)


def say(text: object) -> None:
    """Print a result, within a command."""
    results = click.get_current_context().meta[_RESULTS]
    if results is not None:  # None after `>&-`
        click.echo(text, file=results)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns; unprintable characters are escaped."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in shown
    ]


def print_json(data: Any) -> None:
    """Print data as JSON on one line; nan and inf become null."""
    say(json.dumps(_finite(data), allow_nan=False))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text in columns."""
    for line in aligned(rows):
        say(line)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def quiet_matplotlib() -> None:
    """Suppress matplotlib's log messages about its cache directory."""
    for name in ("matplotlib", "matplotlib.font_manager"):
        logging.getLogger(name).addFilter(_is_not_about_caches)


def _is_not_about_caches(record: logging.LogRecord) -> bool:
    about_caches = (
        "mkdir -p failed",
        "%s is not a writable directory",
        "Matplotlib created a temporary cache",
        "Matplotlib is building the font cache",
    )
    return not str(record.msg).startswith(about_caches)
