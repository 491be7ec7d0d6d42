"""The worker's side of the data plane: one socket to the server, with the frames of `wire`."""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.core.messages import Gradient, Reply, Snapshot, Stop
from cluster.sockets import wire
from cluster.sockets.compressed import gradient_nbytes, packing_of
from cluster.sockets.shared_memory import shared_vector
from cluster.sockets.wire import HEADER, Frame, VectorFormat, WireError

KEPT_BYTES = 1 << 16  # vectors up to this size have memory of their own at the server
BUSY_WAIT_SECONDS = 100e-6  # in shorter waits, waking up would take most of the time
HANDSHAKE_SECONDS = 10.0
# TCP keepalive, to detect a dead machine: idle seconds, seconds between probes, probes.
_KEEPALIVE_IDLE, _KEEPALIVE_INTERVAL, _KEEPALIVE_PROBES = 10, 5, 3
_UNACKNOWLEDGED_MILLISECONDS = 30_000


@dataclass(frozen=True)
class Endpoint:
    """The address of the server and its secret; workers get it through Ray, not over the sockets.

    Attributes
    ----------
    host, port
        Address of the TCP listener.
    local
        Name of the local socket, for workers on the same node.
    vectors
        Format of gradients and parameters.
    secret
        Secret of the run.
    """

    host: str
    port: int
    local: str
    vectors: VectorFormat
    secret: bytes = field(repr=False)


class SocketConnection:
    """A worker's connection; `join` and `push` block until the server answers.

    Both raise `ConnectionError` when the server is gone. The parameters of a snapshot are
    read-only and valid until the next call. The connection has memory for one vector, in turn a
    snapshot and the gradient that answers it.

    Parameters
    ----------
    endpoint
        The server.
    worker
        Number of the worker.
    shared
        Use the local socket and shared memory (on the server's node); else TCP.
    alone
        Whether the worker has its process for itself, so that busy-waiting delays no other.

    Raises
    ------
    ConnectionError
        The server cannot be reached, or the secrets differ.
    """

    def __init__(
        self, endpoint: Endpoint, worker: int, shared: bool = False, alone: bool = True
    ) -> None:
        self._worker = worker
        vectors = endpoint.vectors
        inline = 0 if shared else vectors.nbytes
        pushed = 0 if shared else gradient_nbytes(vectors)
        size = HEADER.size + max(inline, pushed, wire.LONGEST_TEXT)
        self._frame = np.empty(size, np.uint8).data
        self._snapshot_bytes = HEADER.size + inline
        self._push = self._frame[: HEADER.size + pushed]
        self._push_start = wire.push_start(worker, pushed)
        self._packing = None if shared else packing_of(vectors)
        self._busy_waits = False
        self._may_busy_wait = alone and may_busy_wait()
        self._snapshot_start = wire.snapshot_start(worker)
        self._socket = _dial(endpoint, shared)
        try:
            memory = self._greet(endpoint, shared)
        except OSError as error:
            self._socket.close()
            raise _connection_error(error) from error
        self._vector = vectors.view(self._frame) if memory is None else memory
        self._parameters = vectors.arrival(self._vector)
        self._read_only = self._parameters.view()
        self._read_only.flags.writeable = False

    def join(self, worker: int) -> Reply:
        """Ask for the first snapshot."""
        return self._ask(wire.pack(wire.JOIN, worker))

    def push(self, gradient: Gradient) -> Reply:
        """Deliver a gradient and ask for the next snapshot."""
        if gradient.gradient.shape != self._vector.shape:
            return self._ask(wire.pack_misfit(gradient))
        if self._packing is None:
            wire.copy_vector(self._vector, gradient.gradient)
        else:
            self._packing.pack(gradient.gradient, self._push[HEADER.size :])
        wire.pack_push(self._push, self._push_start, gradient)
        return self._ask(self._push)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _ask(self, question: bytes | memoryview) -> Reply:
        try:
            self._socket.sendall(question)
            got = self._wait()
            if got == self._snapshot_bytes:
                # The usual case: exactly one whole snapshot.
                start, size, length, *fields = wire.SNAPSHOT_FIELDS.unpack_from(self._frame)
                if start == self._snapshot_start and length == got - HEADER.size:
                    return self._read(size, *fields)
            frame = self._receive(got)
        except OSError as error:
            raise _connection_error(error) from error
        if frame.kind == wire.SNAPSHOT:
            return self._read(
                frame.batch_size, frame.sequence, frame.version, frame.epoch, frame.position
            )
        if frame.kind == wire.STOP:
            return Stop(wire.text(self._payload(frame)))
        raise WireError(f"the server sent a frame of kind {frame.kind} as an answer")

    def _wait(self) -> int:
        """Wait for the answer and return the number of bytes received.

        Busy-waits like `SocketServer._wait`, because sleeping costs more in short waits.
        """
        began = time.monotonic()
        while self._busy_waits and time.monotonic() - began < BUSY_WAIT_SECONDS:
            try:
                return self._socket.recv_into(self._frame, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                os.sched_yield()
        got = self._socket.recv_into(self._frame)
        self._busy_waits = self._may_busy_wait and time.monotonic() - began < BUSY_WAIT_SECONDS
        return got

    def _read(
        self, batch_size: int, sequence: int, version: int, epoch: int, position: int
    ) -> Snapshot:
        if self._parameters is not self._vector:
            np.copyto(self._parameters, self._vector)
        return Snapshot(self._read_only, version, epoch, sequence, batch_size, position)

    def _greet(self, endpoint: Endpoint, shared: bool) -> npt.NDArray[Any] | None:
        """Exchange proofs of the secret; return the shared memory, if any."""
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        hello = wire.pack(wire.HELLO, self._worker, endpoint.vectors.hello(nonce, shared))
        self._socket.sendall(hello)
        challenge = bytes(self._payload(self._receive()))
        nonce, shown = challenge[: wire.NONCE_BYTES], challenge[wire.NONCE_BYTES :]
        if not hmac.compare_digest(shown, wire.proof(endpoint.secret, b"server", hello, nonce)):
            raise WireError("the server does not know the secret of this run")
        answer = wire.proof(endpoint.secret, b"worker", hello, nonce)
        self._socket.sendall(wire.pack(wire.PROOF, self._worker, answer))
        if not shared:
            self._receive()
            memory = None
        else:
            # The descriptor is attached to the first byte of its frame.
            first, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
            self._frame[: len(first)] = first
            self._receive(len(first))
            try:
                memory = shared_vector(descriptors[0], endpoint.vectors)
            finally:
                os.close(descriptors[0])
        self._socket.settimeout(None)
        return memory

    def _payload(self, frame: Frame) -> memoryview:
        return self._frame[HEADER.size : HEADER.size + frame.length]

    def _receive(self, got: int = 0) -> Frame:
        """Return the next frame; its first `got` bytes are already received."""
        data = self._frame
        if not got:
            got = self._socket.recv_into(data)
        if got < HEADER.size:
            self._fill(data[got : HEADER.size])
            got = HEADER.size
        frame = wire.parse(data)
        end = HEADER.size + frame.length
        if not got <= end <= len(data):
            raise WireError(f"a frame of kind {frame.kind} and {frame.length} bytes is too long")
        if got < end:
            self._fill(data[got:end])
        if frame.kind == wire.ERROR:
            raise WireError(f"refused by the server: {wire.text(self._payload(frame))}")
        return frame

    def _fill(self, data: memoryview) -> None:
        while data:
            count = self._socket.recv_into(data, len(data), socket.MSG_WAITALL)
            if not count:
                raise ConnectionResetError("the server closed the connection")
            data = data[count:]


def may_busy_wait() -> bool:
    """Whether busy-waiting is free.

    It is not on a single core, or in a container with a quota of processor time.
    """
    if len(os.sched_getaffinity(0)) == 1:
        return False
    for file in ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"):
        with suppress(OSError):
            return Path(file).read_text().split()[0] in ("max", "-1")
    return True


def tune(connection: socket.socket, patient: bool = False) -> None:
    """Set TCP_NODELAY and keepalive: send small frames at once and detect a dead machine.

    A patient connection has no timeout for unacknowledged data, because the server reads a long
    gradient only when it has memory for it.
    """
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE),
        (socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL),
        (socket.TCP_KEEPCNT, _KEEPALIVE_PROBES),
        (socket.TCP_USER_TIMEOUT, 0 if patient else _UNACKNOWLEDGED_MILLISECONDS),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _dial(endpoint: Endpoint, shared: bool) -> socket.socket:
    try:
        if not shared:
            address = (endpoint.host, endpoint.port)
            connection = socket.create_connection(address, HANDSHAKE_SECONDS)
            tune(connection, patient=endpoint.vectors.nbytes > KEPT_BYTES)
            return connection
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(HANDSHAKE_SECONDS)
        try:
            connection.connect(f"\0{endpoint.local}")
        except OSError:
            connection.close()
            raise
        return connection
    except OSError as error:
        raise _connection_error(error) from error


def _connection_error(error: OSError) -> ConnectionError:
    if isinstance(error, ConnectionError):
        return error
    return ConnectionError(f"the parameter server does not answer ({error.strerror or error})")
