"""What the server notes of each update, until the recorder takes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from asgd.trace import TRACE_COLUMNS

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Parameters whose loss is to be evaluated.

    Attributes
    ----------
    update
        Updates applied to reach them.
    seconds
        From the start of the run.
    parameters
        Shape (d,).
    """

    update: int
    seconds: float
    parameters: Array


@dataclass(frozen=True)
class Record:
    """A stretch of a run: what happened since the record before it.

    Attributes
    ----------
    trace
        The columns `TRACE_COLUMNS`, equally long, in order of `update`.
    evaluations
        Points of the loss curve, in order of `update`.
    events
        What else is worth a line in `events.jsonl`: the kind under "event", then its fields.
    """

    trace: dict[str, npt.NDArray[Any]]
    evaluations: list[Evaluation] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether nothing happened."""
        return not (len(self.trace["update"]) or self.evaluations or self.events)


class Ledger:
    """Collects rows in preallocated columns and hands them over as a `Record`."""

    def __init__(self, rows: int = 4096) -> None:
        self._capacity = rows
        self._clear()

    def _clear(self) -> None:
        self.rows = 0
        self.evaluation_bytes = 0
        self._columns = {
            name: np.empty(self._capacity, dtype) for name, dtype in TRACE_COLUMNS.items()
        }
        self._arrays = tuple(self._columns.values())
        self._evaluations: list[Evaluation] = []
        self._events: list[dict[str, Any]] = []

    def row(self, *values: float) -> None:
        """Add the row of one update, in the order of `TRACE_COLUMNS`."""
        if self.rows == len(self._arrays[0]):
            self._columns = {
                name: np.concatenate((column, np.empty_like(column)))
                for name, column in self._columns.items()
            }
            self._arrays = tuple(self._columns.values())
        for column, value in zip(self._arrays, values, strict=True):
            column[self.rows] = value
        self.rows += 1

    def evaluation(self, update: int, seconds: float, parameters: Array) -> None:
        """Keep a copy of parameters whose loss is to be evaluated."""
        self._evaluations.append(Evaluation(update, seconds, parameters.copy()))
        self.evaluation_bytes += parameters.nbytes

    def event(self, kind: str, **fields: Any) -> None:
        """Keep an event; `fields` are JSON values."""
        self._events.append({"event": kind, **fields})

    def drain(self) -> Record:
        """Return everything collected since the last call."""
        trace = {name: column[: self.rows] for name, column in self._columns.items()}
        record = Record(trace, self._evaluations, self._events)
        self._clear()
        return record
