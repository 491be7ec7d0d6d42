"""The Ray actors: thin wrappers that run a plain object in its own process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray

from asgd.arrays import Array
from asgd.config.tables import RunConfig
from asgd.errors import AsgdError, message_of
from asgd.problems.base import Problem
from asgd.problems.make import make_problem
from asgd.rundir.checkpoint import CHECKPOINTS
from asgd.rundir.files import describe_os_error
from asgd.rundir.repair import recorded_updates
from asgd.rundir.writer import RunWriter
from cluster.core.backlog import Backlog
from cluster.core.ledger import Record, Work
from cluster.core.messages import Gradient
from cluster.core.server import Replies
from cluster.core.status import Status
from cluster.core.worker import Worker
from cluster.metrics import Metrics
from cluster.nodes import metrics_page, take_devices
from cluster.sockets.connection import Endpoint
from cluster.sockets.server import SocketServer
from cluster.sockets.wire import VectorFormat
from cluster.storage.lease import Lease
from cluster.storage.recorder import EvaluationError, Recorder
from cluster.storage.recovery import Restored, start_server
from cluster.transport import EncodedReply, Waiting, connect, decode

T = TypeVar("T")
Actor = Any  # a Ray handle; Ray's own type does not know that its methods have `.remote`

WORK = "work"  # the concurrency group of the recorder's slow work
ASIDE = "aside"  # the concurrency group of calls that do not wait for a busy actor

_SECONDS_PER_RECORD = 1.0
_SECONDS_PER_CHECKPOINT = 0.25  # shortest interval; the newest of several checkpoints is saved
_SECONDS_WITH_SOCKETS = 0.01  # longest time on sockets while actor calls wait
_SECONDS_WITHOUT_SWEEP = 1.0


@dataclass(frozen=True)
class Losses:
    """The losses that the launcher judges a run by.

    Attributes
    ----------
    first
        The loss at x_0.
    latest, update
        The latest loss, and its update.
    metrics
        The latest metrics of the problem.
    goal
        Message that `run.target_loss` was reached, None before.
    error
        The first error in evaluating a loss.
    """

    first: float | None = None
    latest: float | None = None
    update: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    goal: str | None = None
    error: UserError | None = None


@dataclass(frozen=True)
class UserError:
    """Why the work of an actor ended, in one line.

    Attributes
    ----------
    message
        Type, text and location of the exception.
    in_code
        Whether the problem's code raised it.
    """

    message: str
    in_code: bool = False

    @classmethod
    def describe(cls, error: BaseException) -> UserError:
        """Describe an exception in one line, with its innermost location in the user's code."""
        frames = traceback.extract_tb(error.__traceback__)
        root = str(Path(__file__).parents[1])
        inner = tuple(f"{root}/{name}/" for name in ("asgd", "cluster"))
        users = [
            frame
            for frame in frames
            if not frame.filename.startswith(inner) and "site-packages" not in frame.filename
        ]
        place = (users or frames)[-1]
        text = message_of(error)
        where = f"{place.filename}:{place.lineno}, in {place.name}"
        return cls(f"{type(error).__name__}: {text} ({where})", in_code=True)


class ServerActor:
    """The parameter server in its process.

    One event loop runs everything: actor calls one at a time and, between them, the sockets of the
    data plane. So the parameter server needs no lock.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        parameters: Array,
        recorder: Actor,
        path: str,
        epoch: int = 0,
        restored: Restored | None = None,
        members: Iterable[int] = (),
        n_samples: int = 0,
    ) -> None:
        self._server = start_server(config, parameters, Path(path), epoch, restored, n_samples)
        for worker in members:
            self._server.admit(worker)
        self._recorder = recorder
        precision = self._server.parameters.dtype
        self._vectors = VectorFormat.of(len(parameters), precision, config.cluster)
        self._waiting = Waiting(self._vectors)
        self._sockets: SocketServer | None = None
        self._serving: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()
        self._backlog = Backlog(config.run.evaluations == "skip")
        self._work = Work()  # of written records, not yet begun
        self._working = asyncio.Lock()
        self._limit_evaluations()
        self._written: set[asyncio.Task[None]] = set()
        self._last_record = time.monotonic()

    async def endpoint(self) -> tuple[Endpoint, str]:
        """Return the endpoint of the data plane, opened by the first call, and this node's id."""
        if self._sockets is None:
            host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            self._sockets = SocketServer(self._server, self._vectors, host)
            self._serving = asyncio.create_task(self._serve(self._sockets))
        return self._sockets.endpoint, ray.get_runtime_context().get_node_id()

    async def join(self, worker: int) -> EncodedReply:
        """Return the worker's first snapshot."""
        answer = self._waiting.expect(worker)
        self._server.note_joined(worker, "ray")
        self._send(self._server.join(worker, time.monotonic()))
        return await answer

    async def push(
        self,
        worker: int,
        sequence: int,
        read_version: int,
        epoch: int,
        data: bytes,
        shape: tuple[int, ...],
        compute_seconds: float,
    ) -> EncodedReply:
        """Take a gradient; return the worker's next snapshot."""
        answer = self._waiting.expect(worker)
        value = decode(data, self._vectors).reshape(shape)
        gradient = Gradient(worker, sequence, read_version, epoch, value, compute_seconds)
        self._send(self._server.receive(gradient, time.monotonic()))
        self._hand_over_if_ready()
        return await answer

    async def admit(self, worker: int) -> None:
        """Allow an added worker to join."""
        self._server.admit(worker)

    async def leave(self, worker: int) -> None:
        """Remove a worker."""
        self._send(self._server.leave(worker, time.monotonic()))

    async def retire(self, worker: int) -> None:
        """Remove a worker after its pending gradient."""
        self._send(self._server.retire(worker, time.monotonic()))

    async def stop(self, reason: str) -> None:
        """End the run."""
        self._send(self._server.stop(reason))
        self._stopped.set()

    async def finish(self, reason: str) -> None:
        """End the run early, with success."""
        self._send(self._server.finish(reason))

    async def status(self) -> Status:
        """Return the status of the run; hand pending records to the recorder."""
        now = time.monotonic()
        if now - self._last_record >= _SECONDS_PER_RECORD:
            self._hand_over_if_room()
        return self._server.status(now)

    async def stopped(self) -> None:
        """Return when the server has stopped."""
        await self._stopped.wait()

    async def flush(self) -> None:
        """Return when everything so far is on disk."""
        self._hand_over()
        await asyncio.gather(*self._written)

    async def _serve(self, sockets: SocketServer) -> None:
        """Serve the data plane when messages arrive; sleep otherwise."""
        arrived = asyncio.Event()
        asyncio.get_running_loop().add_reader(sockets.fileno(), arrived.set)
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SECONDS_WITHOUT_SWEEP):
                        await arrived.wait()
                arrived.clear()
                sockets.serve(_SECONDS_WITH_SOCKETS)
                self._note_stop()
                self._hand_over_if_ready()
                await asyncio.sleep(0)
        except Exception as error:
            self._send(self._server.stop(f"the data plane failed: {error!r}"))
            raise

    def _send(self, replies: Replies) -> None:
        self._waiting.send(replies)
        if self._sockets is not None:
            self._sockets.deliver(replies)
        self._note_stop()

    def _note_stop(self) -> None:
        if self._server.stopping and not self._stopped.is_set():
            self._stopped.set()

    def _hand_over_if_ready(self) -> None:
        ledger = self._server.ledger
        since = time.monotonic() - self._last_record
        if ledger.ready or (ledger.checkpoint is not None and since >= _SECONDS_PER_CHECKPOINT):
            self._hand_over_if_room()

    def _hand_over_if_room(self) -> None:
        # A slow recorder slows the run down instead of filling the memory.
        if self._backlog.has_room:
            self._hand_over()
            before = -1
            while before < self._server.version:
                before = self._server.version
                self._send(self._server.go_on(time.monotonic()))

    def _hand_over(self) -> None:
        self._last_record = time.monotonic()
        record = self._server.drain()
        if record.empty:
            return
        self._backlog.add(len(record.evaluations), record.nbytes)
        self._limit_evaluations()
        following = self._follow_rows if self._backlog.skips else self._follow
        self._written.add(asyncio.create_task(following(record)))

    async def _follow(self, record: Record) -> None:
        """Wait until a record is written, then hand over pending records."""
        seconds = await self._recorder.record.remote(record)  # the launcher notices a dead recorder
        self._backlog.remove(len(record.evaluations), seconds, record.nbytes)
        self._end_following()

    async def _follow_rows(self, record: Record) -> None:
        """Wait until a record is written; have its losses evaluated while others are written."""
        written = await self._recorder.write.remote(record.rows)
        self._backlog.remove(0, 0.0)
        if written:  # after a failure, the recorder writes nothing more
            waiting, self._work = self._work, self._work.then(record.work)
            replaced = waiting.nbytes + record.nbytes - self._work.nbytes  # an older checkpoint
            self._backlog.evaluated(0, 0.0, replaced)
        self._hand_over_if_ready()
        async with self._working:
            work, self._work = self._work, Work()
            if work:
                seconds = await self._recorder.work.remote(work)
                self._backlog.evaluated(len(work.evaluations), seconds, work.nbytes)
        self._end_following()

    def _end_following(self) -> None:
        self._limit_evaluations()
        task = asyncio.current_task()
        assert task is not None
        self._written.discard(task)
        self._hand_over_if_ready()

    def _limit_evaluations(self) -> None:
        self._server.ledger.most_evaluations = self._backlog.most_evaluations


class WorkerActor:
    """The workers of a process, each in a thread of its own; usually there is one.

    They share the problem and compute one at a time.
    """

    def __init__(self) -> None:
        self._problem: Problem | None = None
        self._turn = threading.Lock()

    def run(self, config: RunConfig, worker: int, server: Actor) -> UserError | None:
        """Work until the server says stop; return the error, if there was one."""
        # SCHED_BATCH: a worker that wakes up does not preempt one that is computing.
        with contextlib.suppress(OSError):  # not permitted on every system
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        take_devices(config.cluster, config.cluster.threads_per_worker)
        try:
            with self._turn:
                if self._problem is None:
                    self._problem = make_problem(config, tried=True)
                problem = self._problem
                turn = self._turn if config.cluster.workers_per_process > 1 else None
                own = Worker(config, worker, problem, turn)
            with contextlib.closing(connect(server, config, worker, problem)) as connection:
                own.run(connection)
        except ConnectionError as error:
            return UserError(message_of(error))
        except Exception as error:
            return UserError.describe(error)
        return None


class RecorderActor:
    """The recorder in its own process.

    After the first error it writes nothing, because later records would leave a gap.
    """

    def __init__(self, config: RunConfig, path: str, epoch: int, umask: int) -> None:
        os.umask(umask)
        take_devices(config.cluster, 1)
        self._config = config
        self._path = Path(path)
        self._epoch = epoch
        self._recorder: Recorder | None = None
        self._error: UserError | None = None
        # Open before the run starts: imports and reads would compete with it for a core.
        self._guarded(self._open)

    def record(self, record: Record) -> float:
        """Write a record and return how many seconds its losses took."""
        return self._attempt(lambda recorder: recorder.record(record)) or 0.0

    def write(self, record: Record) -> bool:
        """Write a record without its work; return whether it is written."""
        return bool(self._attempt(lambda recorder: recorder.write(record)))

    @ray.method(concurrency_group=WORK)
    def work(self, work: Work) -> float:
        """Do the work of written records and return how many seconds the losses took."""
        return self._attempt(lambda recorder: recorder.work(work)) or 0.0

    @ray.method(concurrency_group=ASIDE)
    def hurry(self) -> None:
        """Give up a slow loss and all later ones."""
        if self._recorder is not None:
            self._recorder.hurry()

    def _open(self) -> None:
        problem, wanted = make_problem(self._config, tried=True), self._config.metrics
        known = recorded_updates(self._path)
        lease = Lease(self._path / CHECKPOINTS, self._config.cluster.lease)
        with lease.held(self._epoch):
            metrics = Metrics.open(wanted, self._path, self._epoch, known)
            if wanted.prometheus:  # the url is null if a joined cluster has no metrics page
                RunWriter(self._path).event("metrics", url=metrics_page())
        self._recorder = Recorder(self._path, problem, self._epoch, metrics)

    def _attempt(self, step: Callable[[Recorder], T]) -> T | None:
        recorder = self._recorder
        if recorder is None or self._error is not None:
            return None
        return self._guarded(lambda: step(recorder))

    def _guarded(self, step: Callable[[], T]) -> T | None:
        try:
            return step()
        except AsgdError as error:
            self._error = UserError(str(error))
        except OSError as error:
            self._error = UserError(describe_os_error(self._path, error))
        except EvaluationError as error:
            reason = UserError.describe(error.__cause__ or error).message
            self._error = UserError(f"the loss cannot be evaluated: {reason}")
        except Exception as error:
            reason = UserError.describe(error).message
            self._error = UserError(f"the record cannot be written: {reason}")
        return None

    def latest(self) -> Losses:
        """Return the first and latest loss, and the first error."""
        if self._recorder is None:
            return Losses(error=self._error)
        recorder = self._recorder
        update, latest = recorder.latest_loss
        metrics, goal = dict(recorder.latest_metrics), recorder.goal
        return Losses(recorder.first_loss, latest, update, metrics, goal, self._error)
