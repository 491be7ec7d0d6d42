"""Watches the actors of a run until its last update is on disk."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from asgd.arrays import Array
from asgd.config.tables import RunConfig
from asgd.divergence import check_divergence
from asgd.errors import RunFailedError
from asgd.goals import time_is_up
from asgd.progress import Progress, call_back
from asgd.rundir.writer import RunWriter
from cluster.actors import Losses
from cluster.core.server import FINISHED
from cluster.core.status import Status
from cluster.fleet import Fleet
from cluster.local_ray.causes import cause_of
from cluster.local_ray.session import undisturbed
from cluster.local_ray.vitals import answer, check_ray, ray_death
from cluster.team import take_requests

_POLL_SECONDS = 0.25
_FLUSH_SECONDS = 60.0
_FLUSH_SECONDS_WITHOUT_RAY = 5.0  # actors answer for a while after Ray's own processes have died
_RATE_WINDOW_SECONDS = 2.0


def supervise(
    config: RunConfig,
    initial: Array,
    n_samples: int,
    writer: RunWriter,
    progress: Callable[[Progress], None] | None,
    resumed: bool,
) -> str | None:
    """Run the actors until the last update is on disk; kill all actors at the end or on failure.

    Returns the goal that ended the run before its last update, if one did.

    Parameters
    ----------
    config
        The run.
    initial
        x_0, shape (d,).
    n_samples
        Number of samples of the problem.
    writer
        Writer of the run directory.
    progress
        Called a few times per second.
    resumed
        Continue from the newest good checkpoint.

    Raises
    ------
    RunFailedError
        The run cannot continue.
    CallbackError
        `progress` raised.
    """
    fleet = Fleet(config, initial, n_samples, writer, resumed)
    try:
        while True:
            try:
                return _watch(fleet, progress)
            except RayError as error:  # of the server or recorder; the fleet handles its workers
                # A bug in our own code would recur on a new server.
                if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
                    raise
                fleet.replace_server(cause_of(error))
    except BaseException:
        patience = _FLUSH_SECONDS_WITHOUT_RAY if ray_death() else _FLUSH_SECONDS
        with undisturbed(), contextlib.suppress(RayError):
            # Wait for this call: an async actor may run two calls in either order.
            ray.get(fleet.server.stop.remote("ended early"), timeout=patience)
            fleet.recorder.hurry.remote()
            ray.get(fleet.server.flush.remote(), timeout=patience)
        raise
    finally:
        if ray_death() is None:
            with undisturbed():
                fleet.kill()


def _watch(fleet: Fleet, progress: Callable[[Progress], None] | None) -> str | None:
    """Return when the run is complete and on disk, with the goal that ended it early, if any.

    Raises
    ------
    RayError
        The server or its recorder is dead.
    RunFailedError
        The run cannot continue.
    """
    rate = _Rate()
    latest = fleet.recorder.latest.remote()
    losses = Losses()
    flushed = goal = None
    while True:
        ready = _ready([flushed] if flushed else [fleet.stopped, *fleet.running])
        if flushed is None:
            check_ray()  # without Ray, actors keep running for a minute
        if flushed is None and fleet.stopped in ready:
            flushed = fleet.server.flush.remote()
        finished = flushed is not None and flushed in ready
        if flushed is not None and finished:
            answer(flushed)
            latest = fleet.recorder.latest.remote()
        status: Status = answer(fleet.server.status.remote())
        fleet.reached = status.version
        # Do not wait for the recorder, which may be busy with a long evaluation.
        if finished or ray.wait([latest], timeout=0)[0]:
            losses = answer(latest)
            _check_losses(losses, fleet.config)
            latest = fleet.recorder.latest.remote()
        if flushed is None and goal is None and status.stopped is None:
            goal = _goal(fleet.config, losses, status)
            if goal is not None:
                fleet.server.finish.remote(goal)
        if progress is not None:
            progress_now = Progress(
                update=status.version,
                updates=fleet.config.run.updates,
                updates_per_second=rate(status.version, time.monotonic()),
                mean_staleness=status.mean_staleness,
                loss=losses.latest,
                workers=len(fleet.running),
                evaluating=status.waiting or (flushed is not None and not finished),
                metrics=losses.metrics,
                joining=_joining(status),
                skipped=status.skipped,
                homeless=len(fleet.homeless),
            )
            call_back(progress, progress_now)
        if finished:
            if status.stopped not in (FINISHED, goal):
                raise RunFailedError(str(status.stopped))
            return goal if status.stopped == goal else None
        if flushed is not None:
            continue
        fleet.replace_failed(ready, status)
        for request in take_requests(fleet.path):
            fleet.resize(request)


def _ready(tasks: list[ray.ObjectRef[Any]]) -> list[ray.ObjectRef[Any]]:
    """Wait a moment for a task to end; return the tasks that have ended."""
    ray.wait(tasks, num_returns=1, timeout=_POLL_SECONDS)
    return ray.wait(tasks, num_returns=len(tasks), timeout=0)[0]


def _joining(status: Status) -> int:
    """Return how many workers the first update waits for."""
    if status.seconds > 0.0 or status.stopped is not None:
        return 0
    return sum(not worker.present for worker in status.workers.values())


def _goal(config: RunConfig, losses: Losses, status: Status) -> str | None:
    """Return the goal of the run that is reached, if any."""
    return losses.goal or time_is_up(config, status.seconds)


def _check_losses(losses: Losses, config: RunConfig) -> None:
    if losses.error is not None:
        raise RunFailedError(losses.error.message)
    if losses.first is None or losses.latest is None or losses.update is None:
        return
    check_divergence(config, losses.first, losses.latest, losses.update)


class _Rate:
    """Updates per second over a sliding window that always contains an update."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []

    def __call__(self, version: int, now: float) -> float:
        self._points.append((now, version))
        while (
            len(self._points) > 2
            and self._points[1][0] < now - _RATE_WINDOW_SECONDS
            and self._points[1][1] < version
        ):
            self._points.pop(0)
        start, first = self._points[0]
        return (version - first) / (now - start) if now > start else math.nan
