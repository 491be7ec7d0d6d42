"""Connections that wait for memory: the server reads a long gradient only into a free buffer."""

from __future__ import annotations

import math
import select
import time

from cluster.sockets import wire
from cluster.sockets.buffers import Buffer, BufferPool
from cluster.sockets.peer import Peer
from cluster.sockets.wire import Frame

SILENCE_SECONDS = 30.0  # in the middle of a frame


class LongVectors:
    """Gives connections the buffers of a pool, in the order in which they ask.

    Parameters
    ----------
    pool
        The buffers.
    epoll
        Where the connections are registered; one that waits for a buffer is not read.

    Attributes
    ----------
    paused
        The connections that wait, by descriptor; the first is served first.
    """

    def __init__(self, pool: BufferPool, epoll: select.epoll) -> None:
        self._pool = pool
        self._epoll = epoll
        self.paused: dict[int, Peer] = {}

    def make_room(self, peer: Peer, frame: Frame) -> None:
        """Find memory for the payload of a frame, or pause the connection until there is some."""
        if frame.kind != wire.PUSH:
            peer.window = peer.head
        elif (buffer := self._pool.take()) is not None:
            peer.use(buffer)
        else:
            self.paused[peer.socket.fileno()] = peer
            peer.deadline = math.inf
            self._epoll.modify(peer.socket, 0)

    def buffer_of(self, peer: Peer) -> Buffer:
        """Return the buffer of a connection, or one more for a snapshot if it has none."""
        return peer.buffer or self._pool.take_one_more()

    def give_back(self, buffer: Buffer) -> None:
        """End one use of a buffer; others may take it."""
        self._pool.give_back(buffer)
        self._resume()

    def leave(self, peer: Peer, descriptor: int) -> None:
        """Release the memory of a closed connection."""
        self.paused.pop(descriptor, None)
        if peer.buffer is None or peer.keeps:
            return
        if peer.asked:  # the parameter server may hold the gradient
            self._pool.forget()
            self._resume()
        else:
            self.give_back(peer.buffer)

    def _resume(self) -> None:
        """Resume reading from connections that waited for memory."""
        while self.paused and (buffer := self._pool.take()) is not None:
            peer = self.paused.pop(next(iter(self.paused)))
            peer.use(buffer)
            peer.deadline = time.monotonic() + SILENCE_SECONDS
            self._epoll.modify(peer.socket, select.EPOLLIN)
