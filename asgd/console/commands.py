"""The commands that need neither Ray nor the analysis: `asgd init`, `simulate`, `runs`, ...

Commands import slow modules when they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from asgd.console.options import (
    PATH,
    config_argument,
    json_option,
    lines_option,
    out_option,
    quiet_option,
    run_argument,
    set_option,
)
from asgd.console.output import Command, print_json, print_table, say
from asgd.errors import InputError, written
from asgd.printable import printable

if TYPE_CHECKING:
    from asgd.config.tables import RunConfig


@click.command(cls=Command)
@click.argument("config", type=PATH, default="asgd.toml")
def init(config: Path) -> None:
    """Write a commented starter configuration to CONFIG.

    \b
    asgd init                          writes asgd.toml
    asgd init experiments/first.toml
    """
    from importlib.resources import files

    if config.exists():
        raise InputError(f"{config}: exists; choose another name")
    with written(config):
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_bytes(files("asgd").joinpath("starter.toml").read_bytes())
    say(config)


@click.command(cls=Command)
@config_argument
@set_option
@out_option
@quiet_option
@lines_option
def simulate(
    config: Path, overrides: Sequence[str], out: Path | None, quiet: bool, lines: bool
) -> None:
    """Simulate CONFIG (TOML) in virtual time.

    Runs in one process without Ray and is bitwise reproducible.

    \b
    asgd simulate scripts/configs/digits.toml --out runs/sim
    asgd simulate scripts/configs/digits.toml --set simulation.staleness=geometric
    """
    from asgd.config.make import load_config
    from asgd.console.live import IMPORTING, LiveRun
    from asgd.rundir.repeats import run_repeats
    from asgd.rundir.writer import default_path
    from asgd.simulation.simulate import simulate as simulate_run

    def one(settings: RunConfig, out: Path) -> None:
        with LiveRun("simulate", quiet=quiet, lines=lines, first=IMPORTING) as live:
            simulate_run(settings, out, live)

    settings = load_config(config, overrides)
    say(run_repeats(settings, out or default_path(settings, config.stem), one))


@click.command(cls=Command)
@click.argument("directory", type=PATH, default="runs")
@json_option
def runs(directory: Path, as_json: bool) -> None:
    """List the runs in DIRECTORY with their state.

    \b
    asgd runs                          the runs in runs/
    asgd runs experiments --json
    """
    from asgd.console.records import in_runs_table, record_rows
    from asgd.console.tables import runs_table
    from asgd.rundir.summary import list_runs

    rows, records = list_runs(directory), record_rows(directory)
    if as_json:
        print_json({"runs": [*rows, *records]})
    elif rows or records:
        rows += in_runs_table(records)
        print_table(runs_table(rows))
        for row in rows:
            if row["state"] == "unreadable":
                say(f"{printable(row['run'])}: {printable(row['reason'])}")
    else:
        say(f"{printable(str(directory))}: no run yet; `asgd run` makes one")


@click.command(cls=Command)
@run_argument
@json_option
def status(run: Path, as_json: bool) -> None:
    """Show the state of RUN, even while it is running.

    If RUN did not record its end, the command checks whether its process is alive.

    \b
    asgd status runs/digits
    watch -n 2 asgd status runs/digits
    """
    from asgd.console.records import record_table
    from asgd.console.tables import status_table
    from asgd.records.columns import is_record
    from asgd.records.reader import read_record, summary
    from asgd.rundir.reader import read_run
    from asgd.rundir.summary import status as status_of

    record = is_record(run)
    found = summary(read_record(run)) if record else status_of(read_run(run))
    if as_json:
        print_json(found)
    else:
        print_table(record_table(found) if record else status_table(found))


@click.command(cls=Command)
@click.argument("path", metavar="RUN", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="FILE.npz, .safetensors or .pt.")
def export(path: Path, output: Path) -> None:
    """Write the parameters that RUN has reached into a file.

    A network's arrays have the names that its framework gives them; .pt is a state dictionary of
    PyTorch. `problem.initial_from` in a configuration starts a run from such a file.

    \b
    asgd export runs/mine -o model.npz
    asgd export runs/mine -o model.safetensors
    """
    from asgd.rundir.export import export as export_run
    from asgd.rundir.reader import read_run

    say(export_run(read_run(path), output))


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a completion script for SHELL.

    \b
    eval "$(asgd completion bash)"     for this session, or in ~/.bashrc
    asgd completion fish > ~/.config/fish/completions/asgd.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click supports all three shells
    root = click.get_current_context().find_root().command
    say(kind(root, {}, "asgd", "_ASGD_COMPLETE").source())
