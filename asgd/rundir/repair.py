"""Finds the last complete update on record and truncates the tables before a run resumes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asgd.arrays import Columns
from asgd.config.make import load_config
from asgd.config.tables import RunConfig
from asgd.rundir.aging import AgingTable, write_part
from asgd.rundir.columns import (
    COUNTS,
    DISCARDED,
    LOSS,
    MEMBERS,
    METRICS,
    POSITIONS,
    SHARED,
    SKIPPED,
    TABLES,
    TRACE,
)
from asgd.rundir.counts import StalenessCounts, counted_updates
from asgd.rundir.defects import discarded_defect, member_defect, position_defect, trace_defect
from asgd.rundir.events import read_events
from asgd.rundir.files import sync_directory
from asgd.rundir.parts import (
    covered_parts,
    damaged_name,
    first_update,
    missing_losses,
    most_rows,
    part_name,
    parts_of,
    reported_losses,
    with_ends,
)
from asgd.rundir.tables import DamagedTableError, Table, read_pieces, read_table
from asgd.rundir.writer import RunWriter


def recorded_updates(path: Path) -> int:
    """Return the number of updates on record, with all their gradients, before the first gap."""
    config = _config(path)
    begun = count = StalenessCounts.load(path, most_rows(config, COUNTS)).updates
    shared = [np.empty(0, np.int64)]
    for trace in _undamaged(path / TRACE, config, begun):
        if trace_defect(trace, count) is not None:
            break
        shared.append(trace["update"][trace["worker"] == SHARED])
        count += len(trace["update"])
    missing = np.setdiff1d(np.concatenate(shared), _updates_in(path, config, MEMBERS))
    if config.data.sampling == "epoch":
        placed = _updates_in(path, config, POSITIONS)
        missing = np.union1d(missing, np.setdiff1d(np.arange(begun, count), placed))
    ends: list[int] = [*missing[:1].tolist(), *_damaged_discarded(path, config, begun)]
    return min([count, *ends])


def recorded_losses(path: Path) -> list[tuple[int, float, float]]:
    """Return the first and the last recorded loss as `LOSS_COLUMNS`, or nothing.

    Only two parts are read, because a long run has many.
    """
    config, parts = _config(path), parts_of(path / LOSS)
    ends = [(parts[0], 0), (parts[-1], -1)] if parts else []
    found = []
    for part, row in ends:
        loss = _read(part, LOSS, config)
        seconds, value = float(loss["seconds"][row]), float(loss["loss"][row])
        found.append((int(loss["update"][row]), seconds, value))
    return found


def cut_back(path: Path, updates: int) -> None:
    """Truncate trace, members, discarded, positions, loss and metrics after `updates` updates.

    -1 removes everything, including the loss at x_0. The updates must be on record, see
    `recorded_updates`. After an interruption, call it again to complete the cut. Unreadable losses
    and metrics are set aside; the events `loss_damaged` and `metrics_damaged` list them, and the
    missing losses.
    """
    # Another process may be using other temporary files.
    for pattern in (*(f"{table}/*.tmp" for table in TABLES), "checkpoints/*.tmp", f".{COUNTS}.tmp"):
        for torn in path.glob(pattern):
            torn.unlink(missing_ok=True)
    config, writer = _config(path), RunWriter(path)
    _set_damaged_losses_aside(writer, config)
    _set_damaged_aside(writer, config, METRICS, "metrics_damaged")
    for table in TABLES:  # first, as a cut part may no longer cover them
        for part in covered_parts(path / table):
            part.unlink()
            writer.note_change(part)
    # Gradients discarded after the last update are removed, because their numbers are used again.
    ends = {
        **dict.fromkeys((TRACE, MEMBERS, DISCARDED, POSITIONS), updates),
        **dict.fromkeys((LOSS, METRICS, SKIPPED), updates + 1),
    }
    for table, end in ends.items():
        parts = parts_of(path / table)
        kept = [part for part in parts if first_update(part) < end]
        for part in parts[len(kept) :]:
            part.unlink()
            writer.note_change(part)
        if kept:
            _cut_part(writer, config, kept[-1], table, end)
    _drop_counted(writer, updates)
    writer.sync()


def _drop_counted(writer: RunWriter, updates: int) -> None:
    """Remove counted rows that a killed process left, and all counts if everything is removed."""
    if updates < 0:
        (writer.path / COUNTS).unlink(missing_ok=True)
        writer.note_change(writer.path / COUNTS)
    counted = counted_updates(writer.path)
    for table in (TRACE, MEMBERS, DISCARDED, POSITIONS) if counted else ():
        if (writer.path / table).is_dir():
            AgingTable(writer.path / table).remove_before(counted)
            writer.note_change(writer.path / table)


def _undamaged(directory: Path, config: RunConfig, begun: int = 0) -> Iterator[Columns]:
    """Yield the rows of a table up to the first damaged part, from the part that begins there."""
    for part in parts_of(directory):
        if first_update(part) < begun:
            continue
        try:
            yield from read_pieces(part, TABLES[directory.name], most_rows(config, directory.name))
        except DamagedTableError:
            return


def _updates_in(path: Path, config: RunConfig, table: str) -> npt.NDArray[np.int64]:
    """Return the updates whose gradients are in a table, `MEMBERS` or `POSITIONS`."""
    defect = {MEMBERS: member_defect, POSITIONS: position_defect}[table]
    known = [np.empty(0, np.int64)]
    for part in parts_of(path / table):
        try:
            rows = _read(part, table, config)
        except DamagedTableError:
            continue
        if defect(rows) is None:
            known.append(rows["update"])
    return np.concatenate(known)


def _damaged_discarded(path: Path, config: RunConfig, begun: int) -> list[int]:
    """Return the first update of each damaged part of the discarded gradients.

    Parts whose rows are all counted, those before update `begun`, are left out.
    """
    found = []
    for part, bound in with_ends(parts_of(path / DISCARDED), begun):
        if bound < begun:
            continue
        try:
            defect = discarded_defect(_read(part, DISCARDED, config))
        except DamagedTableError as error:
            defect = str(error)
        if defect is not None:
            found.append(first_update(part))
    return found


def _set_damaged_losses_aside(writer: RunWriter, config: RunConfig) -> None:
    known = _set_damaged_aside(writer, config, LOSS, "loss_damaged")
    told = reported_losses(read_events(writer.path / "events.jsonl"))
    pieces = [piece["update"] for piece in _undamaged(writer.path / SKIPPED, config)]
    skipped = np.concatenate([np.empty(0, np.int64), *pieces])
    for missing in missing_losses(known, skipped, config):
        if missing not in told:
            name = f"{LOSS}/{damaged_name(missing)}"
            writer.event("loss_damaged", file=name, reason="the part is missing")


def _set_damaged_aside(
    writer: RunWriter, config: RunConfig, table: str, event: str
) -> npt.NDArray[np.int64]:
    """Rename unreadable parts and report them; return the updates of the others."""
    known = [np.empty(0, np.int64)]
    for part in parts_of(writer.path / table):
        try:
            known.append(_read(part, table, config)["update"])
        except DamagedTableError as error:
            aside = part.with_name(damaged_name(first_update(part)))
            os.replace(part, aside)
            writer.note_change(aside)
            writer.event(event, file=f"{table}/{aside.name}", reason=str(error))
    return np.concatenate(known)


def _cut_part(writer: RunWriter, config: RunConfig, part: Path, table: str, end: int) -> None:
    """Keep the rows before update `end`."""
    most = most_rows(config, table)
    with Table(part, TABLES[table], most) as whole:
        update = whole.columns("update")["update"]
    if update[-1] < end:
        return
    # A merged part gets the name of a simple one, as its old name would cover later parts.
    kept = part.with_name(part_name(first_update(part)))
    pieces = _before(end, read_pieces(part, TABLES[table], most))
    write_part(kept, pieces, flush=True)  # the old part was on the disk too
    if kept != part:
        sync_directory(kept.parent)
        part.unlink()
    writer.note_change(kept)


def _before(end: int, pieces: Iterable[Columns]) -> Iterator[Columns]:
    for piece in pieces:
        rows = int(np.searchsorted(piece["update"], end))
        if rows:
            yield {name: column[:rows] for name, column in piece.items()}


def _read(part: Path, table: str, config: RunConfig) -> Columns:
    return read_table(part, TABLES[table], most_rows(config, table))


def _config(path: Path) -> RunConfig:
    return load_config(path / "config.json")
