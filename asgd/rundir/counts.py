"""Exact counts of staleness by time, worker and value, in place of rows: `run.record = "counts"`.

The counts are one file, replaced as a whole. It says up to which update it counts; readers ignore
rows before that update, so rows are never seen twice, or not at all, while they are removed.

Time is cut into spans of equally many updates, a power of two. Once there are too many spans, or
rows, neighbouring spans are joined. So the file does not grow beyond a limit, however long the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from asgd.arrays import Columns
from asgd.errors import InputError
from asgd.rundir.columns import COUNT_COLUMNS, COUNTS, DISCARDED, MEMBERS, TRACE
from asgd.rundir.files import sync_directory
from asgd.rundir.tables import DamagedTableError, Table, write_table

LEAST_SPAN = 1 << 10  # updates
MOST_SPANS = 1 << 10
FEWEST_SPANS = 1 << 6  # below, spans are not joined because of their rows
MOST_COUNT_ROWS = 1 << 20

_KEYS = ("update", "worker", "staleness")
NUMBERS = {TRACE: "updates", MEMBERS: "members", DISCARDED: "discarded"}
_SECONDS = {TRACE: "applied_seconds", DISCARDED: "discarded_seconds"}


class _Note(msgspec.Struct):
    """What the file of the counts says of itself."""

    updates: int
    span: int


@dataclass(frozen=True)
class StalenessCounts:
    """The counts of the updates before one of them.

    Attributes
    ----------
    columns
        `COUNT_COLUMNS`, ordered by update, worker and staleness, which no two rows share.
    updates
        All updates before this one are counted, no others.
    span
        Length of a span in updates; `update` in the columns is the first one of a span.
    """

    columns: Columns
    updates: int
    span: int

    @classmethod
    def none(cls) -> StalenessCounts:
        """Return the counts of no update."""
        columns = {name: np.empty(0, kind) for name, kind in COUNT_COLUMNS.items()}
        return cls(columns, 0, LEAST_SPAN)

    @classmethod
    def load(cls, directory: Path, most: int) -> StalenessCounts:
        """Return the counts in a run directory, none if there are none.

        Parameters
        ----------
        directory
            The run directory.
        most
            Largest accepted number of rows.

        Raises
        ------
        DamagedTableError
            The file is damaged.
        """
        path = directory / COUNTS
        if not path.exists():
            return cls.none()
        with Table(path, COUNT_COLUMNS, most) as table:
            note, columns = _noted(table), table.columns(*COUNT_COLUMNS)
        counted = int(columns["updates"].sum())
        if counted != note.updates:
            raise DamagedTableError(f"{path}: counts {counted} updates, expected {note.updates}")
        return cls(columns, note.updates, note.span)

    def adding(self, pieces: Iterable[tuple[str, Columns]], updates: int) -> StalenessCounts:
        """Return the counts of the updates before `updates`.

        Parameters
        ----------
        pieces
            Rows of the tables trace, members and discarded, each with the name of its table. They
            must include all rows of the updates from `self.updates` to `updates`; others are
            ignored.
        updates
            The end.

        Raises
        ------
        InputError
            Rows are missing.
        """
        found, span = [self.columns], self.span
        for table, rows in pieces:
            inside = (rows["update"] >= self.updates) & (rows["update"] < updates)
            found.append(_grouped([_as_counts(table, rows, inside)], span))
            if sum(len(some["update"]) for some in found) > 2 * MOST_COUNT_ROWS:
                columns, span = _fitting(found, span)
                found = [columns]
        columns, span = _fitting(found, span)
        counted = int(columns["updates"].sum())
        if counted != updates:
            raise InputError(f"{counted} updates are on record, expected {updates}")
        return StalenessCounts(columns, updates, span)

    def save(self, directory: Path) -> None:
        """Write the counts into a run directory and flush them to the disk."""
        path = directory / COUNTS
        note = msgspec.json.encode(_Note(self.updates, self.span))
        write_table(path, self.columns, COUNT_COLUMNS, _KEYS, note=note, flush=True)
        sync_directory(directory)


def counted_updates(directory: Path) -> int:
    """Return how many updates of a run are counted, without reading the counts.

    Raises
    ------
    DamagedTableError
        The file of the counts is damaged.
    """
    path = directory / COUNTS
    if not path.exists():
        return 0
    with Table(path, COUNT_COLUMNS, np.iinfo(np.int64).max) as table:
        return _noted(table).updates


def _noted(table: Table) -> _Note:
    try:
        return msgspec.json.decode(table.note or b"", type=_Note)
    except msgspec.MsgspecError as error:
        raise DamagedTableError(f"{table.path}: its note cannot be read ({error})") from None


def _as_counts(table: str, rows: Columns, chosen: Any) -> Columns:
    """Return the chosen rows of a table as counts of one gradient each."""
    rows = {name: column[chosen] for name, column in rows.items()}
    columns = {name: np.zeros(len(rows["update"]), kind) for name, kind in COUNT_COLUMNS.items()}
    columns |= {name: rows[name] for name in ("update", "worker", "compute_seconds")}
    columns["staleness"] = rows["update"] - rows["read_version"]
    columns[NUMBERS[table]] += 1
    if table in _SECONDS:
        columns["seconds"] = rows[_SECONDS[table]]
    return columns


def _grouped(pieces: Sequence[Columns], span: int) -> Columns:
    """Join counts; rows of the same span, worker and staleness become one."""
    joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in COUNT_COLUMNS}
    joined["update"] -= joined["update"] % span
    order = np.lexsort([joined[name] for name in reversed(_KEYS)])
    columns = {name: column[order] for name, column in joined.items()}
    new = np.zeros(len(order), bool)
    new[:1] = True
    for name in _KEYS:
        new[1:] |= np.diff(columns[name]) != 0
    starts = np.flatnonzero(new)
    for name in columns if len(starts) else ():
        if name in _KEYS:
            columns[name] = columns[name][starts]
        else:
            join = np.maximum if name == "seconds" else np.add
            columns[name] = join.reduceat(columns[name], starts)
    return columns


def _fitting(pieces: Sequence[Columns], span: int) -> tuple[Columns, int]:
    """Join counts into spans of at least `span` updates until there are not too many."""
    columns = _grouped(pieces, span)
    while True:
        spans, rows = np.count_nonzero(np.diff(columns["update"])) + 1, len(columns["update"])
        if spans <= MOST_SPANS and (rows <= MOST_COUNT_ROWS or spans <= FEWEST_SPANS):
            return columns, span
        span *= 2
        columns = _grouped([columns], span)
