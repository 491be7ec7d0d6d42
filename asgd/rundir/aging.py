"""Merges the parts of a table as they age, so that a run of days leaves some hundred files.

Parts belong to tiers by their number of rows, as in a log-structured merge tree. Once a tier has
`FAN_IN` parts, they are merged into one; large parts are not merged again. So each row is written
about once for each tier, and a reader of the whole table opens few files.

A merged part is on the disk, under a new name, before the parts that it covers are removed. If the
process is killed in between, readers ignore the covered parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import msgspec

from asgd.arrays import Columns
from asgd.errors import InputError
from asgd.rundir.columns import TABLES, TRACE
from asgd.rundir.files import sync_directory
from asgd.rundir.outline import Tally
from asgd.rundir.parts import (
    first_update,
    last_beginning,
    merged_name,
    part_name,
    parts_of,
    with_ends,
)
from asgd.rundir.tables import Table, read_pieces, write_pieces

_TIER_BITS = 5
FAN_IN = 1 << _TIER_BITS  # parts of a tier, and the ratio of its rows to those of the tier before
MOST_ROWS = 1 << 23  # in a merged part

_REPETITIVE = ("worker", "staleness", "batch_size")
_FULL = 99  # the tier of parts that are no longer merged


class AgingTable:
    """The parts of a table of a run, to which a single process adds.

    Parameters
    ----------
    directory
        The existing directory, named as the table.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._parts = parts_of(directory)
        self._rows = [self._count(part) for part in self._parts]
        self._merges = True

    def keep_parts(self) -> None:
        """Merge no more parts."""
        self._merges = False

    @property
    def parts(self) -> list[Path]:
        """The parts in order."""
        return list(self._parts)

    def pieces(self, first: int, end: int) -> Iterator[Columns]:
        """Yield piece by piece the rows of all parts that may have one with first <= update < end.

        Raises
        ------
        InputError
            A part is damaged.
        """
        for part, bound in with_ends(self._parts, end):
            if first_update(part) < end and bound >= first:
                yield from self._read(part)

    def remove_before(self, end: int) -> None:
        """Remove the parts with no row of update `end` or a later one."""
        # Read only where the names do not tell: two parts of the trace do not share an update.
        shared = self._directory.name != TRACE
        for part, bound in with_ends(self._parts, end + 1):
            reaches = bound > end or (shared and bound == end)
            if first_update(part) >= end or (reaches and self._last_update(part) >= end):
                return
            part.unlink()
            del self._parts[0], self._rows[0]

    def _last_update(self, part: Path) -> int:
        with Table(part, TABLES[self._directory.name], MOST_ROWS) as table:
            return int(table.columns("update")["update"][-1])

    def add(self, columns: Mapping[str, Any]) -> Path:
        """Write the newest part and return its file; merge what is due.

        If a merge fails, because the disk is full or a part is damaged, merging stops for good.
        """
        part = self._directory / part_name(int(columns["update"][0]))
        newest = self._parts[-1] if self._parts else None
        if newest is not None and part != newest and first_update(part) <= last_beginning(newest):
            raise ValueError(f"{part}: expected a part that begins after {newest.name}")
        write_part(part, [columns])
        if part == newest:  # it was written again
            self._parts.pop()
            self._rows.pop()
        self._parts.append(part)
        self._rows.append(len(columns["update"]))
        try:
            while self._merges and (due := parts_due(self._rows)):
                self._merge(due)
        except (OSError, InputError):
            self._merges = False
        return part

    def _merge(self, due: slice) -> None:
        parts = self._parts[due]
        merged = self._directory / merged_name(parts)
        write_part(merged, (piece for part in parts for piece in self._read(part)), flush=True)
        sync_directory(self._directory)
        for part in parts:
            part.unlink()
        self._parts[due] = [merged]
        self._rows[due] = [sum(self._rows[due])]

    def _read(self, part: Path) -> Iterator[Columns]:
        return read_pieces(part, TABLES[self._directory.name], MOST_ROWS)

    def _count(self, part: Path) -> int:
        """Return the rows of a part; a damaged one is left alone, as if it were full."""
        try:
            with Table(part, TABLES[self._directory.name], MOST_ROWS) as table:
                return table.rows
        except InputError:
            return MOST_ROWS


def write_part(path: Path, pieces: Iterable[Mapping[str, Any]], *, flush: bool = False) -> None:
    """Write a part of the table that its directory is named after; see `write_pieces`."""
    table, tally = path.parent.name, Tally()
    if table != TRACE:
        write_pieces(path, pieces, TABLES[table], _REPETITIVE, flush=flush)
        return

    def tallied() -> Iterator[Mapping[str, Any]]:
        for piece in pieces:
            tally.add(piece)
            yield piece

    note = partial(msgspec.json.encode, tally)
    write_pieces(path, tallied(), TABLES[table], _REPETITIVE, note=note, flush=flush)


def parts_due(rows: Sequence[int]) -> slice | None:
    """Return the parts to merge next, given the rows of all parts in order, or None."""
    tiers = [_tier(count) for count in rows]
    for tier in sorted(set(tiers) - {_FULL}):
        newest = list(takewhile(lambda one: one <= tier, reversed(tiers)))  # noqa: B023
        if newest.count(tier) >= FAN_IN:
            first = len(rows) - len(newest)
            fitting = sum(total <= MOST_ROWS for total in accumulate(rows[first:]))
            return slice(first, first + fitting)
    return None


def _tier(rows: int) -> int:
    return _FULL if rows >= MOST_ROWS // 2 else max(rows.bit_length() - 1, 0) // _TIER_BITS
