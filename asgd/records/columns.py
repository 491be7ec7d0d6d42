"""The files of a record, the columns of its tables, and its description `About`.

    record.json            description of the record: source, format, unit, missing facts
    items/part-*.parquet   a row per item that was used, columns `ITEM_COLUMNS`; or
    steps/part-*.parquet   a row per step of which only means are known, columns `STEP_COLUMNS`
    events.jsonl           `start`, `finish`
    log.jsonl              only if a `StalenessLog` is not closed: a line per item

A record has no parameters and no configuration: other systems do not log them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from asgd.counted import counted
from asgd.errors import InputError
from asgd.rundir.tables import Types
from asgd.stored_json import read_json

RECORD = "record.json"
ITEMS, STEPS = "items", "steps"
UNKNOWN = -1  # of a worker, or of a part of the staleness
IN_FLIGHT_ONLY = (
    "How long an item waited until it was used: this is the staleness in flight only, when the "
    "item was ready; that of the update is larger."
)
NO_PUBLICATION = (
    "How far an item's parameters were behind the newest ones when its computation began "
    "(publication): this counts as in flight or in the queue."
)

Unit = Literal["updates", "versions", "steps"]

ITEM_COLUMNS: Types = {
    "item": np.int64,  # number of the row: 0, 1, ..., each once
    "update": np.int64,  # updates (versions, steps) before the item was used; never falls
    "staleness": np.int64,  # how many of these updates the item's parameters lacked
    "in_publication": np.int64,  # the part before its computation began, or UNKNOWN
    "in_flight": np.int64,  # the part while it was computed, or UNKNOWN; the rest is the queue
    "worker": np.int32,  # index into the workers of record.json, or UNKNOWN
    "samples": np.int64,  # in the item; 1 if the log does not say
    "loss": np.float64,  # nan if the log does not say
    "seconds": np.float64,  # clock of the log; nan if it does not say
    "session": np.int32,  # 0, and one more after each restart of the numbering
}
STEP_COLUMNS: Types = {
    "step": np.int64,  # number of the step; rises
    "mean": np.float64,  # mean staleness of the items of the step
    "max": np.float64,  # largest, or nan
    "min": np.float64,  # smallest, or nan
    "items": np.float64,  # items of the step, or nan
    "loss": np.float64,  # nan if the log does not say
    "session": np.int32,  # as in the items
}
RECORD_TABLES: dict[str, Types] = {ITEMS: ITEM_COLUMNS, STEPS: STEP_COLUMNS}
MOST_ROWS = 10**9


class About(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The description of a record.

    Attributes
    ----------
    kind
        "imported" from another system's log, or "logged" by a `StalenessLog`.
    format
        Name of the log's format.
    source
        Path or origin of the log.
    unit
        What staleness counts: updates, versions (publications of parameters) or steps.
    rows
        The table: "items", or "steps" if only means are known.
    columns
        The columns that were read, by our names.
    workers
        Names of workers 0, 1, ...
    in_flight_only
        Whether the staleness ends when an item is ready: it lacks the wait until its use.
    unknown
        Facts that are missing in the log, one sentence each.
    left_out
        Number of rows left out, by the reason.
    notes
        Peculiarities of the log, one sentence each.
    """

    kind: Literal["imported", "logged"]
    format: str
    source: str
    unit: Unit
    rows: Literal["items", "steps"] = "items"
    columns: dict[str, str] = {}
    workers: list[str] = []
    in_flight_only: bool = False
    unknown: list[str] = []
    left_out: dict[str, int] = {}
    notes: list[str] = []

    def to_json(self) -> bytes:
        """Return the content of `record.json`."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def read(cls, directory: Path) -> About:
        """Read `record.json`.

        Raises
        ------
        InputError
            It is missing or is not such a file.
        """
        path = directory / RECORD
        try:
            about = msgspec.convert(read_json(path), cls)
        except msgspec.ValidationError as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
        # Records from before the flag have only the sentence.
        old = IN_FLIGHT_ONLY in about.unknown
        return msgspec.structs.replace(about, in_flight_only=True) if old else about


def left_out_rows(left_out: Mapping[str, int]) -> list[str]:
    """Return in words how many rows were left out, by the reason."""
    return [f"{counted(number, 'rows')} {why}" for why, number in left_out.items()]


def is_record(path: str | Path) -> bool:
    """Whether a directory is a record, not a run."""
    return (Path(path) / RECORD).is_file()
