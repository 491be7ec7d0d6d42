"""Replaces old rows of a run by counts; see `asgd.rundir.counts`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from asgd.rundir.aging import AgingTable
from asgd.rundir.columns import TRACE
from asgd.rundir.counts import MOST_COUNT_ROWS, NUMBERS, StalenessCounts, counted_updates
from asgd.rundir.parts import first_update

LEAST_ROWS = 1 << 14  # of the trace that are counted at once


def count_rows(directory: Path, tables: Mapping[str, AgingTable], before: int, most: int) -> None:
    """Replace rows of a run by counts, if many are due.

    Parameters
    ----------
    directory
        The run directory.
    tables
        Its tables with a row for each gradient; `trace` at least.
    before
        No row of this update or a later one is removed.
    most
        As for `StalenessCounts.load`.
    """
    begun = counted_updates(directory)
    beginnings = [first_update(part) for part in tables[TRACE].parts]
    end = max((first for first in beginnings if first <= before), default=0)
    if end - begun < LEAST_ROWS:
        return
    counts = StalenessCounts.load(directory, most)
    if end - begun < min(len(counts.columns["update"]), MOST_COUNT_ROWS):
        return  # so that the counts are rewritten rarely
    pieces = (
        (table, piece)
        for table in NUMBERS
        if table in tables
        for piece in tables[table].pieces(begun, end)
    )
    counts.adding(pieces, end).save(directory)
    for aging in tables.values():
        aging.remove_before(end)
