"""How messages travel between a worker and the server.

`ray`: one actor call per gradient; the server answers it when it has a snapshot for the worker,
which may be long after. Parameters and gradients cross as raw little-endian numbers.

`tcp` and `shm`: the data plane of `cluster.sockets.server`; Ray only tells the workers where it is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import OutOfMemoryError, RayActorError

from asgd.arrays import Array
from asgd.config import RunConfig
from cluster.core.messages import Gradient, Reply, Snapshot, Stop
from cluster.core.server import Replies
from cluster.core.worker import Connection
from cluster.sockets.connection import SocketConnection
from cluster.sockets.wire import VectorFormat

EncodedReply = tuple[Any, ...]

_SECONDS_BETWEEN_DIALS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)


class ServerGoneError(ConnectionError):
    """The server's process is dead: no dial will reach it."""


def encode(array: Array, dtype: str = "float64") -> bytes:
    """Return the raw numbers of a vector; what does not fit into float32 becomes infinite."""
    with np.errstate(over="ignore"):
        return array.astype(VectorFormat(array.size, dtype).numbers).tobytes()


def decode(data: bytes, dtype: str = "float64") -> Array:
    """Return the vector of raw numbers, read-only."""
    value = np.frombuffer(data, VectorFormat(0, dtype).numbers).astype(float, copy=False)
    value.flags.writeable = False
    return value


def connect(server: Any, config: RunConfig, worker: int) -> Connection:
    """Return a worker's way to the server actor.

    On the server's node "auto" and "shm" go through shared memory, elsewhere over TCP. "auto"
    takes TCP, too, where the server's local socket cannot be reached, as between containers.

    Raises
    ------
    ConnectionError
        The server is gone, or could not be reached at any of several dials over 13 s.
    """
    transport = config.cluster.transport
    if transport == "ray":
        return RayConnection(server, config.cluster.wire_dtype)
    return persist(lambda: _dial(server, transport, worker))


def persist(
    dial: Callable[[], Connection], delays: Sequence[float] = _SECONDS_BETWEEN_DIALS
) -> Connection:
    """Dial until there is a connection, a last time after the last delay.

    A server that is there may be out of reach for a while: strangers flood it, or the machine is
    busy. To start the worker's process anew takes longer than to dial again.
    """
    for delay in delays:
        try:
            return dial()
        except ServerGoneError:
            raise
        except ConnectionError:
            time.sleep(delay)
    return dial()


def _dial(server: Any, transport: str, worker: int) -> Connection:
    try:
        endpoint, node = ray.get(server.endpoint.remote())
    except (RayActorError, OutOfMemoryError) as error:
        raise ServerGoneError("the parameter server is gone") from error
    if transport == "tcp" or node != ray.get_runtime_context().get_node_id():
        return SocketConnection(endpoint, worker)
    try:
        return SocketConnection(endpoint, worker, shared=True)
    except ConnectionRefusedError:
        if transport == "shm":
            raise
        return SocketConnection(endpoint, worker)


class RayConnection:
    """The worker's end: blocks in `ray.get` until the server answers."""

    def __init__(self, server: Any, dtype: str = "float64") -> None:
        self._server = server
        self._dtype = dtype

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
                encode(gradient.gradient.ravel(), self._dtype),
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
        parameters, version, epoch, sequence, batch_size = reply
        return Snapshot(decode(parameters, self._dtype), version, epoch, sequence, batch_size)


class Waiting:
    """The server's end: one future for each worker that waits for an answer."""

    def __init__(self, dtype: str = "float64") -> None:
        self._dtype = dtype
        self._futures: dict[int, asyncio.Future[EncodedReply]] = {}

    def expect(self, worker: int) -> asyncio.Future[EncodedReply]:
        """Return the future of a call that has just come in.

        An older call of the same worker has nobody left who reads its answer.
        """
        older = self._futures.pop(worker, None)
        if older is not None:
            older.cancel()
        future = self._futures[worker] = asyncio.get_running_loop().create_future()
        return future

    def send(self, replies: Replies) -> None:
        """Answer; a reply to a worker that does not wait is dropped."""
        for worker, reply in replies:
            future = self._futures.pop(worker, None)
            if future is not None and not future.done():
                future.set_result(self._encode(reply))

    def _encode(self, reply: Reply) -> EncodedReply:
        if isinstance(reply, Stop):
            return (reply.reason,)
        return (
            encode(reply.parameters, self._dtype),
            reply.version,
            reply.epoch,
            reply.sequence,
            reply.batch_size,
        )
