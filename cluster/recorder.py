"""The recorder: writes the trace and evaluates the loss, off the server's critical path."""

from __future__ import annotations

from pathlib import Path

from asgd.problems.base import Problem
from asgd.trace import LOSS_COLUMNS, RunWriter
from cluster.ledger import Record


class Recorder:
    """Writes the records of one run, in the order in which they are given.

    Parameters
    ----------
    path
        The run directory, which exists.
    problem
        What the loss belongs to.
    """

    def __init__(self, path: Path, problem: Problem) -> None:
        self._writer = RunWriter(path)
        self._problem = problem
        self._loss: dict[str, list[float]] = {name: [] for name in LOSS_COLUMNS}

    def record(self, record: Record) -> None:
        """Write the trace and the events of a record, then evaluate and write its losses."""
        self._writer.members(record.members)
        self._writer.trace(record.trace)
        for event in record.events:
            fields = dict(event)
            self._writer.event(fields.pop("event"), **fields)
        for evaluation in record.evaluations:
            loss = float(self._problem.loss(evaluation.parameters))
            row = (evaluation.update, evaluation.seconds, loss)
            for column, value in zip(self._loss.values(), row, strict=True):
                column.append(value)
        if record.evaluations:
            self._writer.loss(self._loss)

    @property
    def first_loss(self) -> float | None:
        """The loss before the first update."""
        return next(iter(self._loss["loss"]), None)

    @property
    def latest_loss(self) -> tuple[int | None, float | None]:
        """The update evaluated last and its loss."""
        if not self._loss["loss"]:
            return None, None
        return int(self._loss["update"][-1]), self._loss["loss"][-1]
