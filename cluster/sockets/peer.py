"""The server's state of one connection."""

from __future__ import annotations

import math
import os
import socket
import struct
from collections.abc import Sequence

from cluster.sockets import wire
from cluster.sockets.buffers import Buffer
from cluster.sockets.compressed import gradient_nbytes
from cluster.sockets.wire import HEADER, Frame, VectorFormat, WireError

HELLO_BYTES = wire.HELLO_PAYLOAD.size
_CREDENTIALS = struct.Struct("3i")  # process, user, group


class Peer:
    """The state of one connection.

    `window` is the memory to receive into and `got` the number of bytes in it; `accepts` maps the
    kinds of frame that are allowed now to their lengths; `asked` is true while the worker waits for
    an answer, and `unsent` is its unsent part. `buffer` holds a gradient or a snapshot; `keeps`
    says whether it belongs to the connection and not to a pool. `own` receives requests, `head`
    frames without a vector, and `top`, its start, headers.
    """

    def __init__(self, connection: socket.socket, name: str, deadline: float) -> None:
        self.socket = connection
        self.name = name
        self.deadline = deadline
        self.worker: int | None = None
        self.head = memoryview(bytearray(HEADER.size + 8 * wire.LONGEST_SHAPE))
        self.window = self.head[: HEADER.size + HELLO_BYTES]
        self.top = self.own = self.head[: HEADER.size]
        self.got = 0
        self.frame: Frame | None = None
        self.accepts = {wire.HELLO: range(HELLO_BYTES, HELLO_BYTES + 1)}
        self.hello = self.nonce = self.push_start = self.snapshot_start = b""
        self.push_bytes = 0
        self.shared = self.keeps = False
        self.buffer: Buffer | None = None
        self.unsent: list[memoryview] = []
        self.asked = self.stopped = False

    def open(self, worker: int, vectors: VectorFormat, buffer: Buffer | None) -> None:
        """Expect requests of an authenticated worker, with a buffer to keep, if any."""
        self.worker = worker
        self.deadline = math.inf
        if buffer is not None:
            self.buffer, self.keeps, self.own = buffer, True, buffer.memory
        inline = 0 if self.shared else gradient_nbytes(vectors)
        self.push_start = wire.push_start(worker, inline)
        self.push_bytes = HEADER.size + inline
        self.snapshot_start = wire.snapshot_start(worker)
        self.answer = memoryview(bytearray(HEADER.size))
        self.accepts = {
            wire.JOIN: range(1),
            wire.PUSH: range(inline, inline + 1),
            wire.MISFIT: range(0, 8 * wire.LONGEST_SHAPE + 1, 8),
        }
        self.listen()

    def hold(self) -> None:
        """Receive nothing but a header until the answer, because the buffer holds the gradient."""
        self.asked = True
        self.window = self.top

    def use(self, buffer: Buffer) -> None:
        """Receive the rest of a gradient, whose header has arrived, into a buffer."""
        self.buffer = buffer
        buffer.memory[: self.got] = self.head[: self.got]
        self.window = buffer.push

    def listen(self) -> None:
        """Receive the next request."""
        self.window = self.own
        if self.got and self.keeps:
            self.window[: self.got] = self.head[: self.got]

    def header(self) -> Frame:
        """Return the header that has arrived.

        Raises
        ------
        WireError
            It is not a header, or such a frame is not allowed now.
        """
        frame = wire.parse(self.window)
        if self.asked or self.unsent:
            raise WireError("a request before the answer to the last one")
        if frame.length not in self.accepts.get(frame.kind, ()):
            raise WireError(
                f"a frame of kind {frame.kind} and {frame.length} bytes is not allowed now"
            )
        if self.worker not in (None, frame.worker):
            raise WireError(f"worker {frame.worker} on the connection of worker {self.worker}")
        return frame


def after(parts: Sequence[wire.Memory | bytes], sent: int) -> list[memoryview]:
    """Return the parts without their first `sent` bytes."""
    left = []
    for part in parts:
        if sent < len(part):
            left.append(memoryview(part)[sent:])
        sent = max(0, sent - len(part))
    return left


def is_own(connection: socket.socket) -> bool:
    """Whether a process of the same user is at the other end, according to the kernel."""
    if connection.family != socket.AF_UNIX:
        return False
    shown = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(shown)
    return bool(user == os.getuid())
