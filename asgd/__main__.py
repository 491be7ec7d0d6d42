"""The command line: `asgd init`, `run`, `simulate`, `status`, `profile`, `predict`, `report`, ...

Only this module imports from all packages. Each package has its own commands, in a module
`commands`; they import slow modules (Ray, SciPy, matplotlib) when they run, so that `asgd --help`
answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from analysis.commands import plan, predict, predict_if_missing, profile, report, whatif
from asgd.console.commands import completion, export, init, runs, simulate, status
from asgd.console.failures import one_line_errors
from asgd.console.options import out_option, paths_option, quiet_option
from asgd.console.output import Command, Commands, quiet_matplotlib, say
from asgd.console.records import import_log
from asgd.errors import DivergedError
from cluster.commands import run, verify, workers

# Four workers near the stability limit, where the staleness law affects the loss.
DEMO = {
    "optimizer": {"learning_rate": 0.8, "batch_size": 64},
    "cluster": {"workers": 4, "compute_time": {"law": "gamma", "mean": 0.01, "variation": 0.2}},
    "run": {"updates": 600, "eval_every": 4},
}


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="asgd")
def cli() -> None:
    """Run asynchronous SGD, measure its staleness, predict its loss curve.

    \b
    asgd init my.toml                  a commented configuration to start from
    asgd run my.toml --out runs/first  train on real worker processes
    asgd report runs/first             what happened, and was it predicted?

    Exit status: 0 success, 1 the run failed or was interrupted, 2 unusable input.
    """


@click.command(cls=Command)
@out_option
@paths_option
@quiet_option
def demo(out: Path | None, paths: int, quiet: bool) -> None:
    """Train, fit, predict and report on built-in settings.

    Softmax regression on the digits data with four workers.

    \b
    asgd demo --out runs/demo
    """
    import cluster
    from analysis.report.write import write_report
    from analysis.study import Study
    from asgd.config.make import make_config
    from asgd.console.live import LiveRun
    from asgd.rundir.writer import default_path

    settings = make_config(DEMO)
    observe = partial(LiveRun, "train", quiet=quiet)
    path = cluster.run(settings, out or default_path(settings, "demo"), observe=observe)
    say(f"run      {path}")
    study = Study.open(path)
    predict_if_missing(study, paths, quiet)
    page = write_report(study)
    say(f"{study.fit}\n\n{study.score}\n")
    say(f"report   {page}")


_TRAIN = (init, run, simulate, import_log, runs, status, workers, verify)
_ANALYSE = (profile, predict, report, plan, whatif, export)
for _command in (*_TRAIN, *_ANALYSE, demo, completion):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 1 the run failed, 2 unusable input."""
    quiet_matplotlib()
    with one_line_errors(_with_advice):
        status = cli.main(arguments, prog_name="asgd", standalone_mode=False)
        if sys.stdout is not None:  # it is None after `>&-`
            sys.stdout.flush()
        if isinstance(status, int):  # click returns the exit status of a command that exits
            sys.exit(status)


def _with_advice(error: DivergedError) -> str:
    from analysis.prediction.advice import advised

    return advised(error)


if __name__ == "__main__":
    main()
