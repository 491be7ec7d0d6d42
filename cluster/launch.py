"""From a configuration to a run directory: start, watch, always shut down."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from asgd.alive import sign_of_life
from asgd.config import RunConfig
from asgd.delays import ComputeTime
from asgd.divergence import check_divergence
from asgd.errors import InputError, RunFailedError
from asgd.experiment import run_repeats
from asgd.problems import make_problem
from asgd.progress import Progress
from asgd.streams import stream
from asgd.trace import RunWriter, default_path, read_run
from cluster.actors import Actor, Losses, RecorderActor, ServerActor, UserError, WorkerActor
from cluster.checkpoint import CHECKPOINTS
from cluster.lease import Lease, only_launcher
from cluster.messages import Array
from cluster.metrics import check_metrics
from cluster.recovery import restore
from cluster.restarts import Restarts
from cluster.server import FINISHED
from cluster.session import check_address, ray_session, undisturbed
from cluster.status import Status

_POLL_SECONDS = 0.25
_FLUSH_SECONDS = 60.0
_DRAIN_SECONDS = 10.0
_SERVER_DEATHS = 5  # in a row without a checkpoint in between
_RATE_WINDOW_SECONDS = 2.0
_LONG_COMPUTE_TIME = 20.0  # means: an exponential time is longer once in 5e8 gradients


def run(
    config: RunConfig,
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
        see `asgd.experiment`.
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
    check_metrics(config.metrics)
    initial = _initial(config)
    check_address(address)
    if config.run.repeats > 1:
        with ray_session(address, _object_store_bytes(config, initial)):
            return run_repeats(config, out, lambda one, path: run(one, path, address, progress))
    writer = RunWriter.create(out if out is not None else default_path(config), config)
    with only_launcher(writer.path / CHECKPOINTS), sign_of_life(writer.path):
        return _launch(config, initial, writer, address, progress, resumed=False)


def resume(
    path: str | Path,
    address: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Go on with a run that was cut short, from its newest good checkpoint.

    Parameters
    ----------
    path
        The run directory; its configuration is used.
    address, progress
        As for `run`.

    Raises
    ------
    InputError
        There is no such run, it is finished, or it is still at work.
    RunFailedError, KeyboardInterrupt
        As for `run`.
    """
    found = read_run(path)
    if not (found.path / CHECKPOINTS).is_dir():
        raise InputError(f"{path}: not a run of workers and a server; only these are resumed")
    if found.state == "finished":
        raise InputError(f"{path}: the run is finished")
    check_metrics(found.config.metrics)
    initial = _initial(found.config)
    check_address(address)
    with only_launcher(found.path / CHECKPOINTS), sign_of_life(found.path):
        writer = RunWriter(found.path)
        return _launch(found.config, initial, writer, address, progress, resumed=True)


def _initial(config: RunConfig) -> Array:
    """Return x_0, shape (d,)."""
    return make_problem(config).initial_point(stream(config.run.seed, "initial"))


def _launch(
    config: RunConfig,
    initial: Array,
    writer: RunWriter,
    address: str | None,
    progress: Callable[[Progress], None] | None,
    *,
    resumed: bool,
) -> Path:
    try:
        with ray_session(address, _object_store_bytes(config, initial), config.metrics.port):
            if config.metrics.prometheus:
                writer.event("metrics", url=_metrics_page())
            _supervise(config, initial, writer, progress, resumed)
    except RunFailedError as error:
        _note_end(writer, "failed", reason=str(error))
        raise
    except RayError as error:
        reason = " ".join(str(error).split())
        _note_end(writer, "failed", reason=reason)
        raise RunFailedError(reason) from error
    except (KeyboardInterrupt, SystemExit):
        _note_end(writer, "interrupted")
        raise
    writer.event("finish")
    return writer.path


def _note_end(writer: RunWriter, kind: str, **fields: str) -> None:
    # Where the disk is full, that is the error to be shown, not this one.
    with contextlib.suppress(OSError):
        writer.event(kind, **fields)


def _metrics_page() -> str:
    """Return where Prometheus finds the metrics of this node."""
    here = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    node = next(node for node in nodes if node["NodeID"] == here)
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def _object_store_bytes(config: RunConfig, initial: Array) -> int:
    """Room for every worker's snapshot and gradient, and for records on their way."""
    return 100_000_000 + 4 * (config.cluster.workers + 8) * initial.nbytes


def _start(kind: type, *arguments: Any, **options: Any) -> Actor:
    """Start an actor. It reserves no core, so any number of workers fits on any machine."""
    return ray.remote(kind).options(num_cpus=0, **options).remote(*arguments)


class _Cluster:
    """The actors of one run: started, watched, started again."""

    def __init__(self, config: RunConfig, initial: Array, writer: RunWriter, resumed: bool) -> None:
        self.config = config
        self.reached = 0
        self._initial = initial
        self._writer = writer
        self._lease = Lease(writer.path / CHECKPOINTS)
        self._deaths = 0
        self._restored = -1
        self._start_server("resumed" if resumed else None)
        self.restarts = Restarts()
        self._workers: dict[int, Actor] = {}
        self._started: dict[int, float] = {}
        self.running: dict[ray.ObjectRef[Any], int] = {}
        self._ended: list[int] = []  # told to stop
        longest = float(ComputeTime.from_config(config.cluster).mean.max())
        self._timeout = config.cluster.worker_timeout + _LONG_COMPUTE_TIME * longest
        for worker in range(config.cluster.workers):
            self.start_worker(worker)

    def _start_server(self, reason: str | None) -> None:
        """Start a server and its recorder; with a reason, from where an earlier one was."""
        epoch = self._lease.take()
        state = None
        if reason is not None:
            state = restore(self._writer, epoch, reason, self.reached)
            version = self.reached = state.version if state is not None else 0
            self._deaths = self._deaths + 1 if version == self._restored else 1
            self._restored = version
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        umask = os.umask(0o077)
        os.umask(umask)
        path = str(self._writer.path.resolve())
        options: dict[str, Any] = {"scheduling_strategy": here}
        if self.config.metrics.prometheus:
            # Ray hands metrics to its page every 10 s by default, which short runs do not live.
            variables = {"RAY_metrics_report_interval_ms": "1000"}
            options["runtime_env"] = {"env_vars": variables}
        self.recorder = _start(RecorderActor, self.config, path, epoch, umask, **options)
        self.server = _start(
            ServerActor,
            self.config,
            self._initial,
            self.recorder,
            epoch,
            state,
            scheduling_strategy=here,
            max_concurrency=self.config.cluster.workers + 16,
        )
        self.stopped = self.server.stopped.remote()

    def replace_server(self) -> None:
        """Start a new server where the one that died, or its recorder, had been.

        Raises
        ------
        RunFailedError
            That has happened too often, or what is recorded cannot be used.
        """
        with contextlib.suppress(RayError):  # let the recorder write what it has got
            ray.get(self.recorder.latest.remote(), timeout=_DRAIN_SECONDS)
        ray.kill(self.server)
        ray.kill(self.recorder)
        if self._deaths >= _SERVER_DEATHS:
            raise RunFailedError(
                f"the parameter server died {self._deaths + 1} times without coming further than "
                f"the checkpoint of update {self._restored}"
            )
        self._start_server("the process of the server or of its recorder died")
        # A worker loses its connection, then goes on with this call.
        workers = [*self.running.values(), *self._ended]
        self.running.clear()
        self._ended.clear()
        for worker in workers:
            self._let_work(worker)
        for worker in set(range(self.config.cluster.workers)).difference(workers):
            self.server.leave.remote(worker)

    def start_worker(self, worker: int) -> None:
        """Start the process of a worker and its work."""
        self._workers[worker] = _start(WorkerActor, scheduling_strategy="SPREAD")
        self._let_work(worker)

    def _let_work(self, worker: int) -> None:
        self._started[worker] = time.monotonic()
        task = self._workers[worker].run.remote(self.config, worker, self.server)
        self.running[task] = worker

    def replace_failed(self, ready: list[ray.ObjectRef[Any]], status: Status) -> None:
        """Take workers that ended or hang for lost, start those whose delay is over.

        Raises
        ------
        RunFailedError
            No worker is left to go on.
        """
        now = time.monotonic()
        for task in ready:
            if task in self.running:
                reason = _failure(task)
                if reason is not None:
                    self._lose(task, reason, status, now)
                else:
                    self._ended.append(self.running.pop(task))
        for task, worker in list(self.running.items()):
            known = status.workers[worker]
            silent = known.computing if known.present else now - self._started[worker]
            if silent > self._timeout:
                self._lose(task, f"silent for {silent:.0f} s", status, now)
        for worker in self.restarts.due(now):
            self.start_worker(worker)
        # Workers that were told to stop end before the driver hears of the stop itself.
        if not (self.running or self._ended or self.restarts.pending):
            raise RunFailedError(
                f"every worker failed again and again; {self.restarts.first_reason}"
            )

    def _lose(self, task: ray.ObjectRef[Any], reason: str, status: Status, now: float) -> None:
        worker = self.running.pop(task)
        ray.kill(self._workers.pop(worker))
        delay = self.restarts.failed(worker, reason, status.workers[worker].received, now)
        self._writer.event(
            "worker_lost",
            worker=worker,
            update=status.version,
            reason=reason,
            restart_seconds=delay,
        )
        ray.get(self.server.leave.remote(worker))

    def kill(self) -> None:
        """End every actor of the run at once."""
        for actor in (*self._workers.values(), self.server, self.recorder):
            ray.kill(actor)


def _failure(task: ray.ObjectRef[Any]) -> str | None:
    """Return why the work of a worker ended, None if it was told to stop."""
    try:
        error: UserError | None = ray.get(task)
    except RayActorError:
        return "its process died"
    except RayTaskError as wrapped:
        return " ".join(str(wrapped.cause).split())
    return None if error is None else error.message


def _supervise(
    config: RunConfig,
    initial: Array,
    writer: RunWriter,
    progress: Callable[[Progress], None] | None,
    resumed: bool,
) -> None:
    cluster = _Cluster(config, initial, writer, resumed)
    try:
        while True:
            try:
                _watch(cluster, progress)
                break
            except RayActorError:  # those of workers are met where their work is looked at
                cluster.replace_server()
    except BaseException:
        with undisturbed(), contextlib.suppress(RayError):
            # An asynchronous actor takes calls in any order.
            ray.get(cluster.server.stop.remote("ended early"), timeout=_FLUSH_SECONDS)
            ray.get(cluster.server.flush.remote(), timeout=_FLUSH_SECONDS)
        raise
    finally:
        with undisturbed():
            cluster.kill()


def _watch(cluster: _Cluster, progress: Callable[[Progress], None] | None) -> None:
    """Return when the run is complete and on disk.

    Raises
    ------
    RayActorError
        The server or its recorder is dead.
    """
    rate = _Rate()
    latest = cluster.recorder.latest.remote()
    losses = Losses()
    while True:
        tasks = [cluster.stopped, *cluster.running]
        ray.wait(tasks, num_returns=1, timeout=_POLL_SECONDS)
        ready, _ = ray.wait(tasks, num_returns=len(tasks), timeout=0)
        finished = cluster.stopped in ready
        if finished:
            ray.get(cluster.server.flush.remote())
            latest = cluster.recorder.latest.remote()
        status: Status = ray.get(cluster.server.status.remote())
        cluster.reached = status.version
        # A recorder busy with a long evaluation must not keep the watch waiting.
        if ray.wait([latest], timeout=None if finished else 0)[0]:
            losses = ray.get(latest)
            _check_losses(losses, cluster.config)
            latest = cluster.recorder.latest.remote()
        if progress is not None:
            speed = rate(status.version, time.monotonic())
            updates, alive = cluster.config.run.updates, len(cluster.running)
            mean = status.mean_staleness
            progress(Progress(status.version, updates, speed, mean, losses.latest, alive))
        if finished:
            if status.stopped != FINISHED:
                raise RunFailedError(str(status.stopped))
            return
        cluster.replace_failed(ready, status)


def _check_losses(losses: Losses, config: RunConfig) -> None:
    if losses.error is not None:
        raise RunFailedError(losses.error.message)
    if losses.first is None or losses.latest is None or losses.update is None:
        return
    check_divergence(config, losses.first, losses.latest, losses.update)


class _Rate:
    """Updates per second over a sliding window."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []

    def __call__(self, version: int, now: float) -> float:
        self._points.append((now, version))
        while len(self._points) > 2 and self._points[1][0] < now - _RATE_WINDOW_SECONDS:
            self._points.pop(0)
        start, first = self._points[0]
        return (version - first) / (now - start) if now > start else math.nan
