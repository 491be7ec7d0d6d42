"""Rollouts of prime-rl: `rollouts/step_N/train/effective/traces.jsonl`, a line per trained item."""

from __future__ import annotations

import re
from pathlib import Path

from asgd.records.formats.base import Format, Part, files_of

_PLACE = re.compile(r"step_(\d+)/train/effective/[^/]*traces[^/]*$")


def _parts(source: Path) -> list[Part]:
    """Return the files; step N is update N - 1, so the staleness of an item is N - 1 - start."""
    if not source.is_dir():
        return []
    found = [
        (int(place[1]), path)
        for path in files_of(source, ".jsonl")
        if (place := _PLACE.search(path.as_posix()))
    ]
    return [Part(path, {"update": float(step - 1)}) for step, path in sorted(found)]


PRIME_RL = Format(
    "prime-rl",
    "rollouts of prime-rl: step_N/train/effective/traces.jsonl",
    "steps",
    {"read_version": "run.work.policy.start", "end_version": "run.work.policy.end"},
    [
        "Which worker made an item: the traces name none.",
        "Items that were dropped before training: only those that were trained on are there.",
    ],
    _parts,
)
