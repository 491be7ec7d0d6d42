"""Writes the HTML report of a record."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from analysis import figures
from analysis.profile.fit import StalenessFit
from analysis.profile.verdict import LEVEL
from analysis.records.course import loss_course, spells_in_words, staleness_course
from analysis.records.means import MeansProfile
from analysis.records.split import split_of
from analysis.records.study import RecordStudy
from analysis.records.whatif import ASSUMPTIONS, bounds_of_caps, what_if
from analysis.report.pictures import Picture, draw
from analysis.report.tables import page_table
from analysis.report.write import check_places, laws_table, part_of_page, template
from asgd.counted import counted
from asgd.errors import written
from asgd.records.columns import STEPS, About, left_out_rows
from asgd.records.reader import summary
from asgd.rundir.files import replace_file

_MOST_ROWS = 200  # rows of the table


def write_record_report(
    study: RecordStudy, output: Path | None = None, figures_directory: Path | None = None
) -> Path:
    """Write the report on a record and return its path.

    Parameters
    ----------
    study
        The record.
    output
        The file; `report.html` in the record by default.
    figures_directory
        Directory for every figure as SVG with its data as CSV; default none.

    Raises
    ------
    InputError
        The record is empty or cannot be read, or a file cannot be written.
    """
    output = Path(output) if output is not None else study.path / "report.html"
    check_places(output, figures_directory)
    about, profile = study.record.about, study.estimate
    drawn = _staleness(study)
    fitted = isinstance(profile, StalenessFit)
    sections = [*_caps(study), *_workers(study), *_loss(study)]
    page = template("record.html.j2").render(
        title=f"{about.format}: {Path(about.source).name}",
        kind=about.kind,
        version=version("asgd"),
        verdict=_verdict(profile),
        headline=_headline(study),
        staleness=drawn,
        laws=laws_table(profile) if isinstance(profile, StalenessFit) else None,
        laws_note=_LAWS_NOTE if fitted else "",
        sections=sections,
        about=json.dumps(msgspec.to_builtins(about), indent=2),
        reproduce=_reproduce(study),
        style=part_of_page("page.css"),
        script=part_of_page("page.js"),
    )
    with written(output):
        replace_file(output, page.encode())
        if figures_directory is not None:
            for picture in [*drawn, *(one for part in sections for one in part["figures"])]:
                picture.save(Path(figures_directory))
    return output


_LAWS_NOTE = (
    "Zeros: share of items with staleness 0. Distance: total variation distance between law and "
    "data. p: parametric bootstrap with the serial dependence of the data; the items of one update "
    "are one cluster."
)


def _verdict(profile: StalenessFit | MeansProfile) -> str:
    if isinstance(profile, MeansProfile):
        return "Means per step: no law can be fitted from them, and no limit follows from them."
    sentence = profile.verdict
    return sentence[:1].upper() + sentence[1:]


def _axis(about: About) -> str:
    """Return the label of the horizontal axis: steps for means, else the unit of staleness."""
    return "steps" if about.rows == STEPS else about.unit


def _headline(study: RecordStudy) -> list[tuple[str, str]]:
    """Return named sentences on the record."""
    record, profile = study.record, study.estimate
    about, facts = record.about, summary(record)
    verb = "logged" if about.kind == "logged" else "imported"
    rows = counted(facts["rows"], about.rows)
    if facts["steps"] != facts["rows"]:
        rows += f" of {counted(facts['steps'], 'steps')}"
    found = [("What it is", f"{rows}, {verb} from {about.source} ({about.format}).")]
    if about.left_out:
        found.append(("Left out", f"{'; '.join(left_out_rows(about.left_out))}."))
    found.append(("What it counts", f"Staleness in {about.unit}."))
    if isinstance(profile, MeansProfile):
        found.append(("How stale", str(profile)))
    else:
        found.append(("How stale", f"{profile.summary}."))
        found.append(("Drift", _drift(profile)))
        spells = spells_in_words(record)
        found += [("Spells", spells)] if spells else []
    split = split_of(record)
    found += [("Where it comes from", str(split))] if split else []
    found += [("Unreliable", f"{study.doubt}.")] if study.doubt else []
    found += [("Notes on the log", " ".join(about.notes))] if about.notes else []
    found += [("Not known", " ".join(about.unknown))] if about.unknown else []
    lacking = "A record has no parameters: no loss is predicted, and no update can be replayed."
    return [*found, ("Not possible", lacking)]


def _drift(fit: StalenessFit) -> str:
    drift = fit.drift
    moves = "The law drifts" if drift.pvalue < LEVEL else "No drift"
    return (
        f"{moves}: the laws of the two halves are {drift.distance:.3f} apart in total variation "
        f"(p = {drift.pvalue:.2g})."
    )


def _staleness(study: RecordStudy) -> list[Picture]:
    """Return the histogram with its laws, and the course of the staleness."""
    unit, fit = study.record.about.unit, study.estimate
    pictures = []
    if isinstance(fit, StalenessFit):
        counts, pmfs = fit.histogram()
        data = pd.DataFrame({"staleness": np.arange(len(counts)), "items": counts, **pmfs})
        share = data.assign(items=100 * counts / counts.sum())
        share[list(pmfs)] *= 100
        pictures.append(
            draw(
                "staleness",
                figures.staleness_histogram(counts, pmfs, rows="items", unit=unit),
                "Histogram of staleness with fitted laws",
                "Share of items at each staleness, and the fitted laws.",
                data,
                values=(
                    "staleness",
                    share,
                    {"items": "measured (%)"} | {name: f"{name} (%)" for name in pmfs},
                ),
            )
        )
        for number, (name, pmf) in enumerate(pmfs.items()):
            pictures.append(
                draw(
                    f"rootogram-{number + 1}",
                    figures.staleness_rootogram(
                        counts, pmf, name, number=number, rows="items", unit=unit
                    ),
                    f"Hanging rootogram of staleness under the {name}",
                    f"Measured counts hung from the {name}, square roots of both.",
                    data[["staleness", "items", name]],
                )
            )
    course, axis = staleness_course(study.record), _axis(study.record.about)
    band = course.attrs["band"]
    pictures.append(
        draw(
            "staleness-course",
            figures.staleness_over_updates(course, unit=unit, axis=axis),
            f"Staleness over the {axis} of the record",
            f"Mean staleness, and {band}." if band else "Mean staleness.",
            course,
            values=(axis.removesuffix("s"), course[["update", "mean"]], {"mean": "mean"}),
        )
    )
    return pictures


def _caps(study: RecordStudy) -> list[dict[str, Any]]:
    """Return the cost of staleness and the effect of caps, only for a reliable fit."""
    title, profile = "What a cap would change", study.estimate
    if isinstance(profile, MeansProfile):
        note = " ".join(bounds_of_caps(profile))
        return [{"title": title, "figures": [], "tables": [], "note": note}] if note else []
    if study.doubt is not None:
        return []
    found = what_if(study)
    drawn = found.drawn()
    figures_of = []
    if len(found.caps("discard")) > 1:
        picture = draw(
            "caps",
            figures.limit_by_cap(drawn, unit=found.unit),
            "Largest stable step under caps on the staleness",
            f"{found.cost} Below each cap: the share of items that it would drop or delay.",
            drawn,
        )
        figures_of.append(picture)
    shares = ["beyond"]
    tables = [page_table("choices", found.table(), shares)]
    if found.workers is not None:
        shares = [name for name in map(str, found.workers) if name not in ("worker", "items")]
        tables.append(page_table("items beyond the caps, by worker", found.workers, shares))
    note = f"Gain: of the step, in mean square. Delay: mean, by pacing. {ASSUMPTIONS}"
    cost = "" if figures_of else f"{found.cost} "
    return [{"title": title, "figures": figures_of, "tables": tables, "note": cost + note}]


def _workers(study: RecordStudy) -> list[dict[str, Any]]:
    table = study.workers
    if table is None:
        return []
    shown = table.sort_values("items", ascending=False).head(_MOST_ROWS)
    columns = ["worker", "items", "share", "mean", "variance", "zeros"]
    rest = f"The {_MOST_ROWS} with most items, of {len(table):,}. "
    note = "Mean and variance of the staleness; zeros: share of its items with staleness 0."
    return [
        {
            "title": f"By worker ({counted(len(table), 'workers')})",
            "figures": [],
            "tables": [page_table("workers", shown[columns], ["share", "zeros"])],
            "note": (rest if len(table) > len(shown) else "") + note,
        }
    ]


def _loss(study: RecordStudy) -> list[dict[str, Any]]:
    course, axis = loss_course(study.record), _axis(study.record.about)
    if len(course) < 2:
        return []
    picture = draw(
        "loss",
        figures.loss_over_updates(course, unit=axis),
        f"Logged loss over the {axis} of the record",
        "Logged loss, the mean of each part of the record.",
        course,
        values=(axis.removesuffix("s"), course, {"loss": "loss"}),
    )
    return [{"title": "Loss", "figures": [picture], "tables": [], "note": ""}]


def _reproduce(study: RecordStudy) -> str:
    about, path = study.record.about, shlex.quote(str(study.path))
    lines = [f"asgd profile {path}", f"asgd report {path}"]
    if about.kind == "imported" and about.format != "frame":
        columns = ",".join(f"{ours}={theirs}" for ours, theirs in about.columns.items())
        words = ["asgd", "import", about.source, "--format", about.format, "--columns", columns]
        lines.insert(0, shlex.join([*words, "--unit", about.unit, "--out", "NEW_DIRECTORY"]))
    return "\n".join(lines)
