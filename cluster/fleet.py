"""Starts, watches, restarts and resizes the actors of one run."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from asgd.arrays import Array
from asgd.config.tables import MOST_WORKERS, RunConfig
from asgd.delays import ComputeTime
from asgd.errors import InputError, RunFailedError
from asgd.rundir.checkpoint import CHECKPOINTS
from asgd.rundir.reader import read_run
from asgd.rundir.writer import RunWriter
from cluster.actors import (
    ASIDE,
    WORK,
    Actor,
    RecorderActor,
    ServerActor,
    UserError,
    WorkerActor,
)
from cluster.core.status import Status, WorkerStatus
from cluster.local_ray.causes import cause_of
from cluster.local_ray.vitals import answer, check_ray
from cluster.nodes import alive_nodes, host_name, server_node, worker_node
from cluster.restarts import Restarts
from cluster.storage.lease import Lease
from cluster.storage.recovery import restore
from cluster.team import Request, Team

_DRAIN_SECONDS = 10.0
_SERVER_DEATHS = 5  # in a row, without a new checkpoint
_SECONDS_TO_START = 60.0
_LONG_COMPUTE_TIME = 20.0  # in means; an exponential time is longer once in 5e8 gradients
_NO_NODE = "no node of the Ray cluster has cores, or the accelerators that a worker needs"
_UNKNOWN = WorkerStatus(present=False, received=0, computing=0.0)


def _start(kind: type, arguments: Mapping[str, Any], **options: Any) -> Actor:
    """Start an actor that reserves no core, so that any number of workers fits on a machine."""
    return ray.remote(num_cpus=0, **options)(kind).remote(**arguments)


class Fleet:
    """The server, its recorder and the workers of one run.

    Parameters
    ----------
    config
        The run.
    initial
        x_0, shape (d,).
    n_samples
        Number of samples of the problem.
    writer
        Of the run directory.
    resumed
        Continue from the newest good checkpoint, with the latest workers.
    """

    def __init__(
        self, config: RunConfig, initial: Array, n_samples: int, writer: RunWriter, resumed: bool
    ) -> None:
        self.config = config
        self.reached = 0
        self.team = Team(config, read_run(writer.path).events if resumed else ())
        self._initial = initial
        self._n_samples = n_samples
        self._writer = writer
        self.path = writer.path
        self._lease = Lease(writer.path / CHECKPOINTS, config.cluster.lease)
        self._deaths = 0
        self._restored = -1
        self._start_server("resumed" if resumed else None)
        self.restarts = Restarts()
        self._workers: dict[int, Actor] = {}  # the process of each; several may share one
        self._places: dict[int, str] = {}
        self._started: dict[int, float] = {}
        self.running: dict[ray.ObjectRef[Any], int] = {}
        self._ended: list[int] = []  # told to stop
        self.homeless: list[int] = []  # wait for a node
        longest = float(ComputeTime.from_config(config.cluster).mean.max())
        longest *= config.optimizer.gradients_per_push
        self._timeout = config.cluster.worker_timeout + _LONG_COMPUTE_TIME * longest
        self._dismiss_others()
        for worker in self.team.members:
            self._start_worker(worker)
        gpus = config.cluster.gpus_per_worker
        if self.homeless and gpus:
            raise RunFailedError(
                f"cluster.gpus_per_worker = {gpus:g}: the nodes of the Ray cluster have "
                f"accelerators for {len(self._workers)} of {len(self.team.members)} workers; "
                "expected fewer workers, or a smaller fraction"
            )

    def _start_server(self, reason: str | None) -> None:
        """Start a server and its recorder; with a reason, from the restored state."""
        self._writer.check()
        epoch = self._lease.take()
        restored = None
        if reason is not None:
            restored = restore(self._writer, epoch, reason, self.reached)
            self.reached = restored.version
            self._deaths = self._deaths + 1 if restored.checkpoint == self._restored else 1
            self._restored = restored.checkpoint
        self._server_node = server_node()
        self._note_place("server_placed", self._server_node)
        node = NodeAffinitySchedulingStrategy(self._server_node, soft=False)
        umask = os.umask(0o077)
        os.umask(umask)
        path = str(self._writer.path.resolve())
        options: dict[str, Any] = {"scheduling_strategy": node}
        if self.config.metrics.prometheus:
            # Ray updates its metrics page every 10 s by default; short runs end before that.
            variables = {"RAY_metrics_report_interval_ms": "1000"}
            options["runtime_env"] = {"env_vars": variables}
        self.recorder = _start(
            RecorderActor,
            {"config": self.config, "path": path, "epoch": epoch, "umask": umask},
            concurrency_groups={ASIDE: 1, WORK: 1},
            **options,
        )
        self.server = _start(
            ServerActor,
            {
                "config": self.config,
                "parameters": self._initial,
                "recorder": self.recorder,
                "path": path,
                "epoch": epoch,
                "restored": restored,
                "members": list(self.team.members),
                "n_samples": self._n_samples,
            },
            scheduling_strategy=node,
            # With the transport "ray", each worker has one call waiting for its answer.
            max_concurrency=max(self.config.cluster.workers, MOST_WORKERS) + 16,
        )
        self.stopped = self.server.stopped.remote()

    def replace_server(self, cause: str) -> None:
        """Start a new server and recorder after one of them died.

        Parameters
        ----------
        cause
            Why it died, in one line.

        Raises
        ------
        RunFailedError
            The server died too often, the record cannot be used, or Ray is dead.
        """
        check_ray()
        with contextlib.suppress(RayError):  # let the recorder write its queue
            ray.get(self.recorder.latest.remote(), timeout=_DRAIN_SECONDS)
        ray.kill(self.server)
        ray.kill(self.recorder)
        if self._deaths >= _SERVER_DEATHS:
            raise RunFailedError(
                f"the parameter server died {self._deaths + 1} times without passing the "
                f"checkpoint of update {self._restored}; last cause: {cause}"
            )
        # Workers on the server's lost node may run on for a while, cut off from the new server.
        separated = self._server_node not in alive_nodes()
        self._start_server(f"the server or its recorder died: {cause}")
        # A worker first loses its connection and ends its old call, then begins the new one.
        workers = [*self.running.values(), *self._ended]
        self.running.clear()
        self._ended.clear()
        for worker in list(self._workers):
            if separated or worker not in self.team.members:
                self._leave_process(worker)
        for worker in self.team.members:
            if worker in self._workers:
                self._let_work(worker)
            elif worker in workers:
                self._start_worker(worker)
        self._dismiss_others()
        for worker in set(self.team.members).difference(workers):
            self.server.leave.remote(worker)

    def resize(self, request: Request) -> None:
        """Resize as requested, and answer with an event."""
        try:
            if request.workers is None:
                raise InputError("the request cannot be understood")
            change = self.team.resize(request.workers)
        except InputError as error:
            self._writer.event("workers_refused", request=request.name, reason=str(error))
            return
        self._writer.event(
            "workers_changed",
            request=request.name,
            update=self.reached,
            before=change.before,
            after=change.after,
            added=change.added,
            removed=change.removed,
            workers=self.team.members,
        )
        self.homeless = [worker for worker in self.homeless if worker not in change.removed]
        for worker in change.added:
            answer(self.server.admit.remote(worker))
            self._start_worker(worker)
        for worker in change.removed:
            answer(self.server.retire.remote(worker))

    def _dismiss_others(self) -> None:
        """Tell a new server to retire the configured workers that were removed earlier."""
        for worker in set(range(self.config.cluster.workers)).difference(self.team.members):
            self.server.retire.remote(worker)

    def _note_place(self, kind: str, node: str, **worker: int) -> None:
        where = _on_host(node)
        if where:
            self._writer.event(kind, **worker, **where)

    def _start_worker(self, worker: int) -> None:
        """Start the process of a worker and its work, or let it wait for a node."""
        found = self._process_for(worker)
        if found is None:
            if not self.homeless:
                self._writer.event("waiting_for_nodes", update=self.reached, reason=_NO_NODE)
            self.homeless.append(worker)
            return
        self._workers[worker], node = found
        self._places[worker] = node
        self._note_place("worker_placed", node, worker=worker)
        self._let_work(worker)

    def _process_for(self, worker: int) -> tuple[Actor, str] | None:
        """Return a process with room, else a new one, and its node; None without a node."""
        most, sharing = self.config.cluster.workers_per_process, Counter(self._workers.values())
        for other, process in self._workers.items():
            if sharing[process] < most:
                return process, self._places[other]
        node = self._node_for(worker)
        if node is None:
            return None
        options: dict[str, Any] = {
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
            "num_gpus": self.config.cluster.gpus_per_worker,
            "max_concurrency": most,
        }
        return _start(WorkerActor, {}, **options), node

    def _leave_process(self, worker: int) -> None:
        """Forget the process of a worker, and end it if it has no other worker."""
        process = self._workers.pop(worker)
        if process not in self._workers.values():
            ray.kill(process)

    def _node_for(self, worker: int) -> str | None:
        places = [node for other, node in self._places.items() if other in self._workers]
        gpus = self.config.cluster.gpus_per_worker
        return worker_node(places, self._places.get(worker), gpus)

    def _let_work(self, worker: int) -> None:
        self._started[worker] = time.monotonic()
        task = self._workers[worker].run.remote(self.config, worker, self.server)
        self.running[task] = worker

    def replace_failed(self, ready: list[ray.ObjectRef[Any]], status: Status) -> None:
        """Replace workers that have exited or hang, and start workers whose delay is over.

        Raises
        ------
        RunFailedError
            No worker is left.
        """
        now = time.monotonic()
        for task in ready:
            if task in self.running:
                self._end(task, status, now)
        for worker in list(self.running.values()):
            known = status.workers.get(worker, _UNKNOWN)
            silent = known.computing if known.present else now - self._started[worker]
            # Starting a process and importing the problem may take longer than a gradient.
            patience = self._timeout + (0.0 if known.present else _SECONDS_TO_START)
            if worker in self._workers and silent > patience:
                reason = f"silent for {silent:.0f} s"
                others = f"its process was ended: worker {worker} was {reason}"
                self._lose_process(worker, reason, others, status, now)
        self._start_waiting(now)
        # Workers may end before the driver knows that the server has stopped.
        if not (self.running or self._ended or self.homeless or self.restarts.pending):
            raise RunFailedError(
                f"every worker failed too often; first failure: {self.restarts.first_reason}"
            )

    def _start_waiting(self, now: float) -> None:
        """Start workers whose delay is over, and those for which there is a node again."""
        for worker in self.restarts.due(now):
            if worker in self.team.members:
                self._start_worker(worker)
        while self.homeless and self._node_for(self.homeless[0]) is not None:
            self._start_worker(self.homeless.pop(0))

    def _end(self, task: ray.ObjectRef[Any], status: Status, now: float) -> None:
        """Note why a worker has ended."""
        worker = self.running[task]
        try:
            error: UserError | None = ray.get(task)
        except RayError as death:
            reason = cause_of(death)
            self._lose_process(worker, reason, reason, status, now)
            return
        if error is not None:
            self._lose(task, error, status, now)
            return
        del self.running[task]
        if worker in self.team.members:  # told to stop
            self._ended.append(worker)
        else:
            self._leave_process(worker)

    def _lose_process(
        self, worker: int, reason: str, others: str, status: Status, now: float
    ) -> None:
        """Note the loss of a worker's process; `others` is the reason for its other workers."""
        process = self._workers[worker]
        together = {other for other, its in self._workers.items() if its == process}
        for task, other in list(self.running.items()):
            if other in together:
                why = reason if other == worker else others
                self._lose(task, UserError(why), status, now)
        for other in together.intersection(self._ended):
            self._leave_process(other)

    def _lose(
        self, task: ray.ObjectRef[Any], reason: UserError, status: Status, now: float
    ) -> None:
        worker = self.running.pop(task)
        self._leave_process(worker)
        why, delay, where = reason.message, None, _on_host(self._places[worker])
        if worker in self.team.members:
            received = status.workers.get(worker, _UNKNOWN).received
            delay = self.restarts.failed(worker, why, received, now, in_code=reason.in_code)
            if delay is None:
                self.team.members.remove(worker)
                why = f"{why}; given up after {self.restarts.streak(worker, now)}"
        self._writer.event(
            "worker_lost",
            worker=worker,
            update=status.version,
            reason=why,
            restart_seconds=delay,
            **where,
        )
        answer(self.server.leave.remote(worker))

    def kill(self) -> None:
        """End every actor of the run at once."""
        for actor in (*set(self._workers.values()), self.server, self.recorder):
            ray.kill(actor)


def _on_host(node: str) -> dict[str, str]:
    """Return the event field that names the host of a node, none in a cluster of one node."""
    host = host_name(node)
    return {} if host is None else {"host": host}
