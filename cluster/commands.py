"""The commands on real runs: `asgd run`, `workers`, `verify`.

Commands import slow modules when they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from asgd.console.options import (
    PATH,
    force_option,
    json_option,
    lines_option,
    out_option,
    quiet_option,
    run_argument,
    set_option,
)
from asgd.console.output import Command, print_json, say
from asgd.console.records import verify_record
from asgd.errors import InputError
from asgd.printable import printable


@click.command(cls=Command)
@click.argument("config", type=PATH, required=False)
@set_option
@out_option
@click.option("--resume", type=PATH, metavar="RUN", help="Continue the unfinished RUN.")
@force_option
@click.option("--address", help="Address of a running Ray cluster.  [default: start one here]")
@quiet_option
@lines_option
def run(
    config: Path | None,
    overrides: Sequence[str],
    out: Path | None,
    resume: Path | None,
    force: bool,
    address: str | None,
    quiet: bool,
    lines: bool,
) -> None:
    """Train on real worker processes, configured by CONFIG (TOML).

    \b
    asgd run scripts/configs/digits.toml --out runs/digits
    asgd run scripts/configs/digits.toml --set cluster.workers=8 --set run.seed=1
    asgd run --resume runs/digits
    asgd run --resume runs/digits --set run.updates=8000 --set optimizer.learning_rate=0.01
    """
    import cluster
    from asgd.config.make import load_config
    from asgd.console.live import Importing, LiveRun
    from asgd.rundir.writer import default_path

    importing = Importing(quiet)

    def observe(path: Path) -> LiveRun:
        importing.stop()
        return LiveRun("train", path, quiet=quiet, lines=lines)

    if resume is not None:
        if config or out:
            raise InputError(
                f"--resume {resume}: expected no CONFIG or --out, because a run has its own"
            )
        with importing:
            done = cluster.resume(resume, address, force=force, changes=overrides, observe=observe)
        say(done)
        return
    if force:
        raise InputError("--force: expected only with --resume")
    if config is None:
        raise click.UsageError("Missing argument 'CONFIG'.")
    settings = load_config(config, overrides)
    out = out or default_path(settings, config.stem)
    with importing:
        done = cluster.run(settings, out, address, observe=observe)
    say(done)


@click.command(cls=Command)
@run_argument
@click.argument("count", metavar="N", type=int)
@json_option
def workers(run: Path, count: int, as_json: bool) -> None:
    """Change the number of workers of RUN to N, while it is running.

    Removed workers first deliver the gradient they are computing.

    \b
    asgd workers runs/digits 8
    """
    from cluster.team import set_workers

    change = set_workers(run, count)
    if as_json:
        print_json(asdict(change))
    else:
        say(change)


@click.command(cls=Command)
@run_argument
@click.option("--replay/--no-replay", "replayed", default=True, help="Also replay each update.")
@json_option
@quiet_option
def verify(run: Path, replayed: bool, as_json: bool, quiet: bool) -> None:
    """Check that RUN is undamaged and consistent.

    Compares the digests of its files, checks invariants of its tables, and replays the updates,
    which must give the same gradients, losses and parameters. Prints one line per fault and exits
    with status 1 if there are any.

    \b
    asgd verify runs/digits
    asgd verify runs/digits --no-replay     seconds, even for millions of updates
    """
    from asgd.console.live import Bar
    from asgd.records.columns import is_record
    from asgd.rundir.repeats import read_runs
    from cluster.storage.verify import verify as verify_run

    if is_record(run):
        verify_record(run, as_json)
        return
    verdicts = []
    for one in read_runs(run):
        with Bar("verify", 1, quiet) as bar:
            verdicts.append(verify_run(one, replayed, lambda done: bar.whole("replay", done)))
    if as_json:
        print_json({"runs": [asdict(verdict) for verdict in verdicts]})
    for verdict in () if as_json else verdicts:
        for finding in verdict.findings:
            say(printable(finding))
        if not verdict.findings:
            say(printable(f"{verdict.run}: no faults: {verdict.checked}"))
    if any(verdict.findings for verdict in verdicts):
        raise click.exceptions.Exit(1)
