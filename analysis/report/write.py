"""Writes a self-contained HTML report on run directories.

The page needs no network: styles, script and figures are inline. The template engine escapes every
text that comes from a run.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FunctionLoader, StrictUndefined

from analysis import figures
from analysis.prediction.predict import Prediction
from analysis.prediction.score import Score
from analysis.profile.dependence import START_UP_RULE
from analysis.profile.fit import StalenessFit
from analysis.report import pictures
from analysis.report.activity import events_table, timeline, workers_table
from analysis.report.clock import clock_of
from analysis.report.comparison import compare_runs, comparison_headline, comparison_verdict, labels
from analysis.report.headline import headline, problem_name
from analysis.report.inline_svg import SvgInliner, page_colour
from analysis.report.judgement import verdict
from analysis.report.pictures import Picture
from analysis.report.suggestions import stability_margin
from analysis.report.tables import page_table
from analysis.study import Study
from asgd.counted import counted
from asgd.errors import InputError, written
from asgd.rundir.columns import SHARED
from asgd.rundir.files import replace_file

_LONGEST_TABLE = 200  # events shown
_ERROR_NAMES = {
    "relative_error": "relative error",
    "worst_error": "worst point",
    "coverage": "coverage",
    "crps": "CRPS",
}
_SHARES = ("relative_error", "worst_error", "coverage")  # shown in %
_LAW_NAMES = {"aic": "AIC", "bic": "BIC", "tv": "distance", "pvalue": "p"}
_COMPARISON_NAMES = {
    "run": "run",
    "clock": "kind",
    "workers": "workers",
    "mean": "mean staleness",
    "mu": "mu",
    "mu_expected": "1\N{NO-BREAK SPACE}\N{MINUS SIGN}\N{NO-BREAK SPACE}1/P",
    "law": "law",
    "updates_per_second": "updates/s",
    "updates_to_target": "updates to target",
    "seconds_to_target": "seconds to target",
}
_OF_SECONDS = ("updates/s", "seconds to target")  # columns omitted if clocks are mixed
_INTERVALS = (
    "In brackets: 95 % intervals over the repeats; that of the relative error comes from the "
    "triangle inequality and is wider than necessary."
)


def write_report(
    studies: str | Path | Study | Sequence[str | Path | Study],
    output: str | Path | None = None,
    figures_directory: str | Path | None = None,
) -> Path:
    """Write the report on one or several runs and return its path.

    >>> analysis.write_report(run.path, "page.html").name
    'page.html'

    Parameters
    ----------
    studies
        One or several studies, or directories of a run or of its repeats. Without a prediction
        the report describes only what happened.
    output
        The file; `report.html` in the first directory by default.
    figures_directory
        Directory for every figure as SVG with its data as CSV; default none.

    Raises
    ------
    InputError
        A run recorded no update or cannot be read, or a file cannot be written.
    """
    given = [studies] if isinstance(studies, str | Path | Study) else studies
    read = [one if isinstance(one, Study) else Study.open(one) for one in given]
    output = Path(output) if output is not None else read[0].path / "report.html"
    check_places(output, figures_directory)
    sections, drawn = [], []
    for number, study in enumerate(read, start=1):
        section, own = _section(study, f"run{number}-" if len(read) > 1 else "")
        sections.append(section)
        drawn += own
    comparison = None
    if len(read) > 1:
        comparison, own = _comparison(read)
        drawn += own
    title = sections[0]["title"] if comparison is None else f"{len(read)} runs side by side"
    page = template("report.html.j2").render(
        title=title,
        version=version("asgd"),
        runs=sections,
        comparison=comparison,
        style=part_of_page("page.css"),
        script=part_of_page("page.js"),
    )
    with written(output):
        replace_file(output, page.encode())
        if figures_directory is not None:
            for picture in drawn:
                picture.save(Path(figures_directory))
    return output


def check_places(
    output: str | Path | None = None, figures_directory: str | Path | None = None
) -> None:
    """Create the directories of a report and its figures; fail early if they are not writable.

    Raises
    ------
    InputError
        The output is a directory, or a directory cannot be created.
    """
    if output is not None and Path(output).is_dir():
        file = Path(output) / "report.html"
        raise InputError(f"{output}: is a directory; name a file, such as {file}")
    folders = [] if output is None else [Path(output).parent]
    if figures_directory is not None:
        folders.append(Path(figures_directory))
    for folder in folders:
        with written(folder):
            folder.mkdir(parents=True, exist_ok=True)


def part_of_page(name: str) -> str:
    """Return the text of a file of the page."""
    return files("analysis.report").joinpath("page", name).read_text(encoding="utf-8")


def template(name: str) -> Any:
    """Return a template of a page."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        loader=FunctionLoader(part_of_page),
    )
    environment.filters["inline"] = SvgInliner()
    environment.filters["unbroken"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    return environment.get_template(name)


def _section(study: Study, prefix: str) -> tuple[dict[str, Any], list[Picture]]:
    """Return the template data of one run, and its pictures."""
    run, fit, prediction, score = study.run, study.estimate, study.prediction, study.score
    course, workers, events = timeline(run), workers_table(run), events_table(run)
    unusual = events[events["incident"].astype(bool)]
    loss = _loss_pictures(prefix, study) if len(run.loss) else []
    staleness = pictures.staleness(prefix, run, fit, course, workers, unusual)
    activity = pictures.activity(prefix, run, course, workers, unusual)
    section = {
        "id": prefix + "run",
        "title": _title(study),
        "kind": clock_of(run),
        "verdict": verdict(run, prediction, score, study.missing),
        "workers_note": _workers_note(study),
        "headline": headline(
            study.runs,
            fit,
            prediction,
            score,
            workers,
            unusual,
            doubt=study.doubt,
            missing=study.missing,
            probed=study.probed,
        ),
        "models": [_key(prediction, name) for name in prediction.models] if prediction else [],
        "loss": loss,
        "replayed": prediction is not None and "replay" in prediction.models,
        "scores": score and _scores(score),
        "scores_note": _INTERVALS if score and score.intervals is not None else "",
        "parts": score and _parts(score),
        "staleness": staleness,
        "laws": laws_table(fit),
        "laws_note": (
            f"Fitted to the {counted(len(fit.sample.staleness), fit.nouns.rows)} after the "
            f"start-up. {_start_up(study)} Zeros: share of {fit.nouns.rows} with staleness 0. "
            "Distance: total variation distance between law and data. p: parametric bootstrap with "
            "the serial dependence of the data."
        ),
        "activity": activity,
        "workers": _workers(workers),
        "events": _events(events),
        "events_note": (
            f"The first {_LONGEST_TABLE} of {len(events)}." if len(events) > _LONGEST_TABLE else ""
        ),
        "config": json.dumps(json.loads(run.config.to_json()), indent=2),
        "environment": json.dumps(run.environment, indent=2),
        "reproduce": _reproduce(study),
    }
    return section, [*loss, *staleness, *activity]


def _loss_pictures(prefix: str, study: Study) -> list[Picture]:
    """Return the loss; with a prediction also a short transient and the errors; the metrics."""
    runs, prediction = study.whole, study.prediction
    drawn = [pictures.overlay(prefix, runs, prediction)]
    if prediction is not None and study.score is not None:
        until = pictures.transient(runs)
        if until is not None:
            drawn.append(pictures.overlay(prefix, runs, prediction, until))
        drawn.append(pictures.errors(prefix, study.score))
    return [*drawn, *pictures.metrics(prefix, runs)]


def _start_up(study: Study) -> str:
    """Return the sentences on length and cause of the start-up."""
    fit, trace = study.estimate, study.run.trace
    if len(study.runs) > 1:
        return f"Start-up: {fit.start_up:,} updates of all repeats, {START_UP_RULE}."
    first = trace[trace["read_version"] == 0]
    text = f"Start-up: {fit.start_up:,} of {len(trace):,} updates, {START_UP_RULE}."
    if first.empty:
        return text
    last = first.iloc[-1]
    life = fit.start_up - int(last["update"])
    reason = (
        "the rest is the lifetime of one snapshot"
        if life <= 2 * (2 + fit.geometric.law.mean())
        else f"the {life:,} updates after it would make the mean staleness less certain"
    )
    whom = "several workers" if last["worker"] == SHARED else f"worker {int(last['worker'])}"
    return (
        f"{text} Here the last gradient computed on version 0 was update {int(last['update']):,}, "
        f"by {whom}; {reason}."
    )


def _comparison(studies: Sequence[Study]) -> tuple[dict[str, Any], list[Picture]]:
    """Return the template data of several runs, and the pictures."""
    runs = [study.run for study in studies]
    fits = [study.estimate for study in studies]
    names = labels([study.path for study in studies])
    compared = compare_runs(names, runs, fits, [study.score for study in studies])
    drawn = pictures.comparison(names, runs, compared)
    stabilities = [study.stability for study in studies]
    margins = [stability_margin(one)[0] for one in stabilities]
    verdicts = [one.verdict if one else None for one in stabilities]
    table = compared.table.rename(columns=_COMPARISON_NAMES)
    left_out = _OF_SECONDS if compared.clock == "mixed" else ("kind",)
    columns = [name for name in _COMPARISON_NAMES.values() if name not in left_out]
    errors = compared.table[["run", "workers", *compared.models]].rename(columns=compared.labels)
    percent = [compared.labels[name] for name in compared.models]
    section = {
        "verdict": comparison_verdict([study.score for study in studies]),
        "headline": comparison_headline(runs, fits, compared, margins, verdicts),
        "table": page_table("runs side by side", table[columns]),
        "note": f"Target: loss {compared.target:.4g}, which every run reached.",
        "errors": page_table("errors side by side", errors, percent) if percent else None,
        "figures": drawn,
    }
    return section, drawn


def _title(study: Study) -> str:
    title = f"{problem_name(study.run)}, {counted(study.run.config.cluster.workers, 'workers')}"
    return title if len(study.runs) == 1 else f"{title}, {len(study.runs)} repeats"


def _key(prediction: Prediction, name: str) -> dict[str, str]:
    """Return the legend entry of a model."""
    colour, dash = figures.STYLE[name]
    pattern = "" if dash == "-" else " ".join(f"{2 * length:g}" for length in dash[1])
    return {
        "name": name,
        "label": prediction.label(name),
        "colour": page_colour(colour),
        "dash": pattern,
    }


def _scores(score: Score) -> dict[str, Any]:
    """Return the errors of each model, with intervals in brackets if known."""
    table = score.table()[list(_ERROR_NAMES)].rename(columns=_ERROR_NAMES)
    ranges = {
        name: [score.interval(model, error) or () for model in score.models]
        for error, name in _ERROR_NAMES.items()
    }
    shares = [_ERROR_NAMES[error] for error in _SHARES]
    return page_table("errors of each model", table.reset_index(names="model"), shares, ranges)


def _parts(score: Score) -> dict[str, Any] | None:
    if len(score.parts) < 2:  # without a geometric prediction the error has no parts
        return None
    table = score.parts.reset_index(names="part").rename(columns={"noise": "scatter"})
    return page_table("parts of the error", table, ["error", "scatter"])


def laws_table(fit: StalenessFit) -> dict[str, Any]:
    """Return the fitted laws as a table of a page."""
    table = fit.table().drop(columns="llf").rename(columns=_LAW_NAMES)
    return page_table("staleness laws", table, ["zeros"])


def _events(events: pd.DataFrame) -> dict[str, Any]:
    table = events.drop(columns="incident").head(_LONGEST_TABLE)
    return page_table("events", table.assign(event=table["event"].str.replace("_", " ")))


def _workers_note(study: Study) -> str:
    run = study.runs[0]
    notes = []
    if len(study.runs) > 1:
        notes.append(f"Of {run.path.name}, the first of {len(study.runs)} repeats.")
    if not run.discarded.empty:
        notes.append(
            "Staleness and compute times are those of the applied gradients: of a worker whose "
            "late gradients are discarded, they show the fast ones."
        )
    return " ".join(notes)


def _workers(workers: pd.DataFrame) -> dict[str, Any]:
    table = pd.DataFrame(
        {
            "worker": workers["worker"],
            "updates": workers["updates"],
            "share": workers["share"],
            "updates/s": workers["updates_per_second"],
            "mean staleness": workers["staleness_mean"],
            "median compute time (ms)": 1000 * workers["compute_q50"],
        }
    )
    if "discarded" in workers:
        table.insert(3, "discarded", workers["discarded_share"])
    if workers["transport"].any():
        table.insert(1, "transport", workers["transport"])
    if "host" in workers:
        table.insert(1, "host", workers["host"])
    ranges = {
        name: [(scale * low, scale * high) for low, high in zip(*ends, strict=True)]
        for name, scale, ends in (
            ("mean staleness", 1, (workers["staleness_q05"], workers["staleness_q95"])),
            ("median compute time (ms)", 1000, (workers["compute_q05"], workers["compute_q95"])),
        )
    }
    return page_table("workers", table, ["share", "discarded"], ranges)


def _reproduce(study: Study) -> str:
    """Return the commands that repeat the run and its report."""
    config, prediction = shlex.quote(str(study.path / "config.json")), study.prediction
    real = clock_of(study.run) == "real"
    lines = [f"asgd {'run' if real else 'simulate'} {config} --out NEW_DIRECTORY"]
    if prediction is not None:
        paths = max((prediction.paths(name) or 0 for name in prediction.models), default=0)
        lines.append(f"asgd predict NEW_DIRECTORY{f' --paths {paths}' if paths else ''}")
    lines.append("asgd report NEW_DIRECTORY")
    return "\n".join(lines)
