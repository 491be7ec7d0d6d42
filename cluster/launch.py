"""From a configuration to a run directory: start, watch, always shut down."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from asgd.config import Configuration, RunConfig, as_config, load_config
from asgd.divergence import check_divergence
from asgd.errors import AsgdError, InputError, RunFailedError
from asgd.problems import make_problem
from asgd.problems.base import Problem
from asgd.progress import Progress
from asgd.rundir.alive import sign_of_life
from asgd.rundir.files import what_is_wrong
from asgd.rundir.problem_record import ProblemRecord, check_problem
from asgd.rundir.reader import read_run
from asgd.rundir.repeats import run_repeats, unfinished_repeats
from asgd.rundir.writer import RunWriter, default_path
from asgd.streams import stream
from cluster.actors import Losses, UserError
from cluster.core.messages import Array
from cluster.core.server import FINISHED
from cluster.core.status import Status
from cluster.fleet import Fleet
from cluster.local_ray.causes import cause_of
from cluster.local_ray.session import check_address, ray_session, undisturbed
from cluster.local_ray.vitals import answer, check_ray, ray_death, witnessed
from cluster.metrics import check_metrics
from cluster.storage.checkpoint import CHECKPOINTS
from cluster.storage.lease import only_launcher
from cluster.team import take_requests

_POLL_SECONDS = 0.25
_FLUSH_SECONDS = 60.0
_FLUSH_SECONDS_WITHOUT_RAY = 5.0  # its store of state dead, actors answer for a while
_RATE_WINDOW_SECONDS = 2.0


def run(
    config: Configuration,
    out: str | Path | None = None,
    address: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Run asynchronous SGD on Ray and return the run directory.

    Parameters
    ----------
    config
        The run.
    out
        The run directory, which must not hold anything yet; default
        `runs/<kind of problem>-<date>-<time>`. With `run.repeats` it holds one of each repeat,
        see `asgd.rundir.repeats`.
    address
        A running Ray cluster to join; default: a Ray of our own on this machine, gone afterwards.
    progress
        Called a few times a second.

    Raises
    ------
    InputError
        The configuration, the directory or the address cannot be used; nothing was started.
    RunFailedError
        The run ended early; its directory is readable.
    KeyboardInterrupt
        Ctrl-C; the directory is readable and says so.
    """
    config = as_config(config)
    check_metrics(config.metrics)
    problem = make_problem(config)
    start = ProblemRecord.of(problem, config.run.seed)
    initial = _initial(config, problem)
    check_address(address)
    if config.run.repeats > 1:
        with ray_session(address, _object_store_bytes(config, initial), config.metrics.page):
            return run_repeats(config, out, lambda one, path: run(one, path, address, progress))
    writer = RunWriter.create(out if out is not None else default_path(config), config)
    start.note(writer)
    with only_launcher(writer.path / CHECKPOINTS), sign_of_life(writer.path):
        return _launch(config, initial, writer, address, progress, resumed=False)


def resume(
    path: str | Path,
    address: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    *,
    force: bool = False,
) -> Path:
    """Go on with a run that was cut short, from its newest good checkpoint.

    Parameters
    ----------
    path
        The run directory; its configuration is used. Of an experiment with repeats, the repeats
        that are missing are made and those that were cut short gone on with.
    address, progress
        As for `run`.
    force
        Go on also where the problem has changed, see `asgd.rundir.problem_record`.

    Raises
    ------
    InputError
        There is no such run, it is finished, it is still at work, or its problem has changed.
    RunFailedError, KeyboardInterrupt
        As for `run`.
    """
    with unfinished_repeats(path, force=force) as left, contextlib.ExitStack() as shared:
        if len(left) > 1:
            page = load_config(Path(path) / "config.json").metrics.page
            shared.enter_context(ray_session(address, metrics_port=page))
        for directory, anew in left:
            if anew is None:
                _resume_one(directory, address, progress, force)
            else:
                run(anew, directory, address, progress)
    return Path(path)


def _resume_one(
    path: Path,
    address: str | None,
    progress: Callable[[Progress], None] | None,
    force: bool,
) -> Path:
    found = read_run(path)
    if not (found.path / CHECKPOINTS).is_dir():
        raise InputError(f"{path}: not a run of workers and a server; only these are resumed")
    if found.state == "finished":
        raise InputError(f"{path}: the run is finished")
    check_metrics(found.config.metrics)
    problem = make_problem(found.config)
    check_problem(found, problem, "resume", force=force)
    initial = _initial(found.config, problem)
    check_address(address)
    with only_launcher(found.path / CHECKPOINTS):
        for _ in take_requests(found.path):  # those that the process before left
            pass  # nobody asks yet
        with sign_of_life(found.path):
            writer = RunWriter(found.path)
            return _launch(found.config, initial, writer, address, progress, resumed=True)


def _initial(config: RunConfig, problem: Problem) -> Array:
    """Return x_0, shape (d,)."""
    return problem.initial_point(stream(config.run.seed, "initial"))


def _launch(
    config: RunConfig,
    initial: Array,
    writer: RunWriter,
    address: str | None,
    progress: Callable[[Progress], None] | None,
    *,
    resumed: bool,
) -> Path:
    end = _End(writer)
    session = ray_session(address, _object_store_bytes(config, initial), config.metrics.page)
    # What cannot start is noted, too, and what fails before Ray, which may not end in order, does.
    with witnessed(writer.path), end.noted(), session, end.noted():
        _supervise(config, initial, writer, progress, resumed)
        writer.event("finish")
    return writer.path


class _End:
    """Notes in the events how a run ends, once."""

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer
        self._noted = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what ends the block.

        Raises
        ------
        RunFailedError
            What the block raised means that the run failed.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit, BrokenPipeError):  # nobody reads our output any more
            self._note("interrupted")
            raise
        except Exception as error:
            failure = _failure(self._writer.path, error)
            self._note("failed", reason=str(failure))
            if failure is error:
                raise
            raise failure from error

    def _note(self, kind: str, **fields: str) -> None:
        if not self._noted:
            self._noted = True
            # Where the disk is full, that is the error to be shown, not this one.
            with contextlib.suppress(OSError):
                self._writer.event(kind, **fields)


def _failure(path: Path, error: Exception) -> RunFailedError:
    if isinstance(error, RunFailedError) and error.run is not None:
        return error
    if not path.is_dir():  # whatever came of it
        failure = RunFailedError(what_is_wrong(path, OSError()))
    elif isinstance(error, RunFailedError):
        failure = error
    else:
        failure = RunFailedError(_reason(path, error))
    failure.run = path
    return failure


def _reason(path: Path, error: Exception) -> str:
    """Return in one line why something ended a run that is not meant to."""
    if isinstance(error, RayError):
        return ray_death() or cause_of(error)
    if isinstance(error, OSError):
        return what_is_wrong(path, error)
    if isinstance(error, AsgdError):
        return str(error)
    return UserError.describe(error).message


def _object_store_bytes(config: RunConfig, initial: Array) -> int:
    """Room for every worker's snapshot and gradient, and for records on their way."""
    return 100_000_000 + 4 * (config.cluster.workers + 8) * initial.nbytes


def _supervise(
    config: RunConfig,
    initial: Array,
    writer: RunWriter,
    progress: Callable[[Progress], None] | None,
    resumed: bool,
) -> None:
    fleet = Fleet(config, initial, writer, resumed)
    try:
        while True:
            try:
                _watch(fleet, progress)
                break
            # Those of workers are met where their work is looked at.
            except RayError as error:
                # A mistake in what we call another server would make, too.
                if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
                    raise
                fleet.replace_server(cause_of(error))
    except BaseException:
        patience = _FLUSH_SECONDS_WITHOUT_RAY if ray_death() else _FLUSH_SECONDS
        with undisturbed(), contextlib.suppress(RayError):
            # An asynchronous actor takes calls in any order.
            ray.get(fleet.server.stop.remote("ended early"), timeout=patience)
            ray.get(fleet.server.flush.remote(), timeout=patience)
        raise
    finally:
        if ray_death() is None:
            with undisturbed():
                fleet.kill()


def _watch(fleet: Fleet, progress: Callable[[Progress], None] | None) -> None:
    """Return when the run is complete and on disk.

    Raises
    ------
    RayError
        The server or its recorder is dead.
    RunFailedError
        The run cannot go on.
    """
    rate = _Rate()
    latest = fleet.recorder.latest.remote()
    losses = Losses()
    flushed = None
    while True:
        ready = _ready([flushed] if flushed else [fleet.stopped, *fleet.running])
        if flushed is None:
            check_ray()  # actors may go on for a minute, until Ray ends this process
        if flushed is None and fleet.stopped in ready:
            flushed = fleet.server.flush.remote()
        finished = flushed is not None and flushed in ready
        if flushed is not None and finished:
            answer(flushed)
            latest = fleet.recorder.latest.remote()
        status: Status = answer(fleet.server.status.remote())
        fleet.reached = status.version
        # A recorder busy with a long evaluation must not keep the watch waiting.
        if finished or ray.wait([latest], timeout=0)[0]:
            losses = answer(latest)
            _check_losses(losses, fleet.config)
            latest = fleet.recorder.latest.remote()
        if progress is not None:
            speed = rate(status.version, time.monotonic())
            updates, alive = fleet.config.run.updates, len(fleet.running)
            mean, last = status.mean_staleness, losses.latest
            waiting = status.waiting or (flushed is not None and not finished)
            progress(Progress(status.version, updates, speed, mean, last, alive, waiting))
        if finished:
            if status.stopped != FINISHED:
                raise RunFailedError(str(status.stopped))
            return
        if flushed is not None:
            continue
        fleet.replace_failed(ready, status)
        for request in take_requests(fleet.path):
            fleet.resize(request)


def _ready(tasks: list[ray.ObjectRef[Any]]) -> list[ray.ObjectRef[Any]]:
    """Wait a moment for a task to end, and return those that have."""
    ray.wait(tasks, num_returns=1, timeout=_POLL_SECONDS)
    return ray.wait(tasks, num_returns=len(tasks), timeout=0)[0]


def _check_losses(losses: Losses, config: RunConfig) -> None:
    if losses.error is not None:
        raise RunFailedError(losses.error.message)
    if losses.first is None or losses.latest is None or losses.update is None:
        return
    check_divergence(config, losses.first, losses.latest, losses.update)


class _Rate:
    """Updates per second over a sliding window, which is as long as it takes to see one."""

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
