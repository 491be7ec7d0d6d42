"""A server with sockets, and workers in threads, for tests of the data plane."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.problems.base import Problem, starting_point
from asgd.problems.make import make_problem
from cluster.core.ledger import Record
from cluster.core.messages import Gradient, Reply, Snapshot
from cluster.core.server import ParameterServer
from cluster.core.worker import Worker
from cluster.sockets.connection import SocketConnection
from cluster.sockets.server import SocketServer
from cluster.sockets.wire import VectorFormat

PATIENCE = 100.0


def configure(workers: int, updates: int, problem: Any = None, **cluster: Any) -> RunConfig:
    return make_config(
        {
            "problem": problem or {"kind": "quadratic"},
            "optimizer": {"learning_rate": 0.05, "batch_size": 2},
            "cluster": {"workers": workers, **cluster},
            "run": {"updates": updates, "eval_every": 10, "seed": 4},
        }
    )


class Line:
    """A parameter server with sockets, served by the test's thread."""

    def __init__(
        self,
        config: RunConfig,
        transport: str,
        dtype: str = "auto",
        problem: Problem | None = None,
    ) -> None:
        self.config = config
        self.shared = transport == "shm"
        self.problem = problem or make_problem(config)
        self.initial = starting_point(self.problem, config.run.seed)
        self.server = ParameterServer(config, self.initial)
        cluster = msgspec.structs.replace(config.cluster, wire_dtype=dtype)
        vectors = VectorFormat.of(self.problem.dim, self.initial.dtype, cluster)
        self.sockets = SocketServer(self.server, vectors)
        self.replies: dict[int, Any] = {}
        self.opened: list[Any] = []

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *error: object) -> None:
        self.sockets.close()
        for connection in self.opened:
            connection.close()

    def connect(self, worker: int) -> SocketConnection:
        """Return the connection of a worker that the test plays."""
        end = self.sockets.endpoint
        connection: SocketConnection = self.meanwhile(
            lambda: SocketConnection(end, worker, self.shared)
        )
        self.opened.append(connection)
        return connection

    def joined(self, worker: int) -> tuple[SocketConnection, Snapshot]:
        """Return the connection of a worker and its first snapshot."""
        connection = self.connect(worker)
        snapshot = self.meanwhile(lambda: connection.join(worker))
        assert isinstance(snapshot, Snapshot)
        return connection, snapshot

    def meanwhile(self, work: Callable[[], Any]) -> Any:
        """Serve while `work` blocks in a thread; return its result."""
        self.spawn(-1, work)
        self.serve_until(lambda: -1 in self.replies)
        result = self.replies.pop(-1)
        if isinstance(result, Exception):
            raise result
        return result

    def work(self, worker: int) -> None:
        """Let a worker work in a thread until it is told to stop."""

        def task() -> Reply:
            connection = SocketConnection(self.sockets.endpoint, worker, self.shared)
            try:
                return Worker(self.config, worker, self.problem).run(connection)
            finally:
                connection.close()

        self.spawn(worker, task)

    def spawn(self, key: int, task: Callable[[], Any]) -> None:
        """Run a task in a thread; its result, or its exception, goes to `replies`."""

        def run() -> None:
            try:
                self.replies[key] = task()
            except Exception as error:
                self.replies[key] = error

        threading.Thread(target=run, daemon=True).start()

    def serve_until(self, done: Callable[[], Any]) -> None:
        """Serve until a condition holds."""
        deadline = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < deadline, f"not done after {PATIENCE} s"
            self.sockets.serve(0.02, 0.02)

    def finish(self, workers: int) -> Record:
        """Serve until `workers` workers have been told to stop; return the whole record."""
        self.serve_until(lambda: len(self.replies) == workers)
        for reply in self.replies.values():
            if isinstance(reply, Exception):
                raise reply
        return self.server.drain()

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind since the last call."""
        return [event for event in self.server.drain().events if event["event"] == kind]


def answer(snapshot: Snapshot, worker: int, value: Any) -> Gradient:
    """Return a gradient that answers a snapshot."""
    return Gradient(worker, snapshot.sequence, snapshot.version, snapshot.epoch, value, 0.0)
