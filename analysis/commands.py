"""The commands that analyse: `asgd profile`, `predict`, `report`, `plan`, `whatif`.

Commands import slow modules when they run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from asgd.console.options import (
    PATH,
    Numbers,
    force_option,
    json_option,
    paths_option,
    quiet_option,
    run_argument,
    runs_argument,
    set_option,
)
from asgd.console.output import Command, print_json, print_table, say
from asgd.errors import InputError
from asgd.printable import printable

if TYPE_CHECKING:
    from analysis.profile.fit import StalenessFit
    from analysis.study import Study
    from asgd.console.live import Bar
    from asgd.rundir.reader import Run

_LONG_SECONDS = 10.0  # announce a prediction that takes longer


@click.command(cls=Command)
@runs_argument
@json_option
@quiet_option
def profile(runs: Sequence[Path], as_json: bool, quiet: bool) -> None:
    """Fit staleness laws to RUNS and report which one fits best.

    Also tests whether independent workers explain the staleness, and reports whose gradients were
    discarded. For several runs, a table at the end compares mu with 1 - 1/P.

    Columns: zeros, the share of updates of staleness 0; llf, the log-likelihood; tv, the total
    variation distance to the measured law; pvalue, of the parametric bootstrap.

    With --json, several runs give an object with the list `runs`.

    \b
    asgd profile runs/digits
    asgd profile runs/p4 runs/p8 --json
    """
    from analysis.profile.fitting import compare_fits
    from analysis.profile.queueing import explains_staleness
    from analysis.profile.verdict import name_in_words
    from analysis.profile.work import bias
    from analysis.study import Study
    from asgd.console.live import Bar
    from asgd.records.columns import is_record

    found, fits = [], []
    for path in runs:
        if is_record(path):
            data, record_fit = _profile_record(path, as_json, quiet)
            found.append(data)
            fits += [] if record_fit is None else [(printable(str(path)), record_fit)]
            continue
        study = Study.open(path)
        laws = study.fit.laws
        with Bar("profile", len(laws), quiet) as bar:
            for done, (name, law) in enumerate(laws.items()):
                bar.whole(name_in_words(name), done)
                law.work_out()
        study.save()
        fit, check, work = study.fit, explains_staleness(study.run), bias(study.run)
        fits.append((printable(str(path)), fit))
        if as_json:
            queue = check and {**asdict(check), "law": check.law.to_dict(), "holds": check.holds}
            found.append({"run": str(path), **fit.to_dict(), "queue": queue, "work": work})
        else:
            say(f"{printable(str(path))}\n{fit}")
            if work:
                say(work["sentence"])
            say(f"{check.sentence}\n" if check else _without_rows(study.run))
    if as_json:
        print_json(found[0] if len(found) == 1 else {"runs": found})
    elif len(fits) > 1:
        table = compare_fits(fits).drop(columns="verdict")
        say(table.to_string(float_format="{:.4g}".format))


@click.command(cls=Command)
@run_argument
@paths_option
@click.option(
    "--method",
    type=click.Choice(["auto", "simulate", "fast", "probe"]),
    default="auto",
    show_default=True,
    help="auto: exact moments where known, else paths; simulate: paths; fast: one mean path; "
    "probe: stability only, at a tenth of the run's gradients, or more for a short run.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the paths.  [default: the run's]")
@force_option
@json_option
@quiet_option
def predict(
    run: Path,
    paths: int,
    method: Literal["auto", "simulate", "fast", "probe"],
    seed: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Predict the loss curve of RUN and score it.

    \b
    asgd predict runs/digits --paths 200
    asgd predict runs/digits --method fast
    asgd predict runs/digits --method probe
    """
    import msgspec

    from analysis.report.headline import left_out
    from analysis.study import Study
    from asgd.console.live import Bar, Importing

    study = Study.open(run)
    with Importing(quiet):
        study.check_problem("predict", force=force)
    study.save()
    if method == "probe":
        probed = study.probe(force=force)
        study.save()
        if as_json:
            print_json(msgspec.to_builtins(probed))
        else:
            say(probed.sentence)
        return
    with Bar("predict", 1, quiet) as bar:
        prediction, score = study.predict(
            paths=paths,
            method=method,
            seed=seed,
            force=force,
            announce=_announce(bar, paths),
            progress=bar.whole,
        )
    study.save()
    if as_json:
        scores = {name: score.numbers(name) for name in score.models}
        print_json({**msgspec.to_builtins(prediction.settings), "scores": scores})
    else:
        sentences = [prediction.settings.stability.sentence, left_out(study.runs).strip()]
        say("\n\n".join([str(score), *filter(None, sentences)]))


@click.command(cls=Command)
@runs_argument
@click.option("-o", "--output", type=PATH, help="HTML file.  [default: in the first run]")
@click.option("--figures", type=PATH, help="Directory for every figure as SVG and CSV.")
@paths_option
@force_option
@quiet_option
def report(
    runs: Sequence[Path],
    output: Path | None,
    figures: Path | None,
    paths: int,
    force: bool,
    quiet: bool,
) -> None:
    """Write one HTML report on RUNS.

    The file is self-contained and compares several runs.

    Runs without a stored prediction are predicted first.

    \b
    asgd report runs/digits -o digits.html
    asgd report runs/p2 runs/p4 runs/p8 -o workers.html --figures figures
    """
    from analysis.records.report import write_record_report
    from analysis.records.study import RecordStudy
    from analysis.report.write import check_places, write_report
    from analysis.study import Study
    from asgd.console.live import Importing
    from asgd.records.columns import is_record

    check_places(output, figures)  # before any work
    records = [path for path in runs if is_record(path)]
    if records and len(runs) > 1:
        raise InputError(f"{records[0]}: a record; expected it alone, or runs only")
    if records:
        say(write_record_report(RecordStudy.open(records[0]), output, figures))
        return
    studies = [Study.open(path) for path in runs]
    with Importing(quiet):
        for study in studies:
            study.check_problem("report", force=force)
    for study in studies:
        predict_if_missing(study, paths, quiet, force)
    say(write_report(studies, output, figures))


@click.command(cls=Command)
@click.argument("source", metavar="CONFIG|RUN", type=PATH)
@set_option
@click.option("--workers", type=Numbers(int), help="Such as 2,4,8.  [default: P/2,P,2P]")
@click.option("--learning-rate", type=Numbers(float), help="[default: half, once, twice its own]")
@click.option("--batch-size", type=Numbers(int), help="Samples a gradient.  [default: its own]")
@click.option("--target", type=float, metavar="LOSS", help="[default: 95 % of the way down]")
@click.option("--updates", type=int, help="How far to look ahead.  [default: its own]")
@click.option("--probe", is_flag=True, help="Time the gradient here, at two batch sizes.")
@click.option("--seconds", type=float, help="Time of the plan for a network.  [default: 300]")
@force_option
@json_option
@quiet_option
def plan(
    source: Path,
    overrides: Sequence[str],
    workers: list[int] | None,
    learning_rate: list[float] | None,
    batch_size: list[int] | None,
    target: float | None,
    updates: int | None,
    probe: bool,
    seconds: float | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Predict other workers, learning rates and batch sizes.

    Starts no workers. Uses the times in CONFIG, or the cycle times measured in RUN; supports every
    mode, rule and schedule. For each combination, simulated paths give the staleness, the speed,
    the learning rate relative to the stability limit, and the updates and seconds to the target
    loss. The fastest stable combination is marked. A network, whose gradients of all samples are
    costly, gets as many paths as fit into --seconds, and its curvatures are probed.

    \b
    asgd plan run.toml --workers 2,4,8,16
    asgd plan runs/digits --learning-rate 0.05,0.1,0.2 --target 0.4
    asgd plan run.toml --batch-size 8,64 --probe
    asgd plan run.toml --set cluster.mode=sync --json
    """
    from analysis.planning.effort import SECONDS
    from analysis.planning.plan import plan as plan_source
    from asgd.config.make import load_config
    from asgd.console.live import IMPORTING, Bar
    from asgd.rundir.repeats import read_runs

    if source.is_dir() and overrides:
        raise InputError(
            f"--set {overrides[0]}: expected a configuration, because a run cannot change: {source}"
        )
    repeats = read_runs(source) if source.is_dir() else []
    start = repeats[0] if repeats else load_config(source, overrides)
    with Bar("plan", 1, quiet) as bar:
        bar.whole(IMPORTING, 0.0)
        found = plan_source(
            start,
            workers=workers,
            learning_rates=learning_rate,
            batch_sizes=batch_size,
            target=target,
            updates=updates,
            probe=probe,
            seconds=SECONDS if seconds is None else seconds,
            force=force,
            progress=bar.whole,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(found.cells())
        say(f"\n{found.sentence}\n{printable(found.note)}")
        if len(repeats) > 1:
            say(f"Only the first of {len(repeats)} repeats was used.")


@click.command(cls=Command)
@click.argument("record", type=PATH)
@click.option("--cap", "caps", type=Numbers(int), help="Such as 1,2,4.  [default: 1, 2, 4, ...]")
@click.option("--momentum", type=float, default=0.0, show_default=True, help="Of the heavy ball.")
@json_option
@quiet_option
def whatif(
    record: Path, caps: list[int] | None, momentum: float, as_json: bool, quiet: bool
) -> None:
    """Estimate the cost of staleness, and the effect of a cap on it.

    RECORD is a directory written by `asgd import` or a `StalenessLog`; needs no model. For each
    cap: the share of the items beyond it, their samplers, and how much larger a stable step could
    be if these were discarded or paced. Also for half and twice the samplers.

    \b
    asgd whatif runs/theirs --cap 2
    asgd whatif runs/theirs --momentum 0.9 --json
    """
    from analysis.records.means import MeansProfile
    from analysis.records.study import RecordStudy
    from analysis.records.whatif import bounds_of_caps, what_if
    from asgd.console.live import Bar
    from asgd.records.columns import is_record

    if not is_record(record):
        raise InputError(f"{record}: expected a record of a log; for runs, use `asgd plan`")
    study = RecordStudy.open(record)
    if isinstance(study.profile, MeansProfile):
        sentences = bounds_of_caps(study.profile, caps)
        if as_json:
            print_json({**study.profile.to_dict(), "caps": sentences})
        else:
            say("\n".join([str(study.profile), "", *sentences]))
        return
    with Bar("whatif", 1, quiet) as bar:
        found = what_if(study, caps=caps, momentum=momentum, progress=bar.whole)
    if as_json:
        print_json({"run": str(record), **found.to_dict()})
        return
    for line in str(found).splitlines():
        say(printable(line))


def _without_rows(run: Run) -> str:
    """Return the line on what a profile cannot tell without rows of updates; "" with rows."""
    if run.keeps_rows:
        return ""
    return (
        'run.record = "counts" keeps no rows, so start-up and intervals are of whole spans of '
        "updates, and whether independent workers explain the staleness is unknown.\n"
    )


def _profile_record(
    path: Path, as_json: bool, quiet: bool
) -> tuple[dict[str, Any], StalenessFit | None]:
    """Profile a record, store and print it; return it as JSON values, and its fit."""
    from analysis.profile.fit import StalenessFit
    from analysis.profile.verdict import name_in_words
    from analysis.records.course import spells_in_words
    from analysis.records.split import split_of
    from analysis.records.study import RecordStudy
    from asgd.console.live import Bar
    from asgd.console.records import sentences

    study = RecordStudy.open(path)
    profile = study.profile
    fit = profile if isinstance(profile, StalenessFit) else None
    laws = {} if fit is None else fit.laws
    with Bar("profile", max(len(laws), 1), quiet) as bar:
        for done, (name, law) in enumerate(laws.items()):
            bar.whole(name_in_words(name), done)
            law.work_out()
    study.save()
    if not as_json:
        say(f"{printable(str(path))}\n{profile}")
        told = filter(None, (split_of(study.record), spells_in_words(study.record)))
        more = [*map(str, told), *sentences(study.record.about)]
        say("\n".join(["", *map(printable, more), ""]))
    return {"run": str(path), **study.to_dict()}, fit


def predict_if_missing(study: Study, paths: int, quiet: bool, force: bool = False) -> None:
    """Predict and store, with a bar, unless a prediction is stored; announce a long one."""
    from asgd.console.live import Bar

    with Bar("predict", 1, quiet) as bar:
        study.predict_if_missing(
            paths=paths, force=force, announce=_announce(bar, paths), progress=bar.whole
        )


def _announce(bar: Bar, paths: int) -> Callable[[float], None] | None:
    """Return a callback that announces a long prediction, None if nothing is shown."""
    from analysis.prediction.duration import in_words

    def say(seconds: float) -> None:
        if seconds >= _LONG_SECONDS:
            bar.say(
                f"{paths} paths of each model take about {in_words(seconds)}; "
                "fewer --paths, or `asgd predict --method fast`, take less"
            )

    return say if bar.shown else None
