"""Collects rows, events and losses to evaluate for the recorder."""

from __future__ import annotations

import math
import struct
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array, Columns
from asgd.rundir.columns import (
    DISCARDED_COLUMNS,
    MEMBER_COLUMNS,
    POSITION_COLUMNS,
    TRACE_COLUMNS,
    of_gradients,
)
from cluster.core.state import State
from cluster.core.update import Discarded, Update

_ROWS_PER_RECORD = 16_384
_BYTES_PER_RECORD = 16_000_000  # of parameters to evaluate


@dataclass(frozen=True)
class Evaluation:
    """A loss to evaluate.

    Attributes
    ----------
    update
        Updates applied so far.
    seconds
        From the start of the run.
    parameters
        Shape (d,).
    """

    update: int
    seconds: float
    parameters: Array


@dataclass(frozen=True, eq=False)
class Evaluations:
    """Several evaluations with their parameters in one array, which is cheaper to send.

    Attributes
    ----------
    update, seconds
        As in `Evaluation`, shape (m,).
    parameters
        Shape (m, d).
    """

    update: npt.NDArray[np.int64]
    seconds: Array
    parameters: Array

    @classmethod
    def of(cls, evaluations: list[Evaluation]) -> Evaluations:
        """Stack evaluations."""
        update = np.array([one.update for one in evaluations], np.int64)
        seconds = np.array([one.seconds for one in evaluations])
        if len(evaluations) == 1:
            return cls(update, seconds, evaluations[0].parameters[np.newaxis])
        parameters = [one.parameters for one in evaluations]
        return cls(update, seconds, np.stack(parameters) if parameters else np.empty((0, 0)))

    def __len__(self) -> int:
        return len(self.update)

    def __iter__(self) -> Iterator[Evaluation]:
        columns = (self.update.tolist(), self.seconds.tolist(), self.parameters)
        return (Evaluation(*one) for one in zip(*columns, strict=True))


NO_EVALUATIONS = Evaluations.of([])


@dataclass(frozen=True, eq=False)
class Work:
    """The slow part of a record: evaluations, then a checkpoint.

    Attributes
    ----------
    evaluations
        Points of the loss curve, ordered by `update`.
    checkpoint
        The newest state to save.
    """

    evaluations: Evaluations = NO_EVALUATIONS
    checkpoint: State | None = None

    def __bool__(self) -> bool:
        return bool(len(self.evaluations)) or self.checkpoint is not None

    @property
    def nbytes(self) -> int:
        """Size of the parameters in it."""
        saved = self.checkpoint
        arrays = () if saved is None else (saved.parameters, *saved.rule, *saved.reads)
        return self.evaluations.parameters.nbytes + sum(array.nbytes for array in arrays)

    def then(self, following: Work) -> Work:
        """Return this work joined with the following; only the newest checkpoint is saved."""
        evaluations = Evaluations.of([*self.evaluations, *following.evaluations])
        return Work(evaluations, following.checkpoint or self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything that happened in a run since the previous record.

    Attributes
    ----------
    trace
        The columns `TRACE_COLUMNS` of equal length, ordered by `update`.
    members
        The columns `MEMBER_COLUMNS` of equal length: the gradients of updates that apply a mean.
    discarded
        The columns `DISCARDED_COLUMNS` of equal length, ordered by `update`.
    evaluations
        Points of the loss curve, ordered by `update`.
    events
        Lines for `events.jsonl`: the kind under "event", then the other fields.
    checkpoint
        The newest state to save.
    number
        Number of this record: 0, 1, ...
    positions
        The columns `POSITION_COLUMNS` of equal length; empty without epochs.
    skipped
        Updates whose losses are not evaluated, in order.
    """

    trace: Columns
    members: Columns
    discarded: Columns
    evaluations: Evaluations = NO_EVALUATIONS
    events: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: State | None = None
    number: int = 0
    positions: Columns = field(default_factory=lambda: _Rows(POSITION_COLUMNS).columns())
    skipped: list[int] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether nothing happened."""
        rows = len(self.trace["update"]) + len(self.discarded["update"]) + len(self.evaluations)
        return not rows and not self.events and self.checkpoint is None

    @property
    def nbytes(self) -> int:
        """Size of the parameters in it."""
        return self.work.nbytes

    @property
    def work(self) -> Work:
        """The slow part of the record."""
        return Work(self.evaluations, self.checkpoint)

    @property
    def rows(self) -> Record:
        """The record without its work."""
        return replace(self, evaluations=NO_EVALUATIONS, checkpoint=None)


class Ledger:
    """Collects what happens and hands it over as a `Record`.

    Each record contains only the last state assigned to `checkpoint`.

    Attributes
    ----------
    most_evaluations
        Number of losses to evaluate after which the ledger skips further ones, or is full.
    skips
        Whether it skips losses.
    skipped
        Number of losses skipped so far.
    """

    def __init__(self, skips: bool = False) -> None:
        self.most_evaluations: float = math.inf
        self.skips = skips
        self.skipped = 0
        self._records = 0
        self._clear()

    def _clear(self) -> None:
        self._trace = _Rows(TRACE_COLUMNS)
        self._members = _Rows(MEMBER_COLUMNS)
        self._discarded = _Rows(DISCARDED_COLUMNS)
        self._positions = array("q")  # of the gradients of trace and members, in order
        self._evaluations: list[Evaluation] = []
        self._events: list[dict[str, Any]] = []
        self._skipped: list[int] = []
        self._evaluation_bytes = 0
        self.checkpoint: State | None = None

    @property
    def ready(self) -> bool:
        """Whether there is enough for a record."""
        return self._has_rows(1) or (bool(self._evaluations) and self._has_evaluations(1))

    @property
    def full(self) -> bool:
        """Whether updates must wait until the ledger is drained."""
        return self._has_rows(2) or (not self.skips and self._has_evaluations(2))

    def _has_rows(self, records: int) -> bool:
        return len(self._trace) + len(self._discarded) >= records * _ROWS_PER_RECORD

    def _has_evaluations(self, records: int) -> bool:
        enough = len(self._evaluations) >= self.most_evaluations
        return enough or self._evaluation_bytes >= records * _BYTES_PER_RECORD

    def update(self, update: Update) -> None:
        """Add the rows of an update, its members and the gradients discarded before it."""
        self._trace.add(update.row)
        for member in update.members:
            self._members.add(member)
        self._positions.extend(update.positions)
        self.discarded(update.discarded)

    def discarded(self, rows: Iterable[Discarded]) -> None:
        """Add gradients that were discarded."""
        for row in rows:
            self._discarded.add(row)

    def evaluation(
        self, update: int, seconds: float, parameters: Array, *, needed: bool = False
    ) -> None:
        """Add a loss to evaluate, or skip it unless it is `needed`; the parameters are copied."""
        if self.skips and not needed and self._has_evaluations(1):
            self._skipped.append(update)
            self.skipped += 1
            return
        self._evaluations.append(Evaluation(update, seconds, parameters.copy()))
        self._evaluation_bytes += parameters.nbytes

    def copy_of(self, update: int) -> Array | None:
        """Return the parameters after an update, if its loss was added last; do not modify them."""
        last = self._evaluations[-1] if self._evaluations else None
        return last.parameters if last is not None and last.update == update else None

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Add an event with the current time and return it; `fields` are JSON values."""
        event = {"event": kind, "time": time.time(), **fields}
        self._events.append(event)
        return event

    def note(self, event: dict[str, Any]) -> None:
        """Add an event that already has a time."""
        self._events.append(event)

    def drain(self) -> Record:
        """Return everything collected since the last call."""
        trace, members = self._trace.columns(), self._members.columns()
        record = Record(
            trace=trace,
            members=members,
            discarded=self._discarded.columns(),
            evaluations=Evaluations.of(self._evaluations) if self._evaluations else NO_EVALUATIONS,
            events=self._events,
            checkpoint=self.checkpoint,
            number=self._records,
            positions=_placed(self._positions, trace, members),
            skipped=self._skipped,
        )
        self._records += not record.empty
        self._clear()
        return record


def _placed(positions: array[int], trace: Columns, members: Columns) -> Columns:
    """Return `POSITION_COLUMNS` from the positions of all gradients, in order."""
    if not positions:
        return _Rows(POSITION_COLUMNS).columns()
    gradients = of_gradients(trace, members, ("update", "worker"))
    return {**gradients, "position": np.array(positions, np.int64)}


class _Rows:
    """A growing table with packed rows.

    The server makes thousands of updates between two records. Rows of Python objects would fill the
    cache, and converting them would pause the server.
    """

    def __init__(self, types: Mapping[str, type]) -> None:
        self._types = types
        kinds = ["d" if issubclass(dtype, np.floating) else "q" for dtype in types.values()]
        self._row = struct.Struct("<" + "".join(kinds))
        fields = zip(types, kinds, strict=True)
        self._layout = np.dtype([(name, f"<{kind}") for name, kind in fields])
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data) // self._row.size

    def add(self, row: tuple[float, ...]) -> None:
        self._data += self._row.pack(*row)

    def columns(self) -> Columns:
        table = np.frombuffer(self._data, self._layout)
        return {name: table[name].astype(dtype) for name, dtype in self._types.items()}
