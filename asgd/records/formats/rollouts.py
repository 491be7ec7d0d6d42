"""Rollouts in the style of AReaL: the versions of an item's first and last token."""

from __future__ import annotations

from pathlib import Path

from asgd.records.foreign import header
from asgd.records.formats.base import Format, Part, files_of


def _parts(source: Path) -> list[Part]:
    files = files_of(source, ".jsonl", ".ndjson")
    known = {"head_version", "tail_version"}
    return [Part(path) for path in files] if files and known <= set(header(files[0])) else []


ROLLOUTS = Format(
    "rollouts",
    "items with head_version and tail_version, as AReaL's",
    "versions",
    {"read_version": "head_version", "end_version": "tail_version"},
    [
        "At which step an item was used: items are in the order of the file.",
        "Which worker made an item.",
    ],
    _parts,
)
