"""Numbers per step, as experiment trackers log them: mean, maximum and minimum of the staleness.

A new system needs a line in `_KNOWN`.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from asgd.errors import InputError
from asgd.records.columns import Unit
from asgd.records.foreign import flat, header, json_objects, kind_of, opened
from asgd.records.formats.base import files_of

NAME = "metrics"
KEYS = ("step", "mean", "max", "min", "items", "loss")
UNKNOWN = (
    "The law of the staleness: many laws have these means and maxima, so none is fitted.",
    "Which worker was how stale.",
)
_ENDS = (".jsonl", ".ndjson", ".json", ".csv")

# By system: the unit of its staleness, and a pattern for the name of each column, with nested names
# joined by slashes.
_KNOWN: dict[str, tuple[Unit, dict[str, str]]] = {
    "verl": (
        "versions",
        {"step": "step", "loss": "data/actor/pg_loss"}
        | {
            key: rf"data/training/off_policy/trajectory_staleness/{key}"
            for key in ("mean", "max", "min")
        },
    ),
    "prime-rl": (
        "steps",
        {"step": "step", "mean": "off_policy/mean", "max": "off_policy/max", "loss": "loss/mean"},
    ),
    "RLlib": (
        "updates",
        {
            "step": "training_iteration",
            "mean": r"(info/)?learners?/[^/]+/diff_num_grad_updates_vs_sampler_policy",
            "loss": r"(info/)?learners?/[^/]+/total_loss",
        },
    ),
}


def metrics_columns(source: Path) -> tuple[str, Unit, dict[str, str]] | None:
    """Return the system of a log of means, its unit and its columns; None for any other log.

    Raises
    ------
    InputError
        Several columns could be meant, or a file that is the source itself cannot be read.
    """
    files = _files(source, None)
    return _system(files[0]) if files else None


def _files(source: Path, columns: Mapping[str, str] | None) -> list[Path]:
    """Return the files of a log of means; other files in a directory are ignored.

    RLlib writes the same numbers as JSON and as CSV; the JSON is taken.
    """
    files = files_of(source, *_ENDS)
    if source.is_file():
        return files
    found = [path for path in files if _has_means(path, columns)]
    return [path for path in found if kind_of(path) != ".csv"] or found


def _has_means(path: Path, columns: Mapping[str, str] | None) -> bool:
    try:
        if columns is not None:
            return {columns["step"], columns["mean"]} <= set(header_of(path))
        return _system(path) is not None
    except InputError:
        return False


def _system(path: Path) -> tuple[str, Unit, dict[str, str]] | None:
    names = header_of(path)
    for system, (unit, patterns) in _KNOWN.items():
        found = {
            key: [name for name in names if re.fullmatch(pattern, name.replace(".", "/"))]
            for key, pattern in patterns.items()
        }
        if not found["step"] or not found["mean"]:
            continue
        if len(found["mean"]) > 1:
            several = ", ".join(found["mean"])
            raise InputError(f"{path}: several means, {several}; choose one by --columns mean=...")
        return system, unit, {key: columns[0] for key, columns in found.items() if columns}
    return None


def header_of(path: Path) -> list[str]:
    """Return the column names in the first hundred rows, nested ones joined by slashes."""
    if kind_of(path) == ".csv":
        return header(path)
    found: dict[str, None] = {}
    for _, row in zip(range(100), _rows(path), strict=False):
        found |= dict.fromkeys(row)
    return list(found)


def metrics_rows(source: Path, columns: Mapping[str, str]) -> Iterator[dict[str, float]]:
    """Yield our columns of each row that has a step; a missing number is nan.

    Raises
    ------
    InputError
        A file cannot be read, a value is not a number, or a step is not a whole one.
    """
    for path in _files(source, columns):
        for number, row in enumerate(_rows(path), start=1):
            found = {key: _number(row.get(name), path, number) for key, name in columns.items()}
            step = found["step"]
            if math.isnan(step):
                continue
            if not step.is_integer() or abs(step) > 2.0**53:
                raise InputError(f"{path}: row {number}: step = {step}: expected a whole number")
            yield found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        if kind_of(path) == ".csv":
            with opened(path) as file:
                yield from csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""))
        else:
            for row in json_objects(path):
                yield flat(row, joint="/")
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def _number(value: Any, path: Path, row: int) -> float:
    if value in (None, ""):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{path}: row {row}: {value!r:.40}: expected a number") from None
