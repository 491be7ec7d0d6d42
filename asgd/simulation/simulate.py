"""Asynchronous SGD in virtual time: a parameter server, or independent draws of the staleness.

`simulate` writes the same run directory as a real run, and is bitwise reproducible. The order of
updates does not depend on parameters, so it is simulated first. The gradients are then computed in
blocks whose snapshots already exist.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from asgd.arrays import Array, euclidean_norm
from asgd.config.make import Configuration, as_config
from asgd.config.tables import RunConfig
from asgd.divergence import check_divergence, not_finite, remedy
from asgd.draws import WorkerDraws
from asgd.errors import InputError, RunFailedError, message_of
from asgd.goals import reached_target, time_is_up
from asgd.local_steps import Pushes
from asgd.policy import Policy
from asgd.problems.base import Problem, starting_point
from asgd.problems.make import make_problem
from asgd.progress import CallbackError, Progress, call_back
from asgd.rules.base import Optimizer
from asgd.rules.make import make_rule
from asgd.rundir.alive import heartbeat
from asgd.rundir.columns import LOSS_COLUMNS
from asgd.rundir.files import describe_os_error
from asgd.rundir.parameters import Reached
from asgd.rundir.problem_record import ProblemRecord
from asgd.rundir.repeats import run_repeats
from asgd.rundir.writer import RunWriter, default_path
from asgd.schedules import learning_rate_schedule
from asgd.simulation.gathering import Gathering, snapshot_slots
from asgd.simulation.run_order import check_policy, run_order

_PART = 100_000  # updates in one part of the trace
_BLOCK_NUMBERS = 1 << 20  # entries of the gradients of one block
_PROGRESS_SECONDS = 0.25
_FEW = 8  # for fewer updates, single calls are faster than array code


def simulate(
    config: Configuration,
    out: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Run a configuration in virtual time and return the run directory.

    >>> path = asgd.simulate({"problem": {"kind": "quadratic"}, "run": {"updates": 100}})
    >>> len(asgd.read_run(path).trace)
    100

    Parameters
    ----------
    config
        The run as a configuration, nested mappings or a file. `config.simulation` sets the times
        that a real run would measure. `mode = "bounded"` cannot be simulated; the transport is
        ignored.
    out
        The run directory, which must be empty or missing; default
        `runs/<kind of problem>-<date>-<time>`. With `run.repeats` it contains one run directory per
        repeat, see `asgd.rundir.repeats`.
    progress
        Called a few times per second. An exception from it ends the run as failed and propagates.

    Raises
    ------
    InputError
        The configuration or the directory cannot be used.
    RunFailedError
        A gradient is not finite or the loss diverged; the directory is readable up to there.
    KeyboardInterrupt
        Ctrl-C; the directory is readable and records the interrupt.
    """
    config = as_config(config)
    if config.run.repeats > 1:
        return run_repeats(config, out, lambda one, path: simulate(one, path, progress))
    check_policy(config)
    problem = make_problem(config)
    start = ProblemRecord.of(problem, config.run.seed)
    draws = WorkerDraws(config, problem)
    order = run_order(config, draws, problem.n_samples)
    descent = _Descent(problem, config, order, draws)
    writer = RunWriter.create(out if out is not None else default_path(config), config)
    record = _Record(config, descent, order, writer, progress)
    failure = None
    # As many BLAS threads as a worker has: more would busy-wait, for long on a busy machine.
    threads = threadpool_limits(config.cluster.threads_per_worker, user_api="blas")
    with heartbeat(writer.path), threads:
        try:
            _make(descent, record, writer, config, start)
        except CallbackError as error:
            failure = error.raised
    if failure is not None:  # raised outside the handler, so that its context is not CallbackError
        raise failure
    return writer.path


def _make(
    descent: _Descent, record: _Record, writer: RunWriter, config: RunConfig, start: ProblemRecord
) -> None:
    """Make every update and record how the run ended."""
    try:
        start.note(writer)
        with np.errstate(over="ignore", invalid="ignore"):  # _Descent checks for non-finite values
            goal = _follow(descent, record, config, record.order.applied_seconds)
        record.end()
        writer.event("finish", **({} if goal is None else {"reason": goal}))
    except KeyboardInterrupt:
        _note_end(record, writer, "interrupted")
        raise
    except RunFailedError as error:
        _fail(record, writer, error)
        raise
    except CallbackError as error:
        _note_end(record, writer, "failed", reason=f"the progress callback: {error}")
        raise
    except OSError as error:
        failure = RunFailedError(describe_os_error(writer.path, error))
        raise _fail(record, writer, failure) from error
    except Exception as error:  # the user's own problem may raise anything
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        reason = f"update {descent.applied}: {kind}{message_of(error)}"
        raise _fail(record, writer, RunFailedError(reason)) from error


def _fail(record: _Record, writer: RunWriter, failure: RunFailedError) -> RunFailedError:
    _note_end(record, writer, "failed", reason=str(failure))
    failure.run = writer.path
    return failure


def _note_end(record: _Record, writer: RunWriter, kind: str, **fields: str) -> None:
    # On a full disk this fails too; report the first error.
    with suppress(OSError):
        record.end()
    with suppress(OSError):
        writer.event(kind, **fields)


def _not_finite(update: int, gradient: Array) -> str:
    return f"update {update}: the gradient is {not_finite(gradient)}; {remedy(update)}"


class _Descent:
    """Computes gradients at snapshots and applies them in order.

    Snapshots are kept in slots. If each worker reads the version that its own last update made, a
    worker has one slot; otherwise slots are shared, see `snapshot_slots`.
    """

    def __init__(
        self, problem: Problem, config: RunConfig, order: Gathering, draws: WorkerDraws
    ) -> None:
        self.problem = problem
        self.x = starting_point(problem, config.run.seed)
        self.applied = 0
        self.norms = np.empty(len(order))
        self._order = order
        self._pushes = Pushes(config, problem, draws)
        self._learning_rates = learning_rate_schedule(config.optimizer).array(len(order))
        self._learning_rate = self._learning_rates.tolist()
        self._plain = config.optimizer.rule == "sgd" and config.optimizer.clip_norm is None
        self._optimizer = Optimizer(make_rule(config), self.x)
        self._staleness = order.staleness.tolist()
        independent = config.simulation.staleness != "server"
        self._own_slots = Policy.of(config.cluster).plain and not independent
        if self._own_slots:
            self._read_slot = order.worker
            self._write_slots = order.worker[:, 0]
        else:
            slots = snapshot_slots(order.read_version)
            self._read_slot = slots[order.read_version]
            self._write_slots = slots[1:]
        self._write_slot = self._write_slots.tolist()
        self._snapshots = np.tile(self.x, (max(self._write_slot) + 1, 1))

    @property
    def reached(self) -> Array:
        """The parameters after the last complete update, shape (d,), even during the next one."""
        slot = self._write_slot[self.applied - 1] if self.applied else 0
        return np.asarray(self._snapshots[slot])

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Cut the updates into blocks of one batch size that read no version after their start."""
        longest = max(1, _BLOCK_NUMBERS // (self.problem.dim * self._order.each))
        start, size = 0, int(self._order.batch_size[0].max())
        newest = self._order.read_version.max(axis=1).tolist()
        read = zip(newest, self._order.batch_size.max(axis=1).tolist(), strict=True)
        for update, (version, own_size) in enumerate(read):
            if version > start or own_size != size or update - start == longest:
                yield start, update
                start, size = update, own_size
        yield start, len(self.norms)

    def gradients(self, start: int, stop: int) -> Array:
        """Return the gradient of each update of a block, shape (stop - start, d)."""
        each = self._order.each
        every = self._each_gradient(slice(start, stop))
        if each == 1:
            return every
        groups = every.reshape(stop - start, each, -1)
        return np.stack([np.sum(group, axis=0) / each for group in groups])  # as the server does

    def _each_gradient(self, part: slice) -> Array:
        """Return all gradients of a block, or the differences, shape (gradients, d)."""
        order = self._order
        columns = order.worker, order.sequence, order.batch_size, self._read_slot
        worker, sequence, sizes, slots = (column[part].ravel() for column in columns)
        points, size = self._snapshots[slots], int(sizes[0])
        if order.position is None and (sizes == size).all():
            # If each worker has one slot, no worker delivers twice in a block.
            return self._pushes.pushes(worker, sequence, points, size, distinct=self._own_slots)
        places = np.zeros_like(sizes) if order.position is None else order.position[part].ravel()
        numbers = (column.tolist() for column in (worker, sequence, sizes, places))
        each = zip(*numbers, points, strict=True)
        return np.stack(
            [
                np.array(self._pushes.push(who, number, point, samples, place))
                for who, number, samples, place, point in each
            ]
        )

    def apply(self, gradients: Array) -> None:
        """Apply the next gradients in order, shape (updates, d)."""
        if self._plain and self.problem.dim == 1 and len(gradients) >= _FEW:
            self._apply_scalars(gradients[:, 0])
            return
        x, apply, reads = self.x, self._optimizer.apply, self._optimizer.rule.reads
        for number, gradient in enumerate(gradients, self.applied):
            norm = euclidean_norm(gradient)
            if not math.isfinite(norm):
                raise RunFailedError(_not_finite(number, gradient))
            read = self._snapshots[self._read_slot[number, 0]] if reads else None
            rate, staleness = self._learning_rate[number], self._staleness[number]
            apply(x, gradient, rate, number, staleness, read)
            self._snapshots[self._write_slot[number]] = x
            self.norms[number] = norm
            self.applied = number + 1

    def _apply_scalars(self, gradients: Array) -> None:
        """Apply plain SGD steps in one dimension as a cumulative sum."""
        squares = (gradients * gradients).astype(float)
        over = ~np.isfinite(squares)
        squares[over] = gradients[over].astype(float) ** 2
        finite = np.isfinite(squares)
        good = len(gradients) if finite.all() else int(finite.argmin())
        part = slice(self.applied, self.applied + good)
        steps = gradients[:good] * self._learning_rates[part].astype(gradients.dtype)
        self.norms[part] = np.sqrt(squares[:good])
        points = np.cumsum(np.concatenate([self.x, -steps]))
        self._snapshots[self._write_slots[part], 0] = points[1:]
        self.x[:] = points[-1]
        self.applied = part.stop
        if good < len(gradients):
            raise RunFailedError(_not_finite(part.stop, gradients[good : good + 1]))


class _Record:
    """Writes the run directory of a descent."""

    def __init__(
        self,
        config: RunConfig,
        descent: _Descent,
        order: Gathering,
        writer: RunWriter,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._config = config
        self._descent = descent
        self.order = order
        self._staleness = order.staleness
        self._writer = writer
        self._progress = progress
        self._written = self._evaluated = 0
        self._loss: dict[str, list[float]] = {name: [] for name in LOSS_COLUMNS}
        self._metrics: list[tuple[int, dict[str, float]]] = []
        self._started = self._shown = time.perf_counter()

    def evaluate(self) -> float:
        """Evaluate the loss, report progress, and return the loss."""
        applied = self._descent.applied
        seconds = float(self.order.applied_seconds[applied - 1]) if applied else 0.0
        problem, x = self._descent.problem, self._descent.x
        loss, metrics = float(problem.loss(x)), problem.metrics(x)
        self._metrics.append((applied, metrics))
        for column, value in zip(self._loss.values(), (applied, seconds, loss), strict=True):
            column.append(value)
        check_divergence(self._config, self._loss["loss"][0], loss, applied)
        now = time.perf_counter()
        if self._progress is not None and now > self._shown + _PROGRESS_SECONDS:
            staleness = float(np.mean(self._staleness[:applied])) if applied else math.nan
            speed = applied / (now - self._started)
            updates = len(self._staleness)
            progress_now = Progress(
                update=applied,
                updates=updates,
                updates_per_second=speed,
                mean_staleness=staleness,
                loss=loss,
                metrics=metrics,
            )
            call_back(self._progress, progress_now)
            self._shown = now
        return loss

    def flush_full_part(self) -> None:
        """Flush if the next part of the trace is full."""
        if self._descent.applied - self._written >= _PART:
            self.flush()

    def end(self) -> None:
        """Write what is left and the parameters."""
        self.flush()
        Reached(self._descent.applied, self._descent.reached).save(self._writer.path)

    def flush(self) -> None:
        """Write the new rows of the trace and the new losses."""
        part = slice(self._written, self._descent.applied)
        self._writer.members(self.order.members(part))
        self._writer.discarded(self.order.discarded_in(part))
        if (positions := self.order.positions(part)) is not None:
            self._writer.positions(positions)
        for reset in self.order.resets_in(part):
            self._writer.event("state_reset", **reset)
        trace = self.order.trace(part)
        self._writer.trace({**trace, "gradient_norm": self._descent.norms[part]})
        self._writer.metrics(self._metrics)
        self._metrics.clear()
        self._writer.loss({name: column[self._evaluated :] for name, column in self._loss.items()})
        self._writer.count(self._config, part.stop)
        self._written, self._evaluated = part.stop, len(self._loss["loss"])


def _follow(
    descent: _Descent, record: _Record, config: RunConfig, applied_seconds: Array
) -> str | None:
    """Apply the updates and evaluate the losses that are due; return the goal reached, if any."""
    every, goal = config.run.eval_every, None
    last = config.run.updates
    if config.run.max_seconds is not None:
        last = int(np.searchsorted(applied_seconds, config.run.max_seconds))
        goal = None if last == config.run.updates else time_is_up(config, config.run.max_seconds)
    if reached := reached_target(config, record.evaluate(), 0):
        return reached
    for start, stop in descent.blocks():
        if start >= last:
            break
        stop = min(stop, last)
        gradients = descent.gradients(start, stop)
        due = [*range(start - start % every + every, stop, every), stop]
        for end in due:
            try:
                descent.apply(gradients[descent.applied - start : end - start])
            except RunFailedError:
                if descent.applied % every:
                    record.evaluate()  # raises DivergedError if the loss has diverged
                raise
            due_here = end % every == 0 or end == last
            if due_here and (reached := reached_target(config, record.evaluate(), end)):
                return reached
        record.flush_full_part()
    return goal
