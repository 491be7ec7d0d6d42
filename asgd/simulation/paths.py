"""Ensembles of parameter servers, vectorised over paths; the reference for predictions.

Every path is an independent server with its own arrivals and mini-batches. One update of all paths
takes a few array operations.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array
from asgd.delays import ComputeTime
from asgd.errors import InputError
from asgd.problems.base import Problem

PerUpdate = npt.ArrayLike


class ServerPaths:
    """An ensemble of parameter servers; each step applies one update on every path.

    Parameters
    ----------
    problem
        The problem to minimise.
    learning_rate, batch_size
        Values per update, shape (updates,).
    compute_time
        Compute-time law, one mean per worker.
    x
        Initial points, shape (paths, d); updated in place.
    rng
        Draws compute times, turns and mini-batches.
    schedule, gradient_time, message_time, service_time
        As in `asgd.simulation.order.simulate_staleness`.

    Attributes
    ----------
    staleness
        Of the last update of each path, shape (paths,).
    """

    def __init__(
        self,
        problem: Problem,
        learning_rate: npt.NDArray[np.float64],
        batch_size: npt.NDArray[np.int64],
        compute_time: ComputeTime,
        x: Array,
        rng: np.random.Generator,
        *,
        schedule: str = "free",
        gradient_time: float = 0.0,
        message_time: float = 0.0,
        service_time: float = 0.0,
    ) -> None:
        if schedule not in ("free", "uniform"):
            raise InputError(f"schedule = {schedule!r}: expected free or uniform")
        self._problem, self._rng, self._compute_time = problem, rng, compute_time
        self._learning_rate, self._batch_size = learning_rate, batch_size
        self._uniform = schedule == "uniform"
        self._overhead = gradient_time + 2 * message_time
        self._service = service_time
        self._x = x
        paths, workers = len(x), len(compute_time.mean)
        self._path = np.arange(paths)
        self._held = np.repeat(x[:, None], workers, axis=1)
        self._read = np.zeros((paths, workers), dtype=np.int64)
        self._now = np.zeros(paths)
        relative = compute_time.draw_relative(paths * workers, rng).reshape(paths, workers)
        self._arrival = self._overhead + compute_time.mean * relative
        self.staleness = np.zeros(paths, dtype=np.int64)

    def step(self, k: int) -> None:
        """Advance every path from update k to update k + 1, in place."""
        path, problem = self._path, self._problem
        worker = self._next_worker()
        size = (len(path), int(self._batch_size[k]))
        batches = self._rng.integers(problem.n_samples, size=size)
        self._x -= self._learning_rate[k] * problem.gradient(self._held[path, worker], batches)
        self._held[path, worker] = self._x
        self.staleness[:] = k - self._read[path, worker]
        self._read[path, worker] = k + 1

    def position(self) -> Array:
        """Return x, shape (paths, d); valid until the next step."""
        return self._x

    def _next_worker(self) -> npt.NDArray[np.int64]:
        paths, workers = self._arrival.shape
        if self._uniform:  # arrival times do not matter
            return self._rng.integers(workers, size=(paths,))
        worker: npt.NDArray[np.int64] = self._arrival.argmin(axis=1)
        arrival = self._arrival[self._path, worker]
        self._now = np.maximum(self._now, arrival) + self._service
        compute = self._compute_time.mean[worker]
        compute *= self._compute_time.draw_relative(paths, self._rng)
        compute += self._overhead
        compute += self._now
        self._arrival[self._path, worker] = compute
        return worker


def server_ensemble(
    problem: Problem,
    compute_time: ComputeTime,
    *,
    learning_rate: PerUpdate,
    updates: int,
    paths: int,
    rng: np.random.Generator,
    batch_size: PerUpdate = 1,
    initial: npt.ArrayLike | None = None,
    record: npt.ArrayLike | None = None,
    schedule: str = "free",
    gradient_time: float = 0.0,
    message_time: float = 0.0,
    service_time: float = 0.0,
) -> Iterator[tuple[int, Array]]:
    """Yield (k, x) for each recorded k: x of shape (paths, d) after k updates on every path.

    The array x is reused; copy it to keep it.

    Parameters
    ----------
    problem, compute_time, rng, schedule, gradient_time, message_time, service_time
        As in `ServerPaths`.
    learning_rate, batch_size
        A number, or one per update.
    initial
        x_0, shape (d,); default: `problem.initial_point(rng)`.
    record
        Updates to yield, from 0 to `updates`; default: all.
    """
    start = problem.initial_point(rng) if initial is None else np.asarray(initial, dtype=float)
    servers = ServerPaths(
        problem,
        np.broadcast_to(np.asarray(learning_rate, dtype=float), (updates,)),
        np.broadcast_to(np.asarray(batch_size, dtype=np.int64), (updates,)),
        compute_time,
        np.tile(start, (paths, 1)),
        rng,
        schedule=schedule,
        gradient_time=gradient_time,
        message_time=message_time,
        service_time=service_time,
    )
    wanted = set(range(updates + 1) if record is None else np.asarray(record).tolist())
    for k in range(updates + 1):
        if k in wanted:
            yield k, servers.position()
        if k < updates:
            servers.step(k)
