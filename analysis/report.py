"""Run directories in, one self-contained HTML file out.

The page needs no network: styles and figures are inside it. Every text that comes from a run is
escaped by the template engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from analysis import figures
from analysis.compare import Score, compare
from analysis.fit import StalenessFit, fit_run
from analysis.predict import MODELS, read_prediction
from analysis.verdict import in_words
from asgd.errors import InputError
from asgd.trace import Run, replace_file

# Tail of the staleness histogram that is not drawn.
_INVISIBLE = 1e-3


def write_report(runs: Sequence[Run], output: Path | None = None) -> Path:
    """Write the report on one or several runs and return its path.

    Parameters
    ----------
    runs
        Runs with a stored prediction.
    output
        The file; `report.html` in the directory of the first run by default.

    Raises
    ------
    InputError
        A run has no stored prediction, or the file cannot be written.
    """
    output = output or runs[0].path / "report.html"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(
        files("analysis").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    sections = [_section(run) for run in runs]
    page = template.render(title=sections[0]["title"], runs=sections)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, page.encode())
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error})") from None
    return output


def _section(run: Run) -> dict[str, Any]:
    prediction = read_prediction(run)
    score = compare(run, prediction)
    fit = fit_run(run)
    overlay = figures.loss_overlay([run.loss], prediction.curves)
    return {
        "title": f"{_problem(run)}, {run.config.cluster.workers} workers",
        "headline": headline(run, fit, score),
        "paths": prediction.settings["paths"],
        "overlay": figures.to_svg(overlay, "Observed and predicted loss over updates"),
        "errors": figures.to_svg(
            figures.error_over_time(score.errors), "Error of each model over updates"
        ),
        "scores": _score_table(score),
        "histogram": _histogram(fit),
        "staleness_caption": _schedule_caption(run),
        "laws": _cells(fit.table().round(4)),
        "config": json.dumps(json.loads(run.config.to_json()), indent=2),
        "environment": json.dumps(run.environment, indent=2),
        "reproduce": f"asgd run {run.path / 'config.json'} --out NEW_DIRECTORY",
    }


def headline(run: Run, fit: StalenessFit, score: Score) -> list[str]:
    """Return what a reader should know first, in sentences."""
    config, state = run.config, run.state
    updates = len(run.trace)
    what = (
        f"{_problem(run)} by {config.optimizer.rule} with learning rate "
        f"{config.optimizer.learning_rate:g} and batches of {config.optimizer.batch_size}: "
        f"{updates} updates by {config.cluster.workers} workers, {state}."
    )
    errors = ", ".join(
        f"{MODELS[name]} {100 * model.relative_error:.1f} %" for name, model in score.models.items()
    )
    which = f"Mean error of the predicted loss: {errors}. Closest: {MODELS[score.closest]}."
    return [what, fit.verdict, which]


def _problem(run: Run) -> str:
    problem = run.config.problem
    return f"{problem.kind} on {problem.dataset}" if problem.dataset else problem.kind


def _schedule_caption(run: Run) -> str:
    if run.config.cluster.schedule == "uniform":
        return (
            "Scheduled order: the server drew each next worker uniformly and waited for it; "
            "this is not the order of natural arrival."
        )
    return "Natural order: the server applied gradients as they arrived."


def _histogram(fit: StalenessFit) -> str:
    values = np.asarray(fit.counts, dtype=float)
    visible = np.flatnonzero(values / values.sum() > _INVISIBLE)
    laws = {
        "geometric law": fit.geometric.law,
        in_words(fit.recommended): fit.recommended,
    }
    length = int(visible[-1]) + 2
    l = np.arange(length)
    counts = np.pad(values, (0, max(length - len(values), 0)))[:length]
    axes = figures.staleness_histogram(counts, {name: law.pmf(l) for name, law in laws.items()})
    return figures.to_svg(axes, "Histogram of staleness with fitted laws")


def _score_table(score: Score) -> dict[str, list[Any]]:
    models = score.models.values()
    table = pd.DataFrame(
        {
            "model": [MODELS[name] for name in score.models],
            "relative error": [f"{100 * model.relative_error:.1f} %" for model in models],
            "worst point": [f"{100 * model.worst_error:.1f} %" for model in models],
            "coverage of the 90 % band": [f"{100 * model.coverage:.0f} %" for model in models],
            "CRPS": [f"{model.crps:.3g}" for model in models],
        }
    )
    return _cells(table)


def _cells(table: pd.DataFrame) -> dict[str, list[Any]]:
    """Return column names and rows of text, for the template to escape and lay out."""
    rows = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    return {"columns": list(table.columns), "rows": rows}


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.5g}"
    return str(value)
