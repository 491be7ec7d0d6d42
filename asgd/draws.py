"""The random draws of workers: sample numbers and compute times.

A draw depends only on the seed, the worker, the sequence number of its gradient and the batch size.
So a restarted worker, a resumed run, a simulation and a replay draw the same numbers. If
`data.shards` divides the samples, a worker draws from its own part. With `data.sampling = "epoch"`
its batch depends on the positions that the server has handed out instead, see `asgd.epochs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import chain, count

import numpy as np
import numpy.typing as npt

from asgd.config.tables import RunConfig
from asgd.delays import ComputeTime
from asgd.epochs import EpochOrders
from asgd.shards import Samples, Shards
from asgd.streams import KeyedStream

_ROWS = 64  # gradients drawn together
_ENTRIES = 1024  # sample numbers drawn together, unless one batch is larger


class WorkerDraws:
    """The draws of all workers of a run.

    Seeking a keyed stream costs more than most draws, so the draws of up to 64 gradients of a
    worker are made at one address and cached.

    Parameters
    ----------
    config
        The run.
    problem
        Its problem.

    Raises
    ------
    InputError
        The samples cannot be divided as `config.data` says.
    """

    def __init__(self, config: RunConfig, problem: Samples) -> None:
        self._shards = shards = Shards.of(config, problem)
        self._orders = None
        if config.data.sampling == "epoch":
            self._orders = EpochOrders(config.run.seed, shards.parts or (shards.samples(0),))
        self._compute_time = ComputeTime.from_config(config.cluster)
        self._gradients = config.optimizer.gradients_per_push
        self._batch_stream = KeyedStream(config.run.seed, "batch")
        self._time_stream = KeyedStream(config.run.seed, "compute")
        self._batches: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}
        self._times: dict[int, tuple[int, list[float]]] = {}
        self._table = _BatchTable(config.cluster.workers, 1)

    def batch(
        self, worker: int, sequence: int, size: int, position: int = 0
    ) -> npt.NDArray[np.int64]:
        """Return the sample numbers of a gradient, shape (size,).

        They are drawn with replacement, or are the next ones from `position` in the epochs on.
        `sequence` counts gradients, not pushes, see `asgd.local_steps`.
        """
        if self._orders is not None:
            return self._orders.batch(worker, position, size)
        number, row = divmod(sequence, _rows(size))
        kept, batches = self._batches.get(worker, (-1, None))
        if batches is None or kept != number or batches.shape[1] != size:
            batches = self._draw_batches(worker, number, size)
            self._batches[worker] = number, batches
        chosen: npt.NDArray[np.int64] = batches[row]
        return chosen

    def batches(
        self, worker: npt.NDArray[np.int64], sequence: npt.NDArray[np.int64], size: int
    ) -> npt.NDArray[np.int64]:
        """Return `batch` for one gradient of each of these workers, shape (gradients, size).

        No worker may occur twice, and the batches must be drawn with replacement.
        """
        number, row = np.divmod(sequence, _rows(size))
        if self._table.batches.shape[2] != size:
            self._table = _BatchTable(len(self._table.number), size)
        table = self._table
        for place in np.flatnonzero(table.number[worker] != number).tolist():
            who, what = int(worker[place]), int(number[place])
            table.batches[who] = self._draw_batches(who, what, size)
            table.number[who] = what
        return table.batches[worker, row]

    def compute_seconds(self, worker: int, sequence: int) -> float:
        """Return the time added to the computation of a push, in seconds."""
        number, row = divmod(sequence, _ROWS)
        kept, times = self._times.get(worker, (-1, []))
        if kept != number:
            times = self._draw_times(worker, number)
            self._times[worker] = number, times
        return times[row]

    def compute_seconds_of(self, worker: int, first: int, blocks: int) -> npt.NDArray[np.float64]:
        """Return `compute_seconds` of the pushes in `blocks` blocks of 64 from block `first`."""
        return np.concatenate([self._times_of(worker, first + i) for i in range(blocks)])

    def all_compute_seconds(self, worker: int) -> Iterator[float]:
        """Yield `compute_seconds` of pushes 0, 1, 2, ... of a worker, faster than one by one."""
        return chain.from_iterable(self._draw_times(worker, number) for number in count())

    def _draw_batches(self, worker: int, number: int, size: int) -> npt.NDArray[np.int64]:
        generator = self._batch_stream.at(worker, number, size)
        return self._shards.choose(worker, (_rows(size), size), generator)

    def _draw_times(self, worker: int, number: int) -> list[float]:
        times: list[float] = self._times_of(worker, number).tolist()
        return times

    def _times_of(self, worker: int, number: int) -> npt.NDArray[np.float64]:
        """Return the times of a block of 64 pushes, each the sum over its gradients."""
        blocks = range(number * self._gradients, (number + 1) * self._gradients)
        drawn = [
            self._compute_time.draw_many(worker, _ROWS, self._time_stream.at(worker, block))
            for block in blocks
        ]
        of_gradients = np.concatenate(drawn).reshape(_ROWS, self._gradients)
        sums: npt.NDArray[np.float64] = of_gradients.sum(axis=1)
        return sums


class _BatchTable:
    """Cache of the latest batches of every worker, shape (workers, rows, size)."""

    def __init__(self, workers: int, size: int) -> None:
        self.batches = np.empty((workers, _rows(size), size), dtype=np.int64)
        self.number = np.full(workers, -1)


@cache
def _rows(size: int) -> int:
    return max(1, min(_ROWS, _ENTRIES // size))
