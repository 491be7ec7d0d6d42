"""Reads a record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asgd.arrays import Columns
from asgd.counted import counted
from asgd.errors import AsgdError, InputError
from asgd.records.checks import RowChecker
from asgd.records.columns import ITEMS, MOST_ROWS, RECORD, RECORD_TABLES, STEPS, UNKNOWN, About
from asgd.records.foreign import Batch, batches
from asgd.records.formats.base import ITEM_KEYS
from asgd.records.names import LOG
from asgd.rundir.alive import read_heartbeat
from asgd.rundir.events import read_events
from asgd.rundir.files import check_no_links
from asgd.rundir.parts import first_update, parts_of
from asgd.rundir.tables import Table, check_digests

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Record:
    """A record of staleness that another system, or a `StalenessLog`, has logged.

    It has no parameters and no configuration; `about` lists the missing facts.

    Attributes
    ----------
    path
        The directory.
    about
        Description of the record.
    lines
        The items of a log that is not closed, None otherwise.
    """

    path: Path
    about: About
    lines: Columns | None = None

    @property
    def items(self) -> pd.DataFrame:
        """One row per item; empty if only means are known.

        Columns: `item`, its number 0, 1, ...; `update`, the updates (versions, steps) before it
        was used; `staleness`; `in_publication`, the part of it before the item's computation
        began, and `in_flight`, the part while it was computed, or -1; `worker`, index into
        `about.workers`, or -1; `samples`; `loss` and `seconds`, or nan; `session`, which counts
        restarts of the numbering.
        """
        return _frame(self.columns(ITEMS, *RECORD_TABLES[ITEMS]))

    @property
    def steps(self) -> pd.DataFrame:
        """One row per step if only means are known, else empty.

        Columns: `step`; `mean`, `max` and `min` of the staleness; `items`; `loss`; `session`.
        Missing numbers are nan.
        """
        return _frame(self.columns(STEPS, *RECORD_TABLES[STEPS]))

    def columns(self, table: str, *names: str) -> Columns:
        """Return columns of a table, each of shape (rows,), without reading the others.

        Raises
        ------
        InputError
            A part is damaged or missing.
        """
        types = RECORD_TABLES[table]
        if self.lines is not None and table == ITEMS:
            return {name: self.lines[name] for name in names}
        parts = [part.columns(*names) for part in self._parts(table)]
        empty: Columns = {name: np.empty(0, types[name]) for name in names}
        return {name: np.concatenate([empty[name], *(p[name] for p in parts)]) for name in names}

    def _parts(self, table: str) -> Iterator[Table]:
        count = 0
        for path in parts_of(self.path / table):
            if table == ITEMS and first_update(path) != count:
                raise InputError(f"{self.path / table}: row {count} is missing; a part was lost")
            with Table(path, RECORD_TABLES[table], MOST_ROWS) as part:
                yield part
                count += part.rows

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The events in order."""
        return read_events(self.path / "events.jsonl")

    @property
    def state(self) -> str:
        """Return "finished", "running", "stopped" or "unknown"."""
        if any(event["event"] == "finish" for event in self.events):
            return "finished"
        sign = read_heartbeat(self.path)
        if sign is None:  # a log whose process ended without closing it
            return "unknown" if self.lines is None else "stopped"
        if sign.presence == "silent":
            return "unknown"
        return "stopped" if sign.presence == "gone" else "running"

    def __repr__(self) -> str:
        try:
            facts = summary(self)
        except AsgdError as error:
            return f"Record({self.path}: unreadable, {error})"
        stale = facts["mean_staleness"]
        amount = "" if stale is None else counted(f"{stale:.4g}", self.about.unit)
        mean = amount and f", mean staleness {amount}"
        return (
            f"Record({self.path}: {self.about.kind}, {self.about.format}, {facts['state']}, "
            f"{counted(facts['rows'], self.about.rows)}{mean})"
        )


def read_record(path: str | Path) -> Record:
    """Open a record.

    Raises
    ------
    InputError
        There is no record at `path`, or it contains links.
    """
    path = Path(path)
    if not (path / RECORD).is_file():
        raise InputError(f"{path}: not a record (no {RECORD}); `asgd import` makes one")
    check_no_links(path)
    about = About.read(path)
    if not (path / LOG).is_file():
        return Record(path, about)
    checker = RowChecker()
    rows = [checker.accept(batch, LOG) for batch in log_batches(path)]
    empty: Columns = {name: np.empty(0, kind) for name, kind in RECORD_TABLES[ITEMS].items()}
    lines = {name: np.concatenate([empty[name], *(r[name] for r in rows)]) for name in empty}
    return Record(path, checker.described(about), lines)


def log_batches(path: Path) -> Iterator[Batch]:
    """Read the lines of a `StalenessLog`, see `asgd.records.foreign.batches`."""
    if (path / LOG).stat().st_size:
        yield from batches(path / LOG, {key: key for key in ITEM_KEYS if key != "staleness"})


def summary(record: Record) -> dict[str, Any]:
    """Return the state and the headline numbers of a record as JSON values."""
    about = record.about
    if about.rows == "steps":
        found = record.columns(STEPS, "mean", "step", "loss")
        stale, at = found["mean"], found["step"]
    else:
        found = record.columns(ITEMS, "staleness", "update", "loss", "worker")
        stale, at = found["staleness"], found["update"]
    losses = found["loss"][np.isfinite(found["loss"])]
    tenth = stale[-max(1, len(stale) // 10) :]
    return {
        "run": str(record.path),
        "state": record.state,
        "kind": about.kind,
        "format": about.format,
        "source": about.source,
        "unit": about.unit,
        "rows": len(stale),
        "table": about.rows,
        "steps": int(np.count_nonzero(np.diff(at)) + 1) if len(at) else 0,
        "workers": len(about.workers) or None,
        "mean_staleness": float(stale.mean()) if len(stale) else None,
        "recent_staleness": float(tenth.mean()) if len(stale) else None,
        "loss": float(losses[-1]) if len(losses) else None,
        "left_out": about.left_out,
        "unknown": about.unknown,
        "notes": about.notes,
    }


def find_records(directory: str | Path) -> list[Path]:
    """Return the records in a directory, sorted by name."""
    found = sorted(path.parent for path in Path(directory).rglob(RECORD))
    return [path for path in found if not path.name.startswith(".")]


def findings(record: Record) -> list[str]:
    """Return the faults in the files and tables of a record, one line each."""
    found = []
    table = record.about.rows
    for path in parts_of(record.path / table):
        try:
            check_digests(path)
        except InputError as error:
            found.append(str(error))
    end = next((event for event in record.events if event["event"] == "finish"), {})
    digest = sha256((record.path / RECORD).read_bytes()).hexdigest()
    if end and end.get("sha256", {}).get(RECORD) != digest:
        found.append(f"{record.path / RECORD}: has changed since the record was made")
    if found or table != ITEMS:
        return found
    rows = record.columns(
        ITEMS, "item", "update", "staleness", "in_publication", "in_flight", "worker"
    )
    before, flight = rows["in_publication"], rows["in_flight"]
    parts = np.maximum(before, 0) + np.maximum(flight, 0)
    checks = (
        ("item", "is not the next number", rows["item"] != np.arange(len(rows["item"]))),
        ("update", "is smaller than the one before", np.diff(rows["update"], prepend=0) < 0),
        ("staleness", "is negative", rows["staleness"] < 0),
        ("staleness", "is less than its parts", rows["staleness"] < parts),
        ("in_publication", "is negative", before < UNKNOWN),
        ("in_flight", "is negative", flight < UNKNOWN),
        ("worker", "has no name", rows["worker"] >= max(len(record.about.workers), 1)),
    )
    for name, what, wrong in checks:
        if wrong.any():
            row = int(wrong.argmax())
            found.append(f"{record.path / ITEMS}: row {row}: {name} {rows[name][row]} {what}")
    return found


def _frame(columns: Columns) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(columns, copy=False)
