"""Turns the rows of a log into those of a record, and counts what cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from asgd.arrays import Array, Columns
from asgd.counted import counted
from asgd.errors import InputError
from asgd.records.columns import ITEM_COLUMNS, UNKNOWN, About
from asgd.records.foreign import Batch, Names

NO_VERSION = "without a version"
LATER = "with a version later than the update"
EARLY = "with a start before the version that was read"
BACKWARDS = "with an end before the start"
DUPLICATE = "of an item that was there before in the same step"

_MOST_NAMES = 100_000
_MOST_NOTES = 20
# A log is unsorted if its update numbers fall more often than this, and more than once per so
# many rows.
_MANY_FALLS, _SHARE_OF_FALLS = 3, 100


class RowChecker:
    """Checks the rows of a log, batch after batch.

    Attributes
    ----------
    rows
        Rows accepted.
    left_out
        Number of rows that cannot be used, by the reason.
    notes
        Peculiarities of the log, one sentence each.
    """

    def __init__(self) -> None:
        self.rows = self._seen = self._session = self._falls = 0
        self.left_out: Counter[str] = Counter()
        self.notes: list[str] = []
        self._where: dict[str, str] = {}
        self._workers: dict[str, int] | None = {}
        self._last: tuple[float, int] | None = None  # update in the log, update in the record
        self._step_items: tuple[int, set[str]] = (-1, set())

    @property
    def workers(self) -> list[str]:
        """Names of workers 0, 1, ...; empty if there are too many of them."""
        return list(self._workers or ())

    def accept(self, batch: Batch, place: str) -> Columns:
        """Return the rows of a record that a batch holds.

        Parameters
        ----------
        batch
            Columns of the log under our names, `asgd.records.formats.base.ITEM_KEYS`.
        place
            The file, for messages.

        Raises
        ------
        InputError
            A count or a version is not a whole number.
        """
        numbers = {key: column for key, column in batch.items() if isinstance(column, np.ndarray)}
        _check_whole(numbers, place, self._seen)
        staleness, begun, ready = _behind(numbers)
        unknown = ~(staleness >= 0) & ~(staleness < 0)
        for key in ("read_version", "staleness", "update"):
            if key in numbers:  # many systems write -1 for an unknown value
                unknown |= ~(numbers[key] >= 0)
        kept = ~unknown
        self._leave_out(NO_VERSION, unknown, place)
        # A comparison with nan, an unknown version, is False.
        for why, wrong in (
            (EARLY, begun < 0),
            (BACKWARDS, ready < np.nan_to_num(begun)),
            (LATER, (staleness < 0) | (begun > staleness) | (ready > staleness)),
        ):
            self._leave_out(why, kept & wrong, place)
            kept &= ~wrong
        updates = self._updates(numbers.get("update"), kept, place)
        again = self._duplicates(batch.get("item"), updates, kept)
        self._leave_out(DUPLICATE, again, place)
        self._seen += len(kept)
        kept &= ~again
        found = self._columns(batch, numbers, kept)
        found["update"] = updates[kept]
        found["staleness"] = staleness[kept].astype(np.int64)
        in_flight = ready - begun if "start_version" in numbers else ready
        for name, part in (("in_publication", begun), ("in_flight", in_flight)):
            found[name] = np.nan_to_num(part[kept], nan=UNKNOWN).astype(np.int64)
        return {name: np.asarray(found[name], kind) for name, kind in ITEM_COLUMNS.items()}

    def finish(self, source: object, *, leave_out: bool) -> None:
        """Refuse a log that cannot be used as a whole.

        Raises
        ------
        InputError
            Nothing is left, rows cannot be used and `leave_out` is False, or the rows are not in
            order.
        """
        if self._falls > max(_MANY_FALLS, self._seen // _SHARE_OF_FALLS):
            raise InputError(
                f"{source}: {self._falls:,} of {counted(self._seen, 'rows')} have a smaller update "
                "than the row before: sort the rows by update, or leave the update out of --columns"
            )
        if self.left_out and not leave_out:
            found = "; ".join(
                f"{count:,} of {counted(self._seen, 'rows')} {why} (first: {self._where[why]})"
                for why, count in self.left_out.items()
            )
            raise InputError(f"{source}: {found}; --leave-out imports the others")
        if not self.rows:
            raise InputError(f"{source}: no row that can be used, of {self._seen:,}")

    def described(self, about: About) -> About:
        """Return `about` completed by the findings in the rows."""
        return msgspec.structs.replace(
            about,
            workers=self.workers,
            left_out=dict(self.left_out),
            notes=[*about.notes, *self.notes],
        )

    def note(self, sentence: str) -> None:
        """Add a note on the log, unless there are too many."""
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(sentence)

    def _leave_out(self, why: str, rows: npt.NDArray[np.bool_], place: str) -> None:
        if rows.any():
            self.left_out[why] += int(rows.sum())
            self._where.setdefault(why, f"row {self._seen + int(rows.argmax()) + 1}, in {place}")

    def _updates(
        self, given: Array | None, kept: npt.NDArray[np.bool_], place: str
    ) -> npt.NDArray[np.int64]:
        """Return the update of each row; where the numbers fall, a new session continues them."""
        found = np.zeros(len(kept), np.int64)
        self._sessions = np.full(len(kept), self._session)
        rows = int(kept.sum())
        if not rows:
            return found
        if given is None:
            found[kept] = self.rows + np.arange(rows)
            return found
        updates = given[kept]
        before, stored = self._last or (updates[0], int(updates[0]))
        steps = np.diff(updates, prepend=before)
        fallen = steps < 0
        for row in np.flatnonzero(fallen)[:_MOST_NOTES]:
            earlier = updates[row - 1] if row else before
            self.note(
                f"The update falls from {earlier:.0f} to {updates[row]:.0f} in {place}: taken as "
                "a restart; the numbering continues."
            )
        self._falls += int(fallen.sum())
        found[kept] = stored + np.cumsum(np.where(fallen, 1, steps)).astype(np.int64)
        self._sessions[kept] = self._session + np.cumsum(fallen)
        self._session += int(fallen.sum())
        self._last = float(updates[-1]), int(found[kept][-1])
        return found

    def _duplicates(
        self, items: Array | Names | None, updates: npt.NDArray[np.int64], kept: npt.NDArray[Any]
    ) -> npt.NDArray[np.bool_]:
        """Return which rows repeat an item of the same update."""
        again = np.zeros(len(kept), bool)
        if not isinstance(items, Names):
            return again
        step, seen = self._step_items
        for row in np.flatnonzero(kept & (items.codes >= 0)):
            if updates[row] != step:
                step, seen = int(updates[row]), set()
            name = items.names[items.codes[row]]
            again[row] = name in seen
            seen.add(name)
        self._step_items = step, seen
        return again

    def _columns(
        self, batch: Batch, numbers: Mapping[str, Array], kept: npt.NDArray[np.bool_]
    ) -> Columns:
        """Return the columns that need no check."""
        rows = int(kept.sum())
        missing = np.full(rows, np.nan)
        found: Columns = {
            "item": self.rows + np.arange(rows),
            "samples": np.ones(rows),
            "loss": numbers["loss"][kept] if "loss" in numbers else missing,
            "seconds": numbers["seconds"][kept] if "seconds" in numbers else missing,
            "session": self._sessions[kept],
            "worker": self._numbered(batch.get("worker"), rows, kept),
        }
        if "samples" in numbers:
            found["samples"] = np.maximum(np.nan_to_num(numbers["samples"][kept], nan=1.0), 0.0)
        self.rows += rows
        return found

    def _numbered(
        self, workers: Array | Names | None, rows: int, kept: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64]:
        if not isinstance(workers, Names) or self._workers is None:
            return np.full(rows, UNKNOWN)
        known = self._workers
        ours = [known.setdefault(name, len(known)) for name in workers.names]
        if len(known) > _MOST_NAMES:
            self.note(f"More than {_MOST_NAMES:,} workers: they are not told apart.")
            self._workers = None
            return np.full(rows, UNKNOWN)
        return np.array([*ours, UNKNOWN])[workers.codes[kept]]


def _behind(numbers: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """Return how far an item's parameters were behind at its use, its start and its end.

    The first is the staleness. Each is nan where it is unknown, and negative where the versions
    run backwards.
    """
    unknown = np.full(len(next(iter(numbers.values()))), np.nan)
    read = numbers.get("read_version", unknown)

    def behind(key: str) -> Array:
        version = numbers.get(key, unknown)
        return np.where((version >= 0) & (read >= 0), version - read, np.nan)

    begun, ready = behind("start_version"), behind("end_version")
    if "staleness" in numbers:
        return numbers["staleness"], begun, ready
    if "update" in numbers:
        return numbers["update"] - read, begun, ready
    return ready, begun, ready


def _check_whole(numbers: Mapping[str, Array], place: str, seen: int) -> None:
    whole = ("update", "read_version", "start_version", "end_version", "staleness", "samples")
    for key in whole:
        if key not in numbers:
            continue
        column = numbers[key]
        wrong = np.isfinite(column) & (column != np.floor(column)) | (np.abs(column) > 2.0**53)
        if wrong.any():
            row = int(wrong.argmax())
            hint = "; means per step are read by --format metrics" if key == "staleness" else ""
            raise InputError(
                f"{place}: row {seen + row + 1}: {key} = {column[row]:g}: "
                f"expected a whole number{hint}"
            )
