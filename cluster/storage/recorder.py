"""The recorder: writes trace, losses and checkpoints, off the server's critical path."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from asgd.arrays import Array
from asgd.goals import reached_target
from asgd.problems.base import Problem
from asgd.rundir.checkpoint import CHECKPOINTS, DamagedCheckpointError, paths, version_of
from asgd.rundir.columns import LOSS_COLUMNS, TRACE_COLUMNS
from asgd.rundir.reader import read_run
from asgd.rundir.repair import recorded_losses
from asgd.rundir.writer import RunWriter
from cluster.core.ledger import Evaluations, Record, Work
from cluster.core.state import State
from cluster.metrics import Evaluated, Metrics
from cluster.storage.checkpoint import save
from cluster.storage.lease import Lease
from cluster.storage.write_ahead import cut_log, remove_log

_NO_ROWS = {name: np.empty(0, kind) for name, kind in TRACE_COLUMNS.items()}
_HURRIED_SECONDS = 2.0  # for each loss after `hurry`


class EvaluationError(Exception):
    """The problem's code raised during an evaluation of the loss; see `__cause__`."""


class Recorder:
    """Writes the records of one server, in order.

    Parameters
    ----------
    path
        The existing run directory, which may contain the beginning of the run.
    problem
        The problem, for evaluating its loss.
    epoch
        Incarnation of the server; once there is a newer one, nothing more is written.
    metrics
        The dashboards.

    Attributes
    ----------
    first_loss
        The loss before the first update, None until it is known.
    latest_loss
        Update and loss of the last evaluation.
    latest_metrics
        The metrics evaluated last.
    goal
        Message that `run.target_loss` was reached, with the first such loss; None before.
    """

    def __init__(
        self, path: Path, problem: Problem, epoch: int, metrics: Metrics | None = None
    ) -> None:
        import pandas  # noqa: F401  # else pyarrow imports it at the first table, during the run

        self._writer = RunWriter(path)
        self._problem = problem
        self._epoch = epoch
        self._metrics = metrics or Metrics()
        self._checkpoints = path / CHECKPOINTS
        self._next = 0
        self._writing = threading.Lock()
        self._evaluator = ThreadPoolExecutor(1, "evaluation")
        self._hurried: Future[None] = Future()
        self._gave_up = False
        self._config = read_run(path).config
        self._lease = Lease(self._checkpoints, self._config.cluster.lease)
        self.first_loss: float | None = None
        self.latest_loss: tuple[int | None, float | None] = (None, None)
        self.latest_metrics: Mapping[str, float] = {}
        self.goal: str | None = None
        self._note(Evaluated(*row) for row in recorded_losses(path))

    def record(self, record: Record) -> float:
        """Write the trace and the events of a record, evaluate its losses, save its checkpoint.

        Returns
        -------
        float
            Seconds spent on evaluating losses.

        Raises
        ------
        LeaseLostError
            There is a newer incarnation of the server.
        OSError
            The record cannot be written.
        EvaluationError
            A loss cannot be evaluated.
        """
        return self.work(record.work) if not record.empty and self.write(record) else 0.0

    def write(self, record: Record) -> bool:
        """Write a record without its work; return whether it is the next one.

        Raises
        ------
        LeaseLostError, OSError
            As for `record`.
        """
        # When a server dies, Ray may lose a large record but deliver a later small one.
        if record.number != self._next:
            return False
        self._next += 1
        with self._writing, self._lease.held(self._epoch):
            self._writer.members(record.members)
            self._writer.discarded(record.discarded)
            self._writer.positions(record.positions)
            self._writer.skipped(record.skipped)
            self._writer.trace(record.trace)
            for event in record.events:
                fields = dict(event)
                self._writer.event(fields.pop("event"), **fields)
            self._metrics.show(record.trace, [])
        return True

    def work(self, work: Work) -> float:
        """Evaluate the losses and save the checkpoint of written records.

        Returns and raises as `record`. Another thread may write records meanwhile.
        """
        start = time.perf_counter()
        losses = self._losses(work.evaluations)
        seconds = time.perf_counter() - start
        with self._writing, self._lease.held(self._epoch):
            if losses:
                self._writer.metrics((one.update, one.metrics) for one in losses)
                rows = zip(*(one[: len(LOSS_COLUMNS)] for one in losses), strict=True)
                self._writer.loss(dict(zip(LOSS_COLUMNS, rows, strict=True)))
                self._note(losses)
                self._metrics.show(_NO_ROWS, losses)
            if work.checkpoint is not None and not self._gave_up:
                self._save(work.checkpoint)
        return seconds

    def hurry(self) -> None:
        """Give up a slow loss and all later ones; call this from another thread.

        Then no more checkpoints are saved, so that a resumed run evaluates the missing losses.
        """
        if not self._hurried.done():
            self._hurried.set_result(None)

    def _losses(self, evaluations: Evaluations) -> list[Evaluated]:
        """Return the evaluated losses and metrics, up to one that was given up."""
        losses: list[Evaluated] = []

        def evaluate() -> None:
            for one in evaluations:
                if self._gave_up:
                    return
                losses.append(Evaluated(one.update, one.seconds, *self._evaluate(one.parameters)))

        if not len(evaluations) or self._gave_up:
            return []
        evaluated = self._evaluator.submit(evaluate)
        wait((evaluated, self._hurried), return_when=FIRST_COMPLETED)
        while not evaluated.done():
            known = len(losses)
            wait((evaluated,), timeout=_HURRIED_SECONDS)
            if not evaluated.done() and len(losses) == known:
                self._gave_up = True
                return losses[:known]
        evaluated.result()
        return losses

    def _evaluate(self, parameters: Array) -> tuple[float, dict[str, float]]:
        try:
            return float(self._problem.loss(parameters)), self._problem.metrics(parameters)
        except Exception as error:
            raise EvaluationError from error

    def _note(self, losses: Iterable[Evaluated]) -> None:
        for update, _, loss, metrics in losses:
            self.first_loss = loss if self.first_loss is None else self.first_loss
            self.latest_loss = update, loss
            self.latest_metrics = metrics
            self.goal = self.goal or reached_target(self._config, loss, update)

    def _save(self, state: State) -> None:
        # A checkpoint must not be ahead of the record, so the record is flushed first.
        self._writer.sync()
        try:
            save(self._checkpoints, state)
        except DamagedCheckpointError as error:
            self._writer.event("checkpoint_damaged", reason=str(error))
            return
        if state.version == self._config.run.updates:
            remove_log(self._checkpoints)
            return
        for older in paths(self._checkpoints)[1:]:
            cut_log(self._checkpoints, version_of(older))
            self._writer.count(self._config, version_of(older))  # no server goes back before it
