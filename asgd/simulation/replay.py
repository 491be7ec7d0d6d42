"""Replays a run: computes the parameters after each update from the trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from asgd.arrays import Array, Integers, euclidean_norm
from asgd.draws import WorkerDraws
from asgd.errors import InputError
from asgd.local_steps import Pushes
from asgd.problems.base import Problem, starting_point
from asgd.rules.base import Optimizer
from asgd.rules.make import make_rule
from asgd.rundir.columns import POSITIONS, of_gradients
from asgd.rundir.reader import Run
from asgd.schedules import learning_rate_schedule


@dataclass(frozen=True, eq=False)
class Step:
    """The state of a replay after an update.

    Attributes
    ----------
    update
        Updates applied.
    parameters
        Shape (d,).
    gradient_norm
        Euclidean norm of the last applied gradient; nan before the first.
    """

    update: int
    parameters: Array
    gradient_norm: float


@dataclass(frozen=True, eq=False)
class Gradients:
    """All gradients of a run in order; update k has the rows from `starts[k]` to `starts[k + 1]`.

    Attributes
    ----------
    starts
        Shape (updates + 1,); the others have shape (gradients,).
    worker, sequence, read_version, batch_size
        As in the trace.
    position
        As in the positions; 0 for batches that are drawn with replacement.
    """

    starts: Integers
    worker: Integers
    sequence: Integers
    read_version: Integers
    batch_size: Integers
    position: Integers

    @classmethod
    def of(cls, run: Run) -> Gradients:
        """Collect the gradients of a run; an update by a mean is split into its members.

        Raises
        ------
        InputError
            The positions in epochs do not belong to the recorded gradients.
        """
        names = ("update", "worker", "sequence", "read_version", "batch_size")
        update, *columns = of_gradients(run.trace, run.members, names).values()
        starts = np.searchsorted(update, np.arange(len(run.trace) + 1))
        position = np.zeros(len(update), np.int64)
        if run.config.data.sampling == "epoch":
            placed = run.positions
            expected = np.stack([update, columns[0]])
            if not np.array_equal(placed[["update", "worker"]].to_numpy().T, expected):
                raise InputError(
                    f"{run.path / POSITIONS}: do not belong to the gradients in the trace"
                )
            position = placed["position"].to_numpy()
        worker, sequence, read_version, batch_size = columns
        return cls(starts, worker, sequence, read_version, batch_size, position)


def replay(run: Run, problem: Problem) -> Iterator[Step]:
    """Yield x_0, x_1, ... of a run.

    Each push (a gradient, or the difference by local steps) is recomputed in this process, from the
    parameters that its worker read and the samples that it drew. Then the update rule is applied.
    Old parameters are kept until the last update that read them.
    """
    config, gradients = run.config, Gradients.of(run)
    pushes = Pushes(config, problem, WorkerDraws(config, problem))
    learning_rate = learning_rate_schedule(config.optimizer)
    x = starting_point(problem, config.run.seed)
    optimizer = Optimizer(make_rule(config), x)
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
            position = int(gradients.position[row])
            point = kept[int(gradients.read_version[row])]
            number = int(gradients.sequence[row])
            gradient = pushes.push(worker, number, point, size, position)
            # The problem may use its memory again.
            found.append(gradient if len(rows) == 1 else np.array(gradient))
        mean = found[0] if len(found) == 1 else np.sum(found, axis=0) / len(found)
        staleness = update - int(gradients.read_version[rows.start : rows.stop].min())
        x = x.copy()
        optimizer.apply(x, mean, learning_rate(update), update, staleness, point)
        kept[update + 1] = x
        while last_read[leaves] <= update:
            del kept[leaves]
            leaves = next(leaving)
        yield Step(update + 1, x, euclidean_norm(mean))
