"""The command line: `asgd run`, `simulate`, `profile`, `predict`, `report`, `demo`.

The one module that imports from every package. What is slow to import (Ray, SciPy, matplotlib) is
imported inside the command that needs it, so that `asgd --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asgd.errors import AsgdError, RunFailedError

if TYPE_CHECKING:
    from analysis.fit import StalenessFit
    from asgd.config import RunConfig
    from asgd.progress import Progress
    from asgd.trace import Run

# Four workers near the edge of stability, where the law of the staleness shows in the loss.
DEMO = {
    "optimizer": {"learning_rate": 0.8, "batch_size": 64},
    "cluster": {"workers": 4},
    "run": {"updates": 600, "eval_every": 4},
}

config_argument = click.argument("config", type=click.Path(path_type=Path))
run_argument = click.argument("run", type=click.Path(path_type=Path))
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, repeatable."
)
out_option = click.option(
    "--out", type=click.Path(path_type=Path), help="Run directory to make.  [default: under runs/]"
)
paths_option = click.option(
    "--paths", type=click.IntRange(min=2), default=64, show_default=True, help="Paths per ensemble."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="asgd")
def cli() -> None:
    """Run asynchronous SGD, measure its staleness, predict its loss curve.

    \b
    asgd run scripts/configs/digits.toml --out runs/digits
    asgd profile runs/digits
    asgd report runs/digits
    """


@cli.command()
@config_argument
@set_option
@out_option
@click.option("--address", help="Address of a running Ray cluster.  [default: start one here]")
def run(config: Path, overrides: Sequence[str], out: Path | None, address: str | None) -> None:
    """Train on real worker processes as CONFIG (TOML) says.

    \b
    asgd run scripts/configs/digits.toml --set cluster.workers=8
    """
    from asgd.config import load_config

    path = _train(load_config(config, overrides), out or _default_out(config), address)
    click.echo(path)


@cli.command()
@config_argument
@set_option
@out_option
def simulate(config: Path, overrides: Sequence[str], out: Path | None) -> None:
    """Run CONFIG (TOML) in virtual time, reproducibly, in one process.

    \b
    asgd simulate scripts/configs/digits.toml --set simulation.staleness=geometric
    """
    from asgd.config import load_config
    from asgd.experiment import run_repeats
    from asgd.simulate import simulate as simulate_run

    def one(settings: RunConfig, out: Path) -> None:
        with _Progress("simulate", settings.run.updates) as progress:
            simulate_run(settings, out, progress.training)

    click.echo(run_repeats(load_config(config, overrides), out or _default_out(config), one))


@cli.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@json_option
def profile(runs: Sequence[Path], as_json: bool) -> None:
    """Fit staleness laws to RUNS and say whether the geometric law holds.

    \b
    asgd profile runs/digits
    """
    from analysis.experiment import fit_runs
    from asgd.experiment import read_runs

    for path in runs:
        fit = fit_runs(read_runs(path))
        fit.save(path)
        if as_json:
            click.echo(json.dumps(fit.to_dict()))
        else:
            click.echo(f"{path}\n{fit}\n")


@cli.command()
@run_argument
@paths_option
@json_option
def predict(run: Path, paths: int, as_json: bool) -> None:
    """Predict the loss curve of RUN and score the prediction.

    \b
    asgd predict runs/digits --paths 200
    """
    from asgd.experiment import read_runs

    prediction, score = _predict(run, read_runs(run), paths)
    if as_json:
        scores = {name: asdict(model) for name, model in score.models.items()}
        click.echo(json.dumps({**prediction.settings, "scores": scores}))
    else:
        click.echo(f"{score}\n\n{prediction.settings['stability']['sentence']}")


@cli.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="HTML file to write.")
@paths_option
def report(runs: Sequence[Path], output: Path | None, paths: int) -> None:
    """Write one self-contained HTML report on RUNS.

    Predicts first where no prediction is stored.

    \b
    asgd report runs/digits -o digits.html
    """
    from asgd.experiment import read_runs

    click.echo(_report([run for path in runs for run in read_runs(path)], output, paths))


@cli.command()
@out_option
@paths_option
def demo(out: Path | None, paths: int) -> None:
    """Train on real workers, fit, predict and report, all on built-in settings.

    Softmax regression on the digits data with four workers.
    """
    from asgd.config import make_config
    from asgd.trace import read_run

    opened = read_run(_train(make_config(DEMO), out or _default_out(Path("demo")), None))
    click.echo(f"run      {opened.path}")
    path = _report([opened], None, paths)
    click.echo(f"{_fit(opened.path, [opened])}\n")
    click.echo(f"report   {path}")


def _train(config: RunConfig, out: Path, address: str | None) -> Path:
    from asgd.experiment import run_repeats
    from cluster.launch import run as run_cluster
    from cluster.session import ray_session

    def one(config: RunConfig, out: Path) -> None:
        with _Progress("train", config.run.updates) as progress:
            run_cluster(config, out, address, progress.training)

    # Repeats share one Ray.
    with ray_session(address) if config.run.repeats > 1 else nullcontext():
        return run_repeats(config, out, one)


def _fit(path: Path, runs: Sequence[Run]) -> StalenessFit:
    from analysis.experiment import fit_runs

    fit = fit_runs(runs)
    fit.save(path)
    return fit


def _predict(path: Path, runs: Sequence[Run], paths: int) -> tuple[Any, Any]:
    from analysis.compare import compare
    from analysis.predict import DEFAULT_MODELS
    from analysis.predict import predict as predict_run

    with _Progress("predict", len(DEFAULT_MODELS)) as progress:
        fit = _fit(path, runs)
        prediction = predict_run(runs, paths=paths, fit=fit, progress=progress.model)
    prediction.save(path)
    return prediction, compare(runs, prediction)


def _report(runs: Sequence[Run], output: Path | None, paths: int) -> Path:
    from analysis.predict import has_prediction
    from analysis.report import write_report

    for run in runs:
        if not has_prediction(run):
            _predict(run.path, [run], paths)
    return write_report(runs, output)


def _default_out(config: Path) -> Path:
    """Return a directory under runs/ named after the configuration file and the time."""
    from datetime import datetime

    return Path("runs") / f"{config.stem}-{datetime.now():%Y%m%d-%H%M%S}"


class _Progress:
    """A progress bar on a terminal, nothing when standard error is piped."""

    def __init__(self, task: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(task, total=total, note="")
        self._models: dict[str, float] = {}

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def training(self, progress: Progress) -> None:
        """Show how a run stands."""
        note = f"{progress.updates_per_second:,.0f} updates/s"
        note += f"  staleness {progress.mean_staleness:.2f}"
        note += "" if progress.loss is None else f"  loss {progress.loss:.4g}"
        self._bar.update(self._task, completed=progress.update, note=note)

    def model(self, name: str, share: float) -> None:
        """Show the share of the work of each model that is done."""
        self._models[name] = share
        self._bar.update(self._task, completed=sum(self._models.values()), note=name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 1 the run failed, 2 unusable input."""
    try:
        cli.main(arguments, standalone_mode=False)
    except click.exceptions.Exit as request:
        sys.exit(request.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 1)
    except RunFailedError as error:
        _fail(str(error), 1)
    except AsgdError as error:
        _fail(str(error), 2)


def _fail(message: str, status: int) -> None:
    click.echo(f"asgd: {message}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
