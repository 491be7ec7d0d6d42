"""The command line: `asgd init`, `run`, `simulate`, `status`, `profile`, `predict`, `report`, ...

The one module that imports from every package. What is slow to import (Ray, SciPy, matplotlib) is
imported inside the command that needs it, so that `asgd --help` answers at once.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asgd.errors import AsgdError, InputError, RunFailedError

if TYPE_CHECKING:
    from analysis.fit import StalenessFit
    from analysis.prediction import Prediction
    from analysis.score import Score
    from asgd.config import RunConfig
    from asgd.trace import Run

# Four workers near the edge of stability, where the law of the staleness shows in the loss.
DEMO = {
    "optimizer": {"learning_rate": 0.8, "batch_size": 64},
    "cluster": {"workers": 4, "compute_time": {"law": "gamma", "mean": 0.01, "variation": 0.2}},
    "run": {"updates": 600, "eval_every": 4},
}

_PATH = click.Path(path_type=Path)
config_argument = click.argument("config", type=_PATH)
run_argument = click.argument("run", type=_PATH)
runs_argument = click.argument("runs", type=_PATH, nargs=-1, required=True)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, repeatable."
)
out_option = click.option(
    "--out", type=_PATH, help="Run directory to make.  [default: under runs/]"
)
paths_option = click.option(
    "--paths", type=click.IntRange(min=2), default=64, show_default=True, help="Paths per ensemble."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
lines_option = click.option(
    "--lines", is_flag=True, help="Without a terminal, say how it stands every 10 s."
)


class _Commands(click.Group):
    """Commands that are suggested when one is misspelt."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            accepted = ", ".join(self.commands)
            raise InputError(f"{args[0]}: unknown command; {hint}accepted: {accepted}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="asgd")
def cli() -> None:
    """Run asynchronous SGD, measure its staleness, predict its loss curve.

    \b
    asgd init my.toml                  a commented configuration to start from
    asgd run my.toml --out runs/first  train on real worker processes
    asgd report runs/first             what happened, and was it predicted?

    Exit status: 0 success, 1 the run failed or was interrupted, 2 unusable input.
    """


@cli.command()
@click.argument("config", type=_PATH, default="asgd.toml")
def init(config: Path) -> None:
    """Write a commented starter configuration to CONFIG.

    \b
    asgd init                          writes asgd.toml
    asgd init experiments/first.toml
    """
    from importlib.resources import files

    if config.exists():
        raise InputError(f"{config}: exists; choose another name")
    try:
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_bytes(files("asgd").joinpath("starter.toml").read_bytes())
    except OSError as error:
        raise InputError(f"{config}: cannot be written ({error.strerror or error})") from None
    click.echo(config)


@cli.command()
@click.argument("config", type=_PATH, required=False)
@set_option
@out_option
@click.option("--resume", type=_PATH, metavar="RUN", help="Go on with RUN, which was cut short.")
@click.option("--address", help="Address of a running Ray cluster.  [default: start one here]")
@quiet_option
@lines_option
def run(
    config: Path | None,
    overrides: Sequence[str],
    out: Path | None,
    resume: Path | None,
    address: str | None,
    quiet: bool,
    lines: bool,
) -> None:
    """Train on real worker processes as CONFIG (TOML) says.

    \b
    asgd run scripts/configs/digits.toml --out runs/digits
    asgd run scripts/configs/digits.toml --set cluster.workers=8 --set run.seed=1
    asgd run --resume runs/digits
    """
    from asgd.config import load_config

    if resume is not None:
        if config or overrides or out:
            raise InputError(
                f"--resume {resume}: goes on as it began, without CONFIG, --set, --out"
            )
        click.echo(_resume(resume, address, quiet, lines))
        return
    if config is None:
        raise click.UsageError("Missing argument 'CONFIG'.")
    settings = load_config(config, overrides)
    click.echo(_train(settings, out or _default_out(config), address, quiet, lines))


@cli.command()
@config_argument
@set_option
@out_option
@quiet_option
@lines_option
def simulate(
    config: Path, overrides: Sequence[str], out: Path | None, quiet: bool, lines: bool
) -> None:
    """Run CONFIG (TOML) in virtual time.

    One process, reproducible to the last bit, no Ray.

    \b
    asgd simulate scripts/configs/digits.toml --out runs/sim
    asgd simulate scripts/configs/digits.toml --set simulation.staleness=geometric
    """
    from asgd.config import load_config
    from asgd.experiment import run_repeats
    from asgd.live import LiveRun
    from asgd.simulation import simulate as simulate_run

    def one(settings: RunConfig, out: Path) -> None:
        with LiveRun("simulate", quiet=quiet, lines=lines) as live:
            simulate_run(settings, out, live)

    click.echo(run_repeats(load_config(config, overrides), out or _default_out(config), one))


@cli.command()
@click.argument("directory", type=_PATH, default="runs")
@json_option
def runs(directory: Path, as_json: bool) -> None:
    """List the runs in DIRECTORY and how they stand.

    \b
    asgd runs                          what is under runs/
    asgd runs experiments --json
    """
    from asgd.listing import list_runs

    rows = list_runs(directory)
    if as_json:
        _print_json({"runs": rows})
        return
    if not rows:
        click.echo(f"{directory}: no run yet; `asgd run` makes one")
        return
    heads = ("run", "state", "problem", "workers", "updates", "updates/s", "staleness", "loss")
    table = [heads]
    for row in rows:
        if row["state"] == "unreadable":
            table.append((row["run"], "unreadable", *[""] * 6))
            continue
        updates = f"{row['updates']}/{row['of']}"
        numbers = (row["updates_per_second"], row["mean_staleness"], row["loss"])
        shown = tuple("" if number is None else f"{number:.4g}" for number in numbers)
        table.append(
            (row["run"], row["state"], row["problem"], str(row["workers"]), updates, *shown)
        )
    for line in _aligned(table):
        click.echo(line)


@cli.command()
@run_argument
@json_option
def status(run: Path, as_json: bool) -> None:
    """Tell how RUN stands, also while it runs.

    \b
    asgd status runs/digits
    watch -n 2 asgd status runs/digits
    """
    from asgd.listing import status as status_of
    from asgd.live import sparkline
    from asgd.trace import read_run

    found = status_of(read_run(run))
    if as_json:
        _print_json(found)
        return
    number = {
        name: "none yet" if value is None else f"{value:.4g}"
        for name, value in found.items()
        if value is None or isinstance(value, (int, float))
    }
    rows = [
        ("run", f"{found['run']}, {found['problem']}, {found['state']}"),
        ("updates", f"{found['updates']} of {found['of']}"),
        ("updates/s", number["updates_per_second"]),
        (
            "staleness",
            f"{number['mean_staleness']} mean, {number['recent_staleness']} over the last tenth",
        ),
        ("loss", f"{number['loss']}  {sparkline(found['losses'])}"),
        ("workers", f"{len(found['by_worker'])} of {found['workers']} have contributed"),
        *(("event", text) for text in found["events"][-10:]),
    ]
    for line in _aligned(rows):
        click.echo(line)


@cli.command()
@run_argument
@click.argument("count", metavar="N", type=int)
@json_option
def workers(run: Path, count: int, as_json: bool) -> None:
    """Change how many workers RUN has to N, while it goes on.

    Removed workers finish the gradient they are computing.

    
    asgd workers runs/digits 8
    """
    from cluster.team import set_workers

    change = set_workers(run, count)
    if as_json:
        _print_json(asdict(change))
    else:
        click.echo(change)


@cli.command()
@runs_argument
@json_option
def profile(runs: Sequence[Path], as_json: bool) -> None:
    """Fit staleness laws to RUNS and say which one holds.

    With --json: one object per run and line.

    \b
    asgd profile runs/digits
    asgd profile runs/p4 runs/p8 --json
    """
    from analysis.experiment import fit_runs
    from asgd.experiment import read_runs

    for path in runs:
        fit = fit_runs(read_runs(path))
        fit.save(path)
        if as_json:
            _print_json(fit.to_dict())
        else:
            click.echo(f"{path}\n{fit}\n")


@cli.command()
@run_argument
@paths_option
@json_option
@quiet_option
def predict(run: Path, paths: int, as_json: bool, quiet: bool) -> None:
    """Predict the loss curve of RUN and score it.

    \b
    asgd predict runs/digits --paths 200
    """
    from asgd.experiment import read_runs

    prediction, score = _predict(run, read_runs(run), paths, quiet)
    if as_json:
        scores = {name: asdict(model) for name, model in score.models.items()}
        _print_json({**prediction.settings, "scores": scores})
    else:
        click.echo(f"{score}\n\n{prediction.settings['stability']['sentence']}")


@cli.command()
@runs_argument
@click.option("-o", "--output", type=_PATH, help="HTML file.  [default: in the first run]")
@click.option("--figures", type=_PATH, help="Directory for every figure as SVG and CSV.")
@paths_option
@quiet_option
def report(
    runs: Sequence[Path], output: Path | None, figures: Path | None, paths: int, quiet: bool
) -> None:
    """Write one HTML report on RUNS.

    A self-contained file; several runs are compared.

    Predicts first where no prediction is stored.

    \b
    asgd report runs/digits -o digits.html
    asgd report runs/p2 runs/p4 runs/p8 -o workers.html --figures figures
    """
    click.echo(_report(runs, output, figures, paths, quiet))


@cli.command()
@out_option
@paths_option
@quiet_option
def demo(out: Path | None, paths: int, quiet: bool) -> None:
    """Train, fit, predict and report on built-in settings.

    Softmax regression on the digits data with four workers.

    \b
    asgd demo --out runs/demo
    """
    from asgd.config import make_config
    from asgd.experiment import read_runs

    path = _train(make_config(DEMO), out or _default_out(Path("demo")), None, quiet, False)
    click.echo(f"run      {path}")
    page = _report([path], None, None, paths, quiet)
    click.echo(f"{_fit(path, read_runs(path))}\n")
    click.echo(f"report   {page}")


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script for completion in SHELL.

    \b
    eval "$(asgd completion bash)"     for this session, or in ~/.bashrc
    asgd completion fish > ~/.config/fish/completions/asgd.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    click.echo(kind(cli, {}, "asgd", "_ASGD_COMPLETE").source())


def _train(config: RunConfig, out: Path, address: str | None, quiet: bool, lines: bool) -> Path:
    from asgd.experiment import run_repeats
    from asgd.live import LiveRun
    from cluster.launch import run as run_cluster
    from cluster.session import ray_session

    def one(config: RunConfig, out: Path) -> None:
        with LiveRun("train", out, quiet=quiet, lines=lines) as live:
            run_cluster(config, out, address, live)

    # Repeats share one Ray.
    port = config.metrics.port
    with ray_session(address, metrics_port=port) if config.run.repeats > 1 else nullcontext():
        return run_repeats(config, out, one)


def _resume(path: Path, address: str | None, quiet: bool, lines: bool) -> Path:
    from asgd.live import LiveRun
    from cluster.launch import resume

    with LiveRun("train", path, quiet=quiet, lines=lines) as live:
        return resume(path, address, live)


def _fit(path: Path, runs: Sequence[Run]) -> StalenessFit:
    from analysis.experiment import fit_runs

    fit = fit_runs(runs)
    fit.save(path)
    return fit


def _predict(path: Path, runs: Sequence[Run], paths: int, quiet: bool) -> tuple[Prediction, Score]:
    from analysis.prediction import DEFAULT_MODELS
    from analysis.prediction import predict as predict_run
    from analysis.score import compare

    with _Bar("predict", len(DEFAULT_MODELS), quiet) as bar:
        fit = _fit(path, runs)
        prediction = predict_run(runs, paths=paths, fit=fit, progress=bar.part)
    prediction.save(path)
    return prediction, compare(runs, prediction)


def _report(
    paths: Sequence[Path], output: Path | None, figures: Path | None, ensemble: int, quiet: bool
) -> Path:
    from analysis.prediction import has_prediction
    from analysis.report import write_report
    from asgd.experiment import read_runs

    for path in paths:
        runs = read_runs(path)
        if not has_prediction(path):
            _predict(path, runs, ensemble, quiet)
    return write_report(paths, output, figures)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _default_out(config: Path) -> Path:
    """Return a directory under runs/ named after the configuration file and the time."""
    from datetime import datetime

    return Path("runs") / f"{config.stem}-{datetime.now():%Y%m%d-%H%M%S}"


class _Bar:
    """A progress bar of several parts on a terminal, nothing elsewhere."""

    def __init__(self, task: str, parts: int, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        hidden = quiet or not console.is_terminal
        self._bar = Progress(console=console, transient=True, disable=hidden)
        self._task, self._name = self._bar.add_task(task, total=parts), task
        self._done: dict[str, float] = {}

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def part(self, name: str, share: float) -> None:
        """Show the share of a part that is done."""
        self._done[name] = share
        description = f"{self._name} {name}"
        self._bar.update(self._task, completed=sum(self._done.values()), description=description)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 1 the run failed, 2 unusable input."""
    try:
        cli.main(arguments, prog_name="asgd", standalone_mode=False)
    except click.exceptions.Exit as request:
        sys.exit(request.exit_code)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "asgd"
        _fail(f"{error.format_message().rstrip('.')}; `{where} --help` shows its use", 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 1)
    except RunFailedError as error:
        _fail(str(error), 1)
    except AsgdError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}", 2)


def _print_json(data: Any) -> None:
    """Print one JSON object; what is not a finite number is null."""
    click.echo(json.dumps(_finite(data), allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _fail(message: str, status: int) -> None:
    click.echo(f"asgd: {message}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
