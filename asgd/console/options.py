"""Arguments and options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
MOST_PATHS = 1_000_000  # the standard error of their mean is a thousandth of their scatter
config_argument = click.argument("config", type=PATH)
run_argument = click.argument("run", type=PATH)
runs_argument = click.argument("runs", type=PATH, nargs=-1, required=True)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, repeatable."
)
out_option = click.option("--out", type=PATH, help="New run directory.  [default: under runs/]")
paths_option = click.option(
    "--paths",
    type=click.IntRange(2, MOST_PATHS),
    default=64,
    show_default=True,
    help="Paths per ensemble.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
force_option = click.option(
    "--force", is_flag=True, help="Continue even if the problem has changed."
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
lines_option = click.option(
    "--lines", is_flag=True, help="Without a terminal, print a line every 10 s."
)


class Numbers(click.ParamType[list[int] | list[float]]):
    """Comma-separated numbers."""

    name = "N,..."

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int] | list[float]:
        """Return the numbers in a text."""
        try:
            return [self._kind(part) for part in value.split(",")]
        except ValueError:
            example = "2,4,8" if self._kind is int else "0.05,0.1"
            return self.fail(f"{value!r}: expected numbers such as {example}", param, ctx)
