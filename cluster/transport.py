"""The transports between workers and the server.

`ray`: one actor call per gradient. The call returns when the server has a snapshot for the worker,
which may be much later. Vectors are sent as raw little-endian numbers, compressed ones too.

`tcp` and `shm`: the data plane of `cluster.sockets.server`; workers get its address through Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import OutOfMemoryError, RayActorError

from asgd.arrays import Array, converted
from asgd.config.tables import RunConfig
from asgd.problems.base import Problem
from cluster.core.messages import Gradient, Reply, Snapshot, Stop
from cluster.core.server import Replies
from cluster.sockets.connection import SocketConnection
from cluster.sockets.wire import VectorFormat

EncodedReply = tuple[Any, ...]

_SECONDS_BETWEEN_DIALS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)


class ServerGoneError(ConnectionError):
    """The server's process is dead, so dialling again is useless."""


def encode(array: Array, vectors: VectorFormat) -> bytes:
    """Return the bytes of a vector; overflows become infinite."""
    return converted(array, vectors.numbers).tobytes()


def decode(data: bytes, vectors: VectorFormat) -> Array:
    """Return the vector in a message in the precision of the parameters, read-only."""
    value = np.frombuffer(data, vectors.numbers).astype(vectors.precision, copy=False)
    value.flags.writeable = False
    return value


def connect(server: Any, config: RunConfig, worker: int, problem: Problem) -> Connected:
    """Connect a worker to the server.

    "auto" and "shm" use shared memory on the server's node and TCP elsewhere. "auto" also uses TCP
    if the server's local socket cannot be reached, as between containers.

    Raises
    ------
    ConnectionError
        The server is dead, or several attempts over 13 s failed.
    """
    transport = config.cluster.transport
    if transport == "ray":
        vectors = VectorFormat.of(problem.dim, problem.dtype, config.cluster)
        return RayConnection(server, vectors)
    alone = config.cluster.workers_per_process == 1
    return retry(lambda: _dial(server, transport, worker, alone))


def retry(
    dial: Callable[[], SocketConnection], delays: Sequence[float] = _SECONDS_BETWEEN_DIALS
) -> SocketConnection:
    """Dial until a connection succeeds, at most once more than there are delays.

    A live server may be unreachable for a while, under a flood of connections or a heavy load.
    Dialling again is faster than restarting the worker's process.
    """
    for delay in delays:
        try:
            return dial()
        except ServerGoneError:
            raise
        except ConnectionError:
            time.sleep(delay)
    return dial()


def _dial(server: Any, transport: str, worker: int, alone: bool) -> SocketConnection:
    try:
        endpoint, node = ray.get(server.endpoint.remote())
    except (RayActorError, OutOfMemoryError) as error:
        raise ServerGoneError("the parameter server is gone") from error
    if transport == "tcp" or node != ray.get_runtime_context().get_node_id():
        return SocketConnection(endpoint, worker, alone=alone)
    try:
        return SocketConnection(endpoint, worker, shared=True, alone=alone)
    except ConnectionRefusedError:
        if transport == "shm":
            raise
        return SocketConnection(endpoint, worker, alone=alone)


class RayConnection:
    """The worker's side of the transport `ray`; blocks in `ray.get` until the server answers."""

    def __init__(self, server: Any, vectors: VectorFormat) -> None:
        self._server = server
        self._vectors = vectors

    def close(self) -> None:
        """Do nothing: between two calls nothing is open."""

    def join(self, worker: int) -> Reply:
        """Ask for the first snapshot."""
        return self._wait(self._server.join.remote(worker))

    def push(self, gradient: Gradient) -> Reply:
        """Deliver a gradient and ask for the next snapshot."""
        return self._wait(
            self._server.push.remote(
                gradient.worker,
                gradient.sequence,
                gradient.read_version,
                gradient.epoch,
                encode(gradient.gradient.ravel(), self._vectors),
                gradient.gradient.shape,
                gradient.compute_seconds,
            )
        )

    def _wait(self, answer: ray.ObjectRef[Any]) -> Reply:
        try:
            reply: EncodedReply = ray.get(answer)
        except (RayActorError, OutOfMemoryError) as error:
            raise ServerGoneError("the parameter server is gone") from error
        if len(reply) == 1:
            return Stop(*reply)
        parameters, *fields = reply
        return Snapshot(decode(parameters, self._vectors), *fields)


Connected = SocketConnection | RayConnection


class Waiting:
    """The server's side of the transport `ray`: one future per waiting worker."""

    def __init__(self, vectors: VectorFormat) -> None:
        self._vectors = vectors
        self._futures: dict[int, asyncio.Future[EncodedReply]] = {}

    def expect(self, worker: int) -> asyncio.Future[EncodedReply]:
        """Return the future of a new call; an older call of the same worker is abandoned."""
        older = self._futures.pop(worker, None)
        if older is not None:
            older.cancel()
        future = self._futures[worker] = asyncio.get_running_loop().create_future()
        return future

    def send(self, replies: Replies) -> None:
        """Send replies; those to workers that are not waiting are dropped."""
        for worker, reply in replies:
            future = self._futures.pop(worker, None)
            if future is not None and not future.done():
                future.set_result(self._encode(reply))

    def _encode(self, reply: Reply) -> EncodedReply:
        if isinstance(reply, Stop):
            return (reply.reason,)
        return (
            encode(reply.parameters, self._vectors),
            reply.version,
            reply.epoch,
            reply.sequence,
            reply.batch_size,
            reply.position,
        )
