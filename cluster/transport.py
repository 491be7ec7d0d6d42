"""How messages travel between a worker and the server.

`ray`: one actor call per gradient; the server answers it when it has a snapshot for the worker,
which may be long after. Parameters and gradients cross as raw bytes of little-endian float64.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from cluster.messages import Array, Gradient, Reply, Snapshot, Stop
from cluster.server import Replies

EncodedReply = tuple[Any, ...]


def encode(array: Array) -> bytes:
    """Return the raw bytes of a vector."""
    return np.ascontiguousarray(array, dtype="<f8").tobytes()


def decode(data: bytes) -> Array:
    """Return the vector in raw bytes, read-only."""
    return np.frombuffer(data, dtype="<f8")


class RayConnection:
    """The worker's end: blocks in `ray.get` until the server answers."""

    def __init__(self, server: Any) -> None:
        self._server = server

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
                encode(gradient.gradient.ravel()),
                gradient.gradient.shape,
                gradient.compute_seconds,
            )
        )

    @staticmethod
    def _wait(answer: ray.ObjectRef[Any]) -> Reply:
        try:
            reply: EncodedReply = ray.get(answer)
        except RayActorError as error:
            raise ConnectionError("the parameter server is gone") from error
        if len(reply) == 1:
            return Stop(*reply)
        parameters, version, epoch, sequence, batch_size = reply
        return Snapshot(decode(parameters), version, epoch, sequence, batch_size)


class Waiting:
    """The server's end: one future for each worker that waits for an answer."""

    def __init__(self) -> None:
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

    @staticmethod
    def _encode(reply: Reply) -> EncodedReply:
        if isinstance(reply, Stop):
            return (reply.reason,)
        return (
            encode(reply.parameters),
            reply.version,
            reply.epoch,
            reply.sequence,
            reply.batch_size,
        )
