"""The record of a run, applied again: the parameters after each update, from the trace alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from asgd.arrays import Array, Integers
from asgd.draws import WorkerDraws
from asgd.problems.base import Problem, starting_point
from asgd.rules import make_rule
from asgd.rundir.columns import SHARED
from asgd.rundir.reader import Run
from asgd.schedules import learning_rate_schedule


@dataclass(frozen=True, eq=False)
class Step:
    """Where a replay is.

    Attributes
    ----------
    update
        Updates applied.
    parameters
        After them, shape (d,).
    gradient_norm
        Euclidean norm of the gradient applied last; nan before the first.
    """

    update: int
    parameters: Array
    gradient_norm: float


@dataclass(frozen=True, eq=False)
class _Gradients:
    """All gradients in order, those of update k from row `starts[k]` to row `starts[k + 1]`."""

    starts: Integers
    worker: Integers
    sequence: Integers
    read_version: Integers
    batch_size: Integers

    @classmethod
    def of(cls, run: Run) -> _Gradients:
        """Take the means of a run apart."""
        names = ("worker", "sequence", "read_version", "batch_size")
        own = run.trace[run.trace["worker"] != SHARED]
        update = np.concatenate([own["update"], run.members["update"]])
        order = np.argsort(update, kind="stable")
        columns = (np.concatenate([own[name], run.members[name]])[order] for name in names)
        return cls(np.searchsorted(update[order], np.arange(len(run.trace) + 1)), *columns)


def replay(run: Run, problem: Problem) -> Iterator[Step]:
    """Yield x_0, x_1, ... of a run.

    Each worker's gradient is computed again, from the parameters it read and the samples it drew,
    and the update rule applied to it: what a real run does in many processes, in one. Parameters
    are kept as long as a later update has read them.
    """
    config, gradients = run.config, _Gradients.of(run)
    draws, rule = WorkerDraws(config, problem.n_samples), make_rule(config.optimizer)
    learning_rate = learning_rate_schedule(config.optimizer)
    x = starting_point(problem, config.run.seed)
    state = rule.init(x)
    last_read = np.arange(len(run.trace) + 1)
    updates = np.repeat(np.arange(len(run.trace)), np.diff(gradients.starts))
    np.maximum.at(last_read, gradients.read_version, updates)
    leaving = iter(np.argsort(last_read, kind="stable").tolist())
    leaves, kept = next(leaving), {0: x}
    yield Step(0, x, np.nan)
    for update in range(len(run.trace)):
        rows = range(gradients.starts[update], gradients.starts[update + 1])
        found = []
        for row in rows:
            size, worker = int(gradients.batch_size[row]), int(gradients.worker[row])
            batch = draws.batch(worker, int(gradients.sequence[row]), size)
            point = kept[int(gradients.read_version[row])]
            found.append(np.asarray(problem.gradient(point, batch), dtype=float))
        mean = found[0] if len(found) == 1 else np.sum(found, axis=0) / len(found)
        staleness = update - int(gradients.read_version[rows.start : rows.stop].min())
        rate = learning_rate(update)
        step, state = rule.update(mean, state, learning_rate=rate, staleness=staleness)
        x = x - step
        kept[update + 1] = x
        while last_read[leaves] <= update:
            del kept[leaves]
            leaves = next(leaving)
        yield Step(update + 1, x, float(np.sqrt(np.vdot(mean, mean))))
