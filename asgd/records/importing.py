"""Makes a record from the log of another system, or from a DataFrame."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from asgd.arrays import Columns
from asgd.counted import counted
from asgd.errors import InputError, did_you_mean, written
from asgd.records.checks import RowChecker
from asgd.records.columns import (
    IN_FLIGHT_ONLY,
    ITEMS,
    NO_PUBLICATION,
    RECORD,
    RECORD_TABLES,
    STEPS,
    About,
    Unit,
)
from asgd.records.foreign import TEXT, Batch, Names, batches, header
from asgd.records.formats import metrics
from asgd.records.formats.base import ITEM_KEYS, Format, Part
from asgd.records.formats.known import FORMATS, NAMES, recognise
from asgd.records.names import LOG, PUBLISHED
from asgd.records.reader import Record, log_batches, read_record
from asgd.rundir.columns import COUNTS
from asgd.rundir.files import replace_file
from asgd.rundir.parts import part_name
from asgd.rundir.tables import write_table
from asgd.rundir.writer import RunWriter

if TYPE_CHECKING:
    import pandas as pd

_ROWS = 262_144  # of a part
_REPETITIVE = ("worker", "staleness", "session", "samples", "in_publication", "in_flight")


def import_log(
    source: str | Path,
    out: str | Path | None = None,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    unit: Unit | None = None,
    leave_out: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Record:
    """Make a record from the log of another system.

    Parameters
    ----------
    source
        A file, or a directory of them.
    out
        The record's directory, empty or missing; default `runs/<name of the source>-<time>`.
    format
        "auto", or a name of `asgd import --help`.
    columns
        The name of each of our columns in the log, where it differs: `update`, `read_version`,
        `start_version`, `end_version`, `staleness`, `worker`, `item`, `samples`, `loss`,
        `seconds`; of a log of means `step`, `mean`, `max`, `min`, `items`, `loss`.
    unit
        Unit of the staleness; default by the format.
    leave_out
        Leave out rows that cannot be used, and count them; without it they are an error. A number
        that should be whole and is not is an error in any case.
    progress
        Called with a text and the completed fraction.

    Raises
    ------
    InputError
        The log cannot be read or used, or the directory cannot be written.
    """
    source, given = Path(source), dict(columns or {})
    for place in (source, *source.absolute().parents[:2]):
        if (place / COUNTS).is_file() and (place / "config.json").is_file():
            raise InputError(
                f'{source}: of a run with run.record = "counts", which keeps only its newest rows; '
                "expected a log, or rows of a whole run"
            )
    if format not in NAMES:
        raise InputError(f"format = {format!r}: expected one of {', '.join(NAMES)}")
    if unit is not None and unit not in get_args(Unit):
        raise InputError(f"unit = {unit!r}: expected {', '.join(get_args(Unit))}")
    chosen = recognise(source, means="mean" in given) if format == "auto" else format
    out = _place(out, source.stem)
    if chosen == metrics.NAME:
        return _import_metrics(source, out, given, unit, leave_out)
    declared = FORMATS[chosen]
    _check_keys(given, ITEM_KEYS)
    log = _Log.of_files(declared, source, given)
    about = About(
        kind="imported",
        format=declared.name,
        source=str(source),
        unit=unit or declared.unit,
        columns=log.columns,
        notes=log.notes,
        **log.missing(declared),
    )
    return write_items(out, about, log.read(progress), leave_out=leave_out)


def from_frame(
    frame: pd.DataFrame,
    out: str | Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    unit: Unit = "updates",
    leave_out: bool = False,
) -> Record:
    """Make a record from a DataFrame with a row per item.

    >>> record = asgd.from_frame(frame, out, columns={"staleness": "lag", "worker": "client"})
    >>> record.items["staleness"].tolist()
    [0, 1, 1, 2]

    Parameters
    ----------
    frame
        The rows, in their order.
    out, columns, unit, leave_out
        As for `import_log`.

    Raises
    ------
    InputError
        As for `import_log`.
    """
    given = dict(columns or {})
    _check_keys(given, ITEM_KEYS)
    there = [str(name) for name in frame.columns]
    wanted = {key: key for key in ITEM_KEYS if key in there} | given
    for key, name in wanted.items():
        if name not in there:
            hint, shown = did_you_mean(name, there), ", ".join(there[:20])
            raise InputError(
                f"columns.{key} = {name}: {hint}expected a column of the frame: {shown}"
            )
    _check_enough(wanted, "frame", there)

    def read() -> Iterator[tuple[Batch, str]]:
        for first in range(0, len(frame), _ROWS):
            some = frame.iloc[first : first + _ROWS]
            yield {key: _of_series(some[name], key) for key, name in wanted.items()}, "the frame"

    about = About(
        kind="imported",
        format="frame",
        source="a frame",
        unit=unit,
        columns=wanted,
        **_missing(set(wanted)),
    )
    return write_items(_place(out, "frame"), about, read(), leave_out=leave_out)


def write_items(
    out: Path, about: About, log: Iterator[tuple[Batch, str]], *, leave_out: bool
) -> Record:
    """Check the rows of a log and write them as a record; see `import_log`."""
    checker = RowChecker()
    with _new_record(out) as place:
        parts = _Parts(place / ITEMS)
        for batch, name in log:
            parts.add(checker.accept(batch, name))
        checker.finish(about.source, leave_out=leave_out)
        parts.close()
        _seal(place, checker.described(about))
    return read_record(out)


def close_log(path: Path) -> None:
    """Replace the lines of a `StalenessLog` by tables; keep the lines until these are complete.

    Raises
    ------
    InputError
        The tables cannot be written.
    """
    about, checker = About.read(path), RowChecker()
    place = path / f".{ITEMS}.tmp"
    with written(path):
        shutil.rmtree(place, ignore_errors=True)
        parts = _Parts(place)
        for batch in log_batches(path):
            parts.add(checker.accept(batch, LOG))
        parts.close()
        os.replace(place, path / ITEMS)
        _seal(path, checker.described(about))
        for name in (LOG, PUBLISHED):
            (path / name).unlink()


@dataclass(frozen=True)
class _Log:
    """The files of a log, and its columns by our names."""

    parts: Sequence[Part]
    columns: dict[str, str]
    notes: list[str]

    @classmethod
    def of_files(cls, format: Format, source: Path, given: Mapping[str, str]) -> _Log:
        """Find the files and columns of a log."""
        parts = format.parts(source)
        if not parts:
            raise InputError(f"{source}: no log of the format {format.name} ({format.what})")
        if format.columns is None:  # a table: take those of our columns that it has
            there = header(parts[0].path)
            columns = {key: key for key in ITEM_KEYS if key in there} | dict(given)
            _check_enough(columns, parts[0].path, there)
        else:
            columns = {**format.columns, **given}
        places = Counter(tuple(part.given.values()) for part in parts if part.given)
        several = sum(number > 1 for number in places.values())
        has = "has" if several == 1 else "have"
        note = f"{counted(several, 'steps')} {has} several files, read as one step each."
        notes = [note] if several else []
        return cls(parts, columns, notes)

    def missing(self, format: Format) -> dict[str, Any]:
        """Return the facts that are missing in the log, as fields of `About`."""
        return _missing({*self.columns, *self.parts[0].given}, format.unknown)

    def read(self, progress: Callable[[str, float], None] | None) -> Iterator[tuple[Batch, str]]:
        """Yield the batches of each file, with its name."""
        rows = 0
        for number, part in enumerate(self.parts):
            for batch in batches(part.path, self.columns):
                column = next(iter(batch.values()))
                length = len(column.codes if isinstance(column, Names) else column)
                for key, value in part.given.items():
                    batch[key] = np.full(length, value)
                yield batch, str(part.path)
                rows += length
                if progress is not None:
                    progress(f"{counted(rows, 'rows')}", number / len(self.parts))


class _Parts:
    """Writes rows of items in parts of bounded size."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: list[Columns] = []
        self._rows = 0
        directory.mkdir()

    def add(self, rows: Columns) -> None:
        """Keep rows; write a part when there are enough."""
        if len(rows["item"]):
            self._held.append(rows)
            self._rows += len(rows["item"])
        if self._rows >= _ROWS:
            self.close()

    def close(self) -> None:
        """Write the rows that are held."""
        if not self._held:
            return
        columns = {
            name: np.concatenate([rows[name] for rows in self._held]) for name in self._held[0]
        }
        _write(self._directory, ITEMS, columns, int(columns["item"][0]))
        self._held, self._rows = [], 0


def _import_metrics(
    source: Path, out: Path, given: dict[str, str], unit: Unit | None, leave_out: bool
) -> Record:
    """Import a log of means; see `import_log`."""
    _check_keys(given, metrics.KEYS)
    known = metrics.metrics_columns(source) if not {"step", "mean"} <= set(given) else None
    system, own_unit, found = known or ("named columns", "updates", {})
    columns = {**found, **given}
    if not {"step", "mean"} <= set(columns):
        raise InputError(f"{source}: no known means per step; name them by --columns step=,mean=")
    rows, left_out, notes = metrics_table(metrics.metrics_rows(source, columns))
    if left_out and not leave_out:
        raise InputError(
            f"{source}: {counted(left_out, 'steps')} without a mean staleness; --leave-out imports "
            "the others"
        )
    if not len(rows["step"]):
        raise InputError(f"{source}: no step with a mean staleness")
    about = About(
        kind="imported",
        format=metrics.NAME,
        source=str(source),
        unit=unit or own_unit,
        rows="steps",
        columns=columns,
        unknown=list(metrics.UNKNOWN),
        left_out={"without a mean staleness": left_out} if left_out else {},
        notes=[f"Read as {system}.", *notes],
    )
    with _new_record(out) as place:
        (place / STEPS).mkdir()
        _write(place / STEPS, STEPS, rows, 0)
        _seal(place, about)
    return read_record(out)


def metrics_table(rows: Iterator[dict[str, float]]) -> tuple[Columns, int, list[str]]:
    """Return the columns of a record of means, the number of steps without a mean, and notes.

    Consecutive rows of one step are joined, because loggers write a step in pieces. A step lower
    than the last begins a new session.
    """
    found: list[dict[str, float]] = []
    notes: list[str] = []
    session, offset = 0, 0.0
    for row in rows:
        row["step"] += offset
        if found and row["step"] == found[-1]["step"]:
            found[-1] |= {key: value for key, value in row.items() if value == value}
            continue
        if found and row["step"] < found[-1]["step"]:
            session += 1
            notes.append(
                f"The step falls from {found[-1]['step'] - offset:.0f} to "
                f"{row['step'] - offset:.0f}: taken as a restart; the numbering continues."
            )
            offset += found[-1]["step"] + 1 - row["step"]
            row["step"] = found[-1]["step"] + 1
        found.append(row | {"session": float(session)})
    good = [row for row in found if row["mean"] >= 0.0]
    types = RECORD_TABLES[STEPS]
    columns: Columns = {
        name: np.array([row.get(name, np.nan) for row in good], dtype=float).astype(kind)
        for name, kind in types.items()
    }
    return columns, len(found) - len(good), notes[:20]


def _write(directory: Path, table: str, columns: Columns, first: int) -> None:
    path = directory / part_name(first)
    write_table(path, columns, RECORD_TABLES[table], _REPETITIVE)


@contextmanager
def _new_record(out: Path) -> Iterator[Path]:
    """Yield a hidden directory beside `out`, which becomes `out` if the block succeeds."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; choose another --out")
    place = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    with written(out):
        place.mkdir(parents=True)
    try:
        RunWriter(place).event("start")
        yield place
        with written(out):
            os.replace(place, out)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _seal(place: Path, about: About) -> None:
    """Write `record.json`, and its digest as the last event."""
    content = about.to_json()
    replace_file(place / RECORD, content)
    RunWriter(place).event("finish", sha256={RECORD: sha256(content).hexdigest()})


def _place(out: str | Path | None, name: str) -> Path:
    return Path(out or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def _of_series(column: pd.Series[Any], key: str) -> Any:
    if key in TEXT:
        codes, names = column.factorize()
        return Names(np.asarray(codes, np.int64), [str(name) for name in names])
    try:
        return column.to_numpy(dtype=float, na_value=np.nan)
    except (TypeError, ValueError):
        raise InputError(f"frame.{column.name} = {column.dtype}: expected numbers") from None


def _check_keys(given: Mapping[str, str], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known)
            raise InputError(f"columns.{key}: unknown key; {hint}expected {', '.join(known)}")


def _missing(known: set[str], more: Sequence[str] = ()) -> dict[str, Any]:
    """Return the facts that are missing in a log with these columns, as fields of `About`."""
    in_flight_only = not known & {"staleness", "update"}
    no_publication = known & {"start_version", "end_version"} == {"end_version"}
    found = [IN_FLIGHT_ONLY] * in_flight_only + [NO_PUBLICATION] * no_publication
    return {"in_flight_only": in_flight_only, "unknown": [*found, *more]}


def _check_enough(columns: Mapping[str, str], where: object, there: Sequence[str]) -> None:
    enough = ({"staleness"}, {"update", "read_version"}, {"read_version", "end_version"})
    if not any(there):
        raise InputError(f"{where}: empty")
    if not any(keys <= set(columns) for keys in enough):
        shown = ", ".join(there[:20])
        raise InputError(
            f"{where}: expected columns staleness, or update and read_version; it has {shown}: "
            "name yours, such as --columns staleness=lag"
        )
