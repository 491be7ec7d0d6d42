"""The data plane: sockets that connect the workers to the `ParameterServer` object.

`SocketServer` is one `epoll` loop for all workers. Workers connect over TCP or, on the server's
node, over a local socket with the vectors in shared memory. The protocol is in
`cluster.sockets.wire`. A connection that breaks, stalls in the middle of a frame or violates the
protocol is closed and reported; its worker is removed until it connects again.

A connection is unauthenticated until it has proved that it knows the secret; local connections of
the same user need no proof. The number of unauthenticated connections is limited: a new one
replaces the oldest.
"""

from __future__ import annotations

import hmac
import math
import os
import secrets
import select
import socket
import time
from contextlib import suppress
from typing import Any

from asgd.arrays import Array
from cluster.core.messages import Gradient, Snapshot, Stop
from cluster.core.server import ParameterServer, Replies
from cluster.sockets import wire
from cluster.sockets.buffers import Buffer, BufferPool
from cluster.sockets.connection import (
    BUSY_WAIT_SECONDS,
    HANDSHAKE_SECONDS,
    KEPT_BYTES,
    Endpoint,
    may_busy_wait,
    tune,
)
from cluster.sockets.long_vectors import SILENCE_SECONDS, LongVectors
from cluster.sockets.peer import HELLO_BYTES, Peer, after, is_own
from cluster.sockets.shared_memory import create_memory, shared_vector
from cluster.sockets.wire import HEADER, Frame, VectorFormat, WireError

_SWEEP_SECONDS = 1.0
_MOST_UNAUTHENTICATED = 256
_REFUSALS_REPORTED = 100
_OUT = select.EPOLLOUT


class SocketServer:
    """Connects workers to a parameter server.

    All methods must be called by the thread that calls the parameter server.

    Parameters
    ----------
    server
        The parameter server; events of connections go into its ledger.
    host
        Address to listen on.
    vectors
        Format of gradients and parameters.
    """

    def __init__(
        self, server: ParameterServer, vectors: VectorFormat, host: str = "127.0.0.1"
    ) -> None:
        self._server = server
        self._vectors = vectors
        self._peers: dict[int, Peer] = {}
        self._workers: dict[int, Peer] = {}
        self._unauthenticated: dict[int, Peer] = {}  # the oldest first
        self._broken: list[tuple[Peer, str]] = []
        self._refusals = 0
        self._busy_waits = False
        self._may_busy_wait = may_busy_wait()
        self._next_sweep = time.monotonic() + _SWEEP_SECONDS
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        tcp = socket.create_server((host, 0), family=family, backlog=_MOST_UNAUTHENTICATED)
        local = socket.socket(socket.AF_UNIX)
        name = f"asgd-{secrets.token_hex(16)}"
        local.bind(f"\0{name}")
        local.listen(_MOST_UNAUTHENTICATED)
        self._listeners = {listener.fileno(): listener for listener in (tcp, local)}
        self._epoll = select.epoll()
        pool = BufferPool(vectors, bounded=not server.collects)
        self._long = LongVectors(pool, self._epoll)
        for listener in self._listeners.values():
            listener.setblocking(False)
            self._epoll.register(listener, select.EPOLLIN)
        port = tcp.getsockname()[1]
        self.endpoint = Endpoint(host, port, name, self._vectors, secrets.token_bytes(32))

    def fileno(self) -> int:
        """Return a descriptor that is readable when messages have arrived."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Close every connection and stop listening."""
        for peer in self._peers.values():
            peer.socket.close()
        for listener in self._listeners.values():
            listener.close()
        self._epoll.close()

    def serve(self, seconds: float, idle_seconds: float = 0.001) -> None:
        """Serve for about `seconds`, or until nothing arrives for `idle_seconds` seconds."""
        now = time.monotonic()
        end = now + seconds
        while now < end:
            events = self._wait(min(idle_seconds, end - now))
            for descriptor, event in events:
                self._handle(descriptor, event)
            now = time.monotonic()
            if not events:
                break
        if now >= self._next_sweep:
            self.sweep(now)

    def deliver(self, replies: Replies) -> None:
        """Send replies to the workers that wait on a socket; skip the others."""
        encoded: tuple[Array, Buffer] | None = None
        for worker, reply in replies:
            peer = self._workers.get(worker)
            if peer is None or not peer.asked:
                continue
            peer.asked = False
            if not isinstance(reply, Snapshot):
                self._dismiss(peer, reply)
            elif peer.keeps:
                buffer: Any = peer.buffer
                wire.copy_vector(buffer.vector, reply.parameters)
                data = buffer.frame
                wire.pack_snapshot(data, peer.snapshot_start, len(data) - HEADER.size, reply)
                self._send(peer, data)
            else:
                encoded = self._answer_long(peer, reply, encoded)
        if encoded is not None:
            self._long.give_back(encoded[1])
        if self._broken:
            self._close_broken()

    def sweep(self, now: float) -> None:
        """Close connections that have stalled for too long."""
        self._next_sweep = now + _SWEEP_SECONDS
        for listener in self._listeners.values():
            self._epoll.modify(listener, select.EPOLLIN)
        for peer in list(self._peers.values()):
            if peer.worker is not None and peer.frame is not None:
                self._server.note_arriving(peer.worker, now)
            if peer.deadline < now:
                if peer.worker is None:
                    reason = f"did not authenticate within {HANDSHAKE_SECONDS:.0f} s"
                else:
                    what = "read nothing" if peer.unsent else "sent no more of a frame"
                    reason = f"{what} for {SILENCE_SECONDS:.0f} s"
                self._broken.append((peer, reason))
        self._close_broken()

    def _wait(self, seconds: float) -> list[tuple[int, int]]:
        """Return the `epoll` events within `seconds`.

        In a fast run, waking a sleeping core takes longer than the next gradient. So if the last
        wait was short, busy-wait for a moment before sleeping, and yield the core to waiting
        workers between two polls.
        """
        began = time.monotonic()
        if self._busy_waits:
            while time.monotonic() - began < BUSY_WAIT_SECONDS:
                if events := self._epoll.poll(0):
                    return events
                os.sched_yield()
        events = self._epoll.poll(seconds)
        self._busy_waits = (
            self._may_busy_wait and bool(events) and time.monotonic() - began < BUSY_WAIT_SECONDS
        )
        return events

    def _handle(self, descriptor: int, event: int) -> None:
        peer = self._peers.get(descriptor)
        if peer is None:
            if descriptor in self._listeners:
                self._accept(self._listeners[descriptor])
            return
        try:
            if event & _OUT:
                self._flush(peer)
            if event != _OUT:
                self._read(peer)
        except BlockingIOError:
            pass
        except WireError as error:
            with suppress(OSError):
                peer.socket.send(wire.pack_text(wire.ERROR, str(error)))
            self._broken.append((peer, str(error)))
        except OSError as error:
            self._broken.append((peer, _reason(error)))
        if self._broken:
            self._close_broken()

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, address = listener.accept()
        except BlockingIOError:
            return
        except OSError:  # out of descriptors: accept again after the next sweep
            self._epoll.modify(listener, 0)
            return
        name = "local" if listener.family == socket.AF_UNIX else f"{address[0]}:{address[1]}"
        connection.setblocking(False)
        tune(connection)
        peer = Peer(connection, name, time.monotonic() + HANDSHAKE_SECONDS)
        self._peers[connection.fileno()] = peer
        self._epoll.register(connection, select.EPOLLIN)
        if not is_own(connection):
            if len(self._unauthenticated) >= _MOST_UNAUTHENTICATED:
                oldest = next(iter(self._unauthenticated.values()))
                self._broken.append((oldest, "too many newer connections before it authenticated"))
                self._close_broken()
            self._unauthenticated[connection.fileno()] = peer

    def _read(self, peer: Peer) -> None:
        count = peer.socket.recv_into(peer.window[peer.got :] if peer.got else peer.window)
        if not count:
            raise ConnectionResetError("closed by the other side")
        worker = peer.worker
        if worker is not None and count == peer.push_bytes and not peer.got and not peer.asked:
            # The usual case: exactly one whole gradient.
            start, sequence, version, epoch, seconds = wire.PUSH_FIELDS.unpack_from(peer.window)
            if start == peer.push_start:
                self._gradient(peer, worker, sequence, version, epoch, seconds)
                return
        peer.got += count
        frame = peer.frame
        if frame is None and peer.got >= HEADER.size:
            frame = peer.frame = peer.header()
            if peer.worker is not None and not peer.keeps:
                self._long.make_room(peer, frame)
        missing = HEADER.size + (frame.length if frame else 0) - peer.got
        if missing < 0:
            raise WireError("bytes after the end of a frame")
        if frame is None or missing:
            if peer.worker is not None and peer.socket.fileno() not in self._long.paused:
                peer.deadline = time.monotonic() + SILENCE_SECONDS
            return
        peer.got = 0
        peer.frame = None
        if peer.worker is None:
            self._handshake(peer, frame)
        else:
            peer.deadline = math.inf
            self._question(peer, frame)

    def _handshake(self, peer: Peer, frame: Frame) -> None:
        secret = self.endpoint.secret
        if frame.kind == wire.HELLO:
            peer.hello = bytes(peer.head[: HEADER.size + HELLO_BYTES])
            peer.nonce = secrets.token_bytes(wire.NONCE_BYTES)
            shown = wire.proof(secret, b"server", peer.hello, peer.nonce)
            peer.socket.send(wire.pack(wire.CHALLENGE, payload=peer.nonce + shown))
            peer.accepts = {wire.PROOF: range(wire.PROOF_BYTES, wire.PROOF_BYTES + 1)}
            return
        shown = bytes(peer.head[HEADER.size :][: wire.PROOF_BYTES])
        if not hmac.compare_digest(shown, wire.proof(secret, b"worker", peer.hello, peer.nonce)):
            raise WireError("does not know the secret of this run")
        _, dimension, itemsize, shared = wire.HELLO_PAYLOAD.unpack_from(peer.hello, HEADER.size)
        if (dimension, itemsize) != (self._vectors.dimension, self._vectors.numbers.itemsize):
            raise WireError(f"{dimension} numbers of {itemsize} bytes are not this run's format")
        worker = wire.parse(memoryview(peer.hello)).worker
        if not self._server.knows(worker):
            raise WireError(f"worker {worker} does not belong to this run")
        self._welcome(peer, worker, bool(shared))

    def _welcome(self, peer: Peer, worker: int, shared: bool) -> None:
        welcome, buffer = wire.pack(wire.WELCOME), None
        if not shared:
            peer.socket.send(welcome)
            if self._vectors.nbytes <= KEPT_BYTES:
                buffer = Buffer(self._vectors)
        elif peer.socket.family != socket.AF_UNIX:
            raise WireError("shared memory needs the local socket")
        else:
            descriptor = create_memory(self._vectors)
            try:
                buffer = Buffer(self._vectors, shared_vector(descriptor, self._vectors))
                socket.send_fds(peer.socket, [welcome], [descriptor])
            finally:
                os.close(descriptor)
        older = self._workers.get(worker)
        if older is not None:
            # The worker no longer reads answers on the old connection.
            self._broken.append((older, "replaced by a newer connection"))
        peer.shared = shared
        peer.open(worker, self._vectors, buffer)
        self._unauthenticated.pop(peer.socket.fileno(), None)
        self._workers[worker] = peer

    def _question(self, peer: Peer, frame: Frame) -> None:
        if frame.kind == wire.JOIN:
            peer.hold()
            self._server.note_joined(frame.worker, "shm" if peer.shared else "tcp")
            self.deliver(self._server.join(frame.worker, time.monotonic()))
            return
        misfit = None
        if frame.kind == wire.MISFIT:
            misfit = wire.misfit(peer.window[HEADER.size :][: frame.length])
        self._gradient(
            peer,
            frame.worker,
            frame.sequence,
            frame.version,
            frame.epoch,
            frame.compute_seconds,
            misfit,
        )

    def _gradient(
        self,
        peer: Peer,
        worker: int,
        sequence: int,
        version: int,
        epoch: int,
        compute_seconds: float,
        misfit: Array | None = None,
    ) -> None:
        peer.hold()
        buffer: Any = peer.buffer
        value = buffer.gradient() if misfit is None else misfit
        gradient = Gradient(worker, sequence, version, epoch, value, compute_seconds)
        self.deliver(self._server.receive(gradient, time.monotonic()))

    def _answer_long(
        self, peer: Peer, reply: Snapshot, encoded: tuple[Array, Buffer] | None
    ) -> tuple[Array, Buffer]:
        """Send a snapshot from the buffer of the gradient it answers, or from one already encoded.

        `encoded` has the parameters that were encoded last, and their buffer; the same is returned
        for this snapshot. The caller uses the buffer until it has sent every reply.
        """
        if encoded is None or encoded[0] is not reply.parameters:
            if encoded is not None:
                self._long.give_back(encoded[1])
            encoded = reply.parameters, self._long.buffer_of(peer)
            wire.copy_vector(encoded[1].vector, reply.parameters)
        elif peer.buffer is not None:
            self._long.give_back(peer.buffer)
        peer.buffer = encoded[1]
        peer.buffer.users += 1
        wire.pack_snapshot(peer.answer, peer.snapshot_start, self._vectors.nbytes, reply)
        self._send(peer, peer.answer, peer.buffer.frame[HEADER.size :])
        return encoded

    def _dismiss(self, peer: Peer, reply: Stop) -> None:
        peer.stopped = True
        self._send(peer, memoryview(wire.pack_text(wire.STOP, reply.reason)))

    def _send(self, peer: Peer, data: memoryview, payload: memoryview | None = None) -> None:
        try:
            if payload is None:
                sent = peer.socket.send(data)
                if sent == len(data) and peer.keeps and not peer.got:  # the usual case
                    peer.window = peer.own
                    return
            else:
                sent = peer.socket.sendmsg((data, payload))
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._broken.append((peer, _reason(error)))
            return
        peer.unsent = after((data, payload or b""), sent)
        if not peer.unsent:
            self._answered(peer)
            return
        peer.deadline = time.monotonic() + SILENCE_SECONDS
        self._epoll.modify(peer.socket, select.EPOLLIN | select.EPOLLOUT)

    def _flush(self, peer: Peer) -> None:
        peer.unsent = after(peer.unsent, peer.socket.sendmsg(peer.unsent))
        peer.deadline = time.monotonic() + SILENCE_SECONDS
        if not peer.unsent:
            peer.deadline = math.inf
            self._epoll.modify(peer.socket, select.EPOLLIN)
            self._answered(peer)

    def _answered(self, peer: Peer) -> None:
        """Receive the next request; release the memory for a long vector."""
        if not peer.keeps and peer.buffer is not None:
            buffer, peer.buffer = peer.buffer, None
            self._long.give_back(buffer)
        peer.listen()

    def _close_broken(self) -> None:
        """Close broken connections; as this creates replies, call it outside loops over replies."""
        while self._broken:
            peer, reason = self._broken.pop()
            descriptor = peer.socket.fileno()
            if self._peers.pop(descriptor, None) is None:
                continue
            self._unauthenticated.pop(descriptor, None)
            peer.socket.close()
            self._long.leave(peer, descriptor)
            worker = peer.worker
            if worker is None:
                self._refused(peer.name, reason)
            elif not peer.stopped:
                self._lost(peer, worker, reason)

    def _lost(self, peer: Peer, worker: int, reason: str) -> None:
        self._server.ledger.event("connection_lost", worker=worker, peer=peer.name, reason=reason)
        if self._workers[worker] is peer:
            del self._workers[worker]
            self.deliver(self._server.leave(worker, time.monotonic()))

    def _refused(self, name: str, reason: str) -> None:
        self._refusals += 1
        if self._refusals <= _REFUSALS_REPORTED:
            self._server.ledger.event("connection_refused", peer=name, reason=reason)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
