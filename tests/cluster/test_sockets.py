"""The data plane: equal runs over every transport, and defence against strangers and faults."""

from __future__ import annotations

import math
import os
import select
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd.draws import WorkerDraws
from asgd.problems.make import make_problem
from asgd.problems.plugin import PluginProblem
from asgd.streams import stream
from cluster.core.messages import Snapshot, Stop
from cluster.sockets import wire
from cluster.sockets.connection import Endpoint, SocketConnection
from cluster.sockets.wire import HEADER, WireError
from cluster.transport import ServerGoneError, retry
from tests.support.faults import replay
from tests.support.lines import Line, answer, configure

ROOT = Path(__file__).parents[2]
SOFTMAX = {"kind": "softmax"}

transports = pytest.mark.parametrize("transport", ["tcp", "shm"])


@transports
def test_one_worker_is_serial_sgd_to_the_last_bit(transport: str) -> None:
    config = configure(1, updates=150, problem=SOFTMAX)
    with Line(config, transport) as line:
        line.work(0)
        record = line.finish(1)
        assert line.replies == {0: Stop("finished")}
    problem = make_problem(config)
    draws = WorkerDraws(config, problem)
    x = problem.initial_point(stream(4, "initial"))
    for update in range(150):
        x = x - 0.05 * problem.gradient(x, draws.batch(0, update, 2))
    np.testing.assert_array_equal(line.server.parameters, x)
    assert record.trace["staleness"].tolist() == [0] * 150
    joined = [{key: event[key] for key in event if key != "time"} for event in record.events]
    expected = {"event": "worker_joined", "worker": 0, "transport": transport, "update": 0}
    assert joined == [expected]


@transports
@pytest.mark.parametrize("schedule", ["free", "uniform"])
def test_many_workers_equal_the_replay_of_their_trace(transport: str, schedule: str) -> None:
    config = configure(4, updates=600, schedule=schedule)
    with Line(config, transport) as line:
        for worker in range(4):
            line.work(worker)
        record = line.finish(4)
        assert set(line.replies.values()) == {Stop("finished")}
    assert record.trace["update"].tolist() == list(range(600))
    points = replay(config, line.problem, line.initial, record)
    np.testing.assert_array_equal(line.server.parameters, points[-1])
    for worker in range(4):
        own = record.trace["sequence"][record.trace["worker"] == worker]
        assert own.tolist() == list(range(len(own)))
    if schedule == "uniform":
        drawn = stream(4, "schedule").integers(4, size=600)
        np.testing.assert_array_equal(record.trace["worker"], drawn)


@transports
def test_float32_rounds_on_the_wire_only(transport: str) -> None:
    config = configure(1, updates=150, problem=SOFTMAX)
    with Line(config, transport, "float32") as line:
        line.work(0)
        line.finish(1)
    problem = make_problem(config)
    draws = WorkerDraws(config, problem)
    x = problem.initial_point(stream(4, "initial"))
    for update in range(150):
        read = x.astype(np.float32).astype(float)
        gradient = problem.gradient(read, draws.batch(0, update, 2))
        x = x - 0.05 * gradient.astype(np.float32).astype(float)
    np.testing.assert_array_equal(line.server.parameters, x)


def test_float32_changes_the_loss_by_far_less_than_another_seed_does() -> None:
    def final_loss(seed: int, dtype: str) -> float:
        # Under the uniform schedule the seed alone decides the order of updates.
        config = configure(3, updates=150, problem=SOFTMAX, schedule="uniform")
        config = msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, seed=seed))
        with Line(config, "shm", dtype) as line:
            for worker in range(3):
                line.work(worker)
            line.finish(3)
        return float(line.problem.loss(line.server.parameters))

    exact = [final_loss(seed, "float64") for seed in range(4)]
    rounded = [final_loss(seed, "float32") for seed in range(2)]
    assert 0.0 < np.abs(np.subtract(rounded, exact[:2])).max() < 1e-4 * np.std(exact, ddof=1)


@transports
def test_repeated_gradient_is_applied_once(transport: str) -> None:
    with Line(configure(1, updates=100), transport) as line:
        first, snapshot = line.joined(0)
        gradient = answer(snapshot, 0, np.ones(1))
        line.meanwhile(lambda: first.push(gradient))
        repeated = line.meanwhile(lambda: first.push(gradient))
        assert (line.server.version, repeated.version, repeated.sequence) == (1, 1, 1)
        # A worker has lost its connection and repeats its gradient over a new one, before the
        # server knows that the old one is dead.
        second = line.connect(0)
        repeated = line.meanwhile(lambda: second.push(gradient))
        assert (line.server.version, repeated.version, repeated.sequence) == (1, 1, 1)
        with pytest.raises(ConnectionError):
            line.meanwhile(lambda: first.push(gradient))
        assert line.events("connection_lost")[0]["reason"] == "replaced by a newer connection"


@transports
def test_a_run_continues_without_a_worker_that_vanished(transport: str) -> None:
    # Under the uniform schedule the others would wait for it for ever.
    config = configure(3, updates=300, schedule="uniform")
    with Line(config, transport) as line:
        line.work(0)
        line.work(1)
        vanishing = line.connect(2)
        line.spawn(2, lambda: vanishing.join(2))
        line.serve_until(lambda: 2 in line.replies)
        vanishing.close()
        record = line.finish(3)
    trace = record.trace
    assert set(trace["worker"].tolist()) == {0, 1}
    assert trace["update"].tolist() == list(range(300))
    lost = [
        event for event in record.events if event["event"] in ("connection_lost", "gradient_lost")
    ]
    assert [event["event"] for event in lost] == ["connection_lost", "gradient_lost"]
    assert [event["worker"] for event in lost] == [2, 2]


@transports
def test_a_worker_that_returns_continues(transport: str) -> None:
    with Line(configure(1, updates=100), transport) as line:
        connection, snapshot = line.joined(0)
        line.meanwhile(lambda: connection.push(answer(snapshot, 0, np.ones(1))))
        connection.close()
        line.serve_until(lambda: line.events("connection_lost"))
        _, snapshot = line.joined(0)
        assert (snapshot.version, snapshot.sequence) == (1, 2)


@transports
def test_killed_process_is_noticed_at_once(transport: str) -> None:
    code = (
        "import sys\n"
        "from cluster.sockets.connection import Endpoint, SocketConnection\n"
        "from cluster.sockets.wire import VectorFormat\n"
        "host, port, local, secret, shared = sys.argv[1:]\n"
        "end = Endpoint(host, int(port), local, VectorFormat(1), bytes.fromhex(secret))\n"
        "connection = SocketConnection(end, 0, shared == 'True')\n"
        "connection.join(0)\n"
        "input()\n"
    )
    with Line(configure(1, updates=100), transport) as line:
        end = line.sockets.endpoint
        arguments = [end.host, str(end.port), end.local, end.secret.hex(), str(line.shared)]
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
        )
        try:
            line.serve_until(lambda: line.server.status(0.0).workers[0].present)
        finally:
            process.kill()
            process.communicate()
        line.serve_until(lambda: line.events("connection_lost"))
        assert not line.server.status(0.0).workers[0].present


@transports
def test_misshapen_and_infinite_gradients_are_rejected(transport: str) -> None:
    with Line(configure(1, updates=100, problem=SOFTMAX), transport, "float32") as line:
        connection, snapshot = line.joined(0)
        for value in (np.zeros(3), np.zeros((2, 650)), np.full(650, 1e300)):
            snapshot = line.meanwhile(
                lambda snapshot=snapshot, value=value: connection.push(answer(snapshot, 0, value))
            )
        assert (snapshot.version, snapshot.sequence) == (0, 3)
        reasons = [event["reason"] for event in line.events("gradient_rejected")]
        assert reasons == [
            "shape (3,), expected (650,)",
            "shape (2, 650), expected (650,)",
            "not finite",
        ]


@transports
def test_the_end_of_a_run_reaches_waiting_and_computing_workers(transport: str) -> None:
    config = configure(2, updates=100)
    with Line(config, transport) as line:
        waiting, computing = line.connect(0), line.connect(1)
        line.spawn(0, lambda: waiting.join(0))
        line.sockets.serve(0.05)
        line.sockets.deliver(line.server.stop("interrupted"))
        line.spawn(1, lambda: computing.join(1))
        line.finish(2)
        assert set(line.replies.values()) == {Stop("interrupted")}
        waiting.close()
        line.sockets.serve(0.05)
        assert not line.events("connection_lost")


@transports
def test_a_snapshot_is_read_only_and_later_updates_do_not_change_it(transport: str) -> None:
    with Line(configure(2, updates=100), transport) as line:
        connections = [line.connect(worker) for worker in range(2)]
        for worker, connection in enumerate(connections):
            line.spawn(worker, lambda w=worker, c=connection: c.join(w))
        line.serve_until(lambda: len(line.replies) == 2)
        first, second = line.replies[0], line.replies[1]
        assert isinstance(first, Snapshot)
        line.meanwhile(lambda: connections[1].push(answer(second, 1, np.ones(1))))
        np.testing.assert_array_equal(first.parameters, line.initial)
        with pytest.raises(ValueError, match="read-only"):
            first.parameters[0] = 0.0


def test_idle_server_sleeps() -> None:
    with Line(configure(1, updates=100), "tcp") as line:
        line.joined(0)
        before = time.process_time()
        line.sockets.serve(0.5, 0.5)
        assert time.process_time() - before < 0.1


@pytest.mark.parametrize("brisk", [False, True])
def test_waiting_worker_sleeps(brisk: bool) -> None:
    with Line(configure(1, updates=100), "tcp") as line:
        connection, snapshot = line.joined(0)
        connection._busy_waits = brisk
        before = time.process_time()
        line.spawn(0, lambda: connection.push(answer(snapshot, 0, np.ones(1))))
        time.sleep(0.5)
        assert time.process_time() - before < 0.1
        line.serve_until(lambda: 0 in line.replies)
        assert line.replies[0].version == 1


def stranger(line: Line, local: bool = False) -> socket.socket:
    end = line.sockets.endpoint
    if local:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"\0{end.local}")
    else:
        connection = socket.create_connection((end.host, end.port))
    connection.settimeout(10)
    line.opened.append(connection)
    line.sockets.serve(0.05)
    return connection


def refused(line: Line, connection: socket.socket) -> str:
    """Return why the server closed a stranger's connection."""
    events: list[dict[str, Any]] = []
    line.serve_until(lambda: events.extend(line.events("connection_refused")) or events)
    with suppress(ConnectionResetError):
        while connection.recv(4096):
            pass
    return str(events[0]["reason"])


def hello(line: Line, worker: int = 0, shared: bool = False) -> bytes:
    payload = line.sockets.endpoint.vectors.hello(bytes(32), shared)
    return wire.pack(wire.HELLO, worker, payload)


@pytest.mark.parametrize("local", [False, True])
def test_bytes_of_a_stranger_are_refused(local: bool) -> None:
    with Line(configure(1, updates=100), "tcp") as line:
        for data, reason in [
            (b"GET / HTTP/1.1\r\nHost: " + b"x" * 100, "not a frame of this protocol"),
            (wire.pack(wire.JOIN), "a frame of kind 5 and 0 bytes is not allowed now"),
            (hello(line) + b"x" * 64, "not a frame of this protocol"),
            (
                wire.pack(wire.HELLO, 0, bytes(99)),
                "a frame of kind 1 and 99 bytes is not allowed now",
            ),
        ]:
            connection = stranger(line, local)
            connection.sendall(data)
            assert refused(line, connection) == reason
        line.joined(0)


def test_stranger_cannot_guess_or_replay_a_proof() -> None:
    with Line(configure(1, updates=100), "tcp") as line:
        connection = stranger(line)
        connection.sendall(hello(line))
        line.sockets.serve(0.05)
        challenge = connection.recv(4096)
        # Send back the server's own proof, the only one that a stranger has seen.
        connection.sendall(wire.pack(wire.PROOF, payload=challenge[-wire.PROOF_BYTES :]))
        assert refused(line, connection) == "does not know the secret of this run"
        assert not line.server.status(0.0).workers[0].present


def test_a_recorded_handshake_of_a_worker_cannot_be_replayed() -> None:
    """The stranger has recorded everything that a worker sent."""
    with Line(configure(1, updates=100), "tcp") as line:
        question, secret = hello(line), line.sockets.endpoint.secret
        worker = stranger(line)
        worker.sendall(question)
        line.sockets.serve(0.05)
        challenge = worker.recv(4096)
        nonce = challenge[HEADER.size :][: wire.NONCE_BYTES]
        answer = wire.pack(wire.PROOF, 0, wire.proof(secret, b"worker", question, nonce))
        worker.sendall(answer)
        line.sockets.serve(0.05)
        assert wire.parse(bytearray(worker.recv(4096))).kind == wire.WELCOME

        replaying = stranger(line)
        replaying.sendall(question)
        line.sockets.serve(0.05)
        assert replaying.recv(4096) != challenge
        replaying.sendall(answer)
        assert refused(line, replaying) == "does not know the secret of this run"


class Impostor:
    """Listens in place of the server, and forwards a handshake or answers it."""

    def __init__(self, end: Endpoint) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10)
        self.endpoint = replace(end, port=self._listener.getsockname()[1])
        self._server = end

    def __enter__(self) -> Impostor:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()

    def read_along(self) -> list[bytes]:
        """Forward the frames of one handshake between worker and server; return the server's."""
        frames = []
        address = (self._server.host, self._server.port)
        with self._listener.accept()[0] as worker, socket.create_connection(address) as server:
            for question, answer in [(HELLO, CHALLENGE), (PROOF, HEADER.size)]:
                server.sendall(worker.recv(question, socket.MSG_WAITALL))
                frames.append(server.recv(answer, socket.MSG_WAITALL))
                worker.sendall(frames[-1])
        return frames

    def answer(self, frames: list[bytes]) -> bytes:
        """Answer a worker with these frames; return what it sends after the first."""
        with self._listener.accept()[0] as worker:
            worker.settimeout(10)
            worker.recv(HELLO, socket.MSG_WAITALL)
            worker.sendall(frames[0])
            more = worker.recv(PROOF, socket.MSG_WAITALL)
            with suppress(OSError):
                worker.sendall(frames[1])
        return more


HELLO = HEADER.size + wire.HELLO_PAYLOAD.size
CHALLENGE = HEADER.size + wire.NONCE_BYTES + wire.PROOF_BYTES
PROOF = HEADER.size + wire.PROOF_BYTES


def check_is_refused_by_a_worker(line: Line, impostor: Impostor, frames: list[bytes]) -> None:
    """Assert that a worker refuses a server with these frames, and sends it no proof."""
    line.spawn(0, lambda: impostor.answer(frames))
    reason = "^the server does not know the secret of this run$"
    with pytest.raises(WireError, match=reason):
        line.opened.append(SocketConnection(impostor.endpoint, 0))
    line.serve_until(lambda: 0 in line.replies)
    assert line.replies.pop(0) == b""


def test_worker_refuses_a_server_without_the_secret() -> None:
    with (
        Line(configure(1, updates=100), "tcp") as line,
        Impostor(line.sockets.endpoint) as impostor,
    ):
        guessed = wire.pack(wire.CHALLENGE, payload=bytes(wire.NONCE_BYTES + wire.PROOF_BYTES))
        check_is_refused_by_a_worker(line, impostor, [guessed, wire.pack(wire.WELCOME)])


def test_a_recorded_handshake_of_the_server_cannot_be_replayed() -> None:
    with (
        Line(configure(1, updates=100), "tcp") as line,
        Impostor(line.sockets.endpoint) as impostor,
    ):
        line.spawn(1, impostor.read_along)
        line.opened.append(line.meanwhile(lambda: SocketConnection(impostor.endpoint, 0)))
        line.serve_until(lambda: 1 in line.replies)
        check_is_refused_by_a_worker(line, impostor, line.replies[1])


def test_silent_stranger_is_closed_in_time() -> None:
    with Line(configure(1, updates=100), "tcp") as line:
        connection = stranger(line)
        connection.sendall(b"ASG")
        line.sockets.serve(0.05)
        line.sockets.sweep(time.monotonic() + 9.0)
        assert not line.events("connection_refused")
        line.sockets.sweep(time.monotonic() + 11.0)
        assert refused(line, connection) == "did not authenticate within 10 s"


def test_many_strangers_neither_exhaust_the_server_nor_fill_the_ledger() -> None:
    with Line(configure(1, updates=100), "tcp") as line:
        for _ in range(150):
            connection = stranger(line)
            connection.sendall(b"x" * 64)
            line.sockets.serve(0.01)
            connection.close()
        assert len(line.events("connection_refused")) == 100
        line.joined(0)


@transports
def test_a_flood_of_idle_strangers_excludes_no_worker(transport: str) -> None:
    """Above the limit, the server closes the oldest connections of strangers, not of workers."""
    with Line(configure(1, updates=100), transport) as line:
        connection, snapshot = line.joined(0)
        line.sockets._next_sweep = math.inf  # on a busy machine, strangers would be too silent
        strangers = [stranger(line) for _ in range(300)]
        line.meanwhile(lambda: connection.push(answer(snapshot, 0, np.ones(1))))
        assert line.server.version == 1
        line.joined(0)
        closed = [bool(select.select([one], [], [], 0)[0]) for one in strangers]
        dropped = 300 - 256 + (transport == "tcp")  # the new worker was one at first
        assert closed == [True] * dropped + [False] * (300 - dropped)
        (*_, last) = line.events("connection_refused")
        assert last["reason"] == "too many newer connections before it authenticated"


FLOOD = """
import os, socket, sys

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
opened = []
for _ in range(400):
    opened.append(socket.socket(socket.AF_UNIX))
    opened[-1].connect("\\0" + sys.argv[1])
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can connect as another user")
def test_other_users_do_not_crowd_out_workers_on_the_local_socket() -> None:
    with Line(configure(1, updates=100), "shm") as line:
        early = stranger(line, local=True)
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", FLOOD, line.sockets.endpoint.local],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        with process:
            line.serve_until(lambda: select.select([process.stdout], [], [], 0)[0])
            line.sockets.serve(0.1)
            refusals = line.events("connection_refused")
            assert refusals
            early.sendall(hello(line, shared=True))
            line.sockets.serve(0.05)
            assert wire.parse(bytearray(early.recv(CHALLENGE))).kind == wire.CHALLENGE
            line.joined(0)


def test_dial_is_repeated_until_the_server_can_be_reached() -> None:
    with Line(configure(1, updates=100), "tcp") as line:
        with socket.create_server(("127.0.0.1", 0)) as free:
            nowhere = replace(line.sockets.endpoint, port=free.getsockname()[1])
        ends = [nowhere] * 3 + [line.sockets.endpoint]
        connection = line.meanwhile(
            lambda: retry(lambda: SocketConnection(ends.pop(0), 0), [0.0] * 3)
        )
        line.opened.append(connection)
        assert isinstance(line.meanwhile(lambda: connection.join(0)), Snapshot)

        ends = [nowhere] * 5
        with pytest.raises(ConnectionRefusedError):
            retry(lambda: SocketConnection(ends.pop(), 0), [0.0] * 3)
        assert len(ends) == 1


def test_server_that_is_dead_is_not_dialled_again() -> None:
    dials = []

    def dial() -> SocketConnection:
        dials.append(1)
        raise ServerGoneError("the parameter server is gone")

    with pytest.raises(ServerGoneError):
        retry(dial, [0.0] * 3)
    assert len(dials) == 1


def test_workers_that_are_none_of_the_run_are_refused() -> None:
    """They know the secret, but the trace has no place for their gradients."""
    with Line(configure(2, updates=100), "tcp") as line:
        for worker in (2, 7, 2**32 - 1):
            with pytest.raises(WireError, match=f"worker {worker} does not belong to this run"):
                line.connect(worker)
        line.server.admit(2)
        line.connect(2)


@transports
@pytest.mark.parametrize("seconds", [np.nan, np.inf, -np.inf, -1e-9])
def test_impossible_compute_time_is_refused(transport: str, seconds: float) -> None:
    """It would go into the trace, and from there into every mean of compute times."""
    with Line(configure(1, updates=100), transport) as line:
        connection, snapshot = line.joined(0)
        sent = answer(snapshot, 0, np.ones(1))
        gradient = msgspec.structs.replace(sent, compute_seconds=seconds)
        after = line.meanwhile(lambda: connection.push(gradient))
        assert (after.version, after.sequence) == (0, 1)
        (event,) = line.events("gradient_rejected")
        assert event["reason"] == f"compute_seconds {seconds}, expected a time"


def test_worker_with_another_dimension_is_refused() -> None:
    with Line(configure(1, updates=100), "tcp") as line:
        end = line.sockets.endpoint
        for vectors in (wire.VectorFormat(2), wire.VectorFormat(1, "float32")):
            wrong = type(end)(end.host, end.port, end.local, vectors, end.secret)
            with pytest.raises(WireError, match="are not this run's format"):
                line.meanwhile(lambda wrong=wrong: SocketConnection(wrong, 0))
        line.joined(0)


@transports
def test_a_worker_that_breaks_the_protocol_is_closed_and_the_run_continues(transport: str) -> None:
    size = 0 if transport == "shm" else 8
    push = bytearray(64 + size)
    gradient = answer(Snapshot(np.zeros(1), 0, 0, 0, 2), 0, np.ones(1))
    wire.pack_push(push, wire.push_start(0, size), gradient)
    long, foreign = bytearray(push), bytearray(push)
    long[16:24] = (2**40).to_bytes(8, "little")
    foreign[8] = 9
    for data, reason in [
        (b"noise" * 20, "not a frame of this protocol"),
        (long, f"a frame of kind 6 and {2**40} bytes is not allowed now"),
        (foreign, "worker 9 on the connection of worker 0"),
        (push + b"x", "bytes after the end of a frame"),
        (wire.pack(wire.HELLO, 0, bytes(42)), "a frame of kind 1 and 42 bytes is not allowed now"),
    ]:
        # Under the uniform schedule the other worker cannot end the run before.
        with Line(configure(2, updates=100, schedule="uniform"), transport) as line:
            connection = line.connect(0)
            line.work(1)
            line.meanwhile(lambda connection=connection: connection.join(0))
            connection._socket.sendall(data)
            line.serve_until(lambda: line.server.stopping)
            record = line.server.drain()
            lost = [e for e in record.events if e["event"] == "connection_lost"]
            assert [(e["worker"], e["reason"]) for e in lost] == [(0, reason)]
            assert record.trace["update"].tolist() == list(range(100))
            assert set(record.trace["worker"].tolist()) == {1}


def test_a_held_gradient_cannot_be_overwritten() -> None:
    config = configure(2, updates=100, schedule="uniform")
    first_turn = int(stream(4, "schedule").integers(2))
    early = 1 - first_turn
    with Line(config, "tcp") as line:
        connections = {worker: line.connect(worker) for worker in range(2)}
        for worker in range(2):
            line.spawn(worker, lambda w=worker: connections[w].join(w))
        line.serve_until(lambda: len(line.replies) == 2)
        snapshots = {worker: line.replies.pop(worker) for worker in range(2)}
        data = bytearray(72)
        wire.pack_push(data, wire.push_start(early, 8), answer(snapshots[early], early, np.ones(1)))
        data[64:] = np.array([2.0]).tobytes()
        connections[early]._socket.sendall(data)
        line.sockets.serve(0.05)
        assert line.server.version == 0
        data[64:] = np.array([1000.0]).tobytes()
        connections[early]._socket.sendall(data)
        lost: list[dict[str, Any]] = []
        line.serve_until(lambda: lost.extend(line.events("connection_lost")) or lost)
        assert lost[0]["reason"] == "a request before the answer to the last one"
        snapshot = snapshots[first_turn]
        while line.server.version < 2 or early not in line.server.drain().trace["worker"]:
            gradient = answer(snapshot, first_turn, np.zeros(1))
            snapshot = line.meanwhile(lambda g=gradient: connections[first_turn].push(g))
        np.testing.assert_array_equal(line.server.parameters, line.initial - 0.05 * 2.0)


@transports
def test_no_answer_comes_before_the_question(transport: str) -> None:
    """A worker that has returned would take it for the answer to its next question."""
    config = configure(2, updates=100, schedule="uniform")
    first_turn = int(stream(4, "schedule").integers(2))
    early = 1 - first_turn
    with Line(config, transport) as line:
        connections = {worker: line.connect(worker) for worker in range(2)}
        for worker in range(2):
            line.spawn(worker, lambda w=worker: connections[w].join(w))
        line.serve_until(lambda: len(line.replies) == 2)
        snapshots = {worker: line.replies.pop(worker) for worker in range(2)}
        held = answer(snapshots[early], early, np.ones(1))
        line.spawn(early, lambda: connections[early].push(held))
        line.sockets.serve(0.05)
        again = line.connect(early)  # a new connection, from its restarted process
        snapshot = snapshots[first_turn]
        while early not in line.server.drain().trace["worker"]:
            gradient = answer(snapshot, first_turn, np.zeros(1))
            snapshot = line.meanwhile(lambda g=gradient: connections[first_turn].push(g))
        assert not select.select([again._socket], [], [], 0)[0]
        asked = line.meanwhile(lambda: again.join(early))
        assert (asked.version, asked.sequence) == (line.server.version, 2)  # nobody got number 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 71), max_size=6, unique=True))
def test_torn_frames_are_put_together(cuts: list[int]) -> None:
    with Line(configure(1, updates=100), "tcp") as line:
        connection, snapshot = line.joined(0)
        data = bytearray(72)
        wire.pack_push(data, wire.push_start(0, 8), answer(snapshot, 0, np.ones(1)))
        data[64:] = np.array([2.0]).tobytes()
        edges = [0, *sorted(cuts), 72]
        for start, stop in pairwise(edges):
            assert line.server.version == 0
            connection._socket.sendall(data[start:stop])
            line.sockets.serve(0.01)
        line.serve_until(lambda: line.server.version == 1)
        np.testing.assert_array_equal(line.server.parameters, line.initial - 0.05 * 2.0)
        connection.close()


def torn_answer(line: Line, brisk: bool, first: bytes, rest: bytes) -> Any:
    """Return what a worker receives from an answer in two parts; the second may be empty."""
    connection, snapshot = line.joined(0)
    line.opened.append(connection._socket)
    ours, theirs = socket.socketpair()
    connection._socket, connection._busy_waits = theirs, brisk
    with ours:
        ours.sendall(first)  # arrives before the worker looks or waits
        line.spawn(0, lambda: connection.push(answer(snapshot, 0, np.ones(1))))
        ours.recv(72, socket.MSG_WAITALL)
        line.serve_until(lambda: not select.select([theirs], [], [], 0)[0])
        ours.sendall(rest)
    line.serve_until(lambda: 0 in line.replies)
    return line.replies[0]


WHOLE = bytearray(72)
wire.pack_snapshot(WHOLE, wire.snapshot_start(0), 8, Snapshot(np.zeros(1), 7, 1, 5, 3))
WHOLE[64:] = np.array([2.5]).tobytes()


@pytest.mark.parametrize("brisk", [False, True])
@pytest.mark.parametrize("cut", [1, 63, 64, 65, 71])
def test_torn_answers_are_put_together(cut: int, brisk: bool) -> None:
    with Line(configure(1, updates=100), "tcp") as line:
        got = torn_answer(line, brisk, WHOLE[:cut], WHOLE[cut:])
        assert (got.version, got.epoch, got.sequence, got.batch_size) == (7, 1, 5, 3)
        np.testing.assert_array_equal(got.parameters, [2.5])


@pytest.mark.parametrize("brisk", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 63, 64, 71])
def test_a_server_that_dies_during_its_answer_is_a_connection_error(cut: int, brisk: bool) -> None:
    with Line(configure(1, updates=100), "tcp") as line:
        got = torn_answer(line, brisk, WHOLE[:cut], b"")
        assert isinstance(got, ConnectionError)


def test_a_worker_that_stops_inside_a_frame_is_closed_in_time() -> None:
    with Line(configure(1, updates=100), "tcp") as line:
        connection, _ = line.joined(0)
        connection._socket.sendall(b"ASGD")
        line.sockets.serve(0.05)
        line.sockets.sweep(time.monotonic() + 29.0)
        assert not line.events("connection_lost")
        line.sockets.sweep(time.monotonic() + 31.0)
        assert line.events("connection_lost")[0]["reason"] == "sent no more of a frame for 30 s"


class Wide:
    """f(x) = |x|^2 / 2 in so many dimensions that a snapshot does not fit into a socket buffer."""

    dim = 2_000_000
    n_samples = 2

    def initial_point(self, rng: np.random.Generator) -> Any:
        return np.ones(self.dim)

    def loss(self, x: Any) -> float:
        return float(x @ x / 2)

    def gradient(self, x: Any, indices: Any) -> Any:
        return np.array(x)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_slow_reader_delays_no_worker_and_gets_one_version(dtype: str) -> None:
    wide = PluginProblem(Wide(), np.dtype(float), rowwise=False)
    with Line(configure(2, updates=10), "tcp", dtype, wide) as line:
        slow = line.connect(0)
        slow._socket.sendall(wire.pack(wire.JOIN, 0))
        line.work(1)
        line.serve_until(lambda: line.server.version >= 5)
        line.spawn(0, slow._receive)
        line.finish(2)
        np.testing.assert_array_equal(slow._vector, 1.0)


def test_worker_that_does_not_read_is_closed_in_time() -> None:
    wide = PluginProblem(Wide(), np.dtype(float), rowwise=False)
    with Line(configure(1, updates=20), "tcp", problem=wide) as line:
        slow = line.connect(0)
        slow._socket.sendall(wire.pack(wire.JOIN, 0))
        line.sockets.serve(0.1)
        line.sockets.sweep(time.monotonic() + 29.0)
        assert not line.events("connection_lost")
        line.sockets.sweep(time.monotonic() + 31.0)
        assert line.events("connection_lost")[0]["reason"] == "read nothing for 30 s"


def test_a_dead_server_is_a_connection_error() -> None:
    with Line(configure(1, updates=100), "tcp") as line:
        connection, snapshot = line.joined(0)
        end = line.sockets.endpoint
    with pytest.raises(ConnectionError):
        connection.push(answer(snapshot, 0, np.ones(1)))
    for shared in (False, True):
        with pytest.raises(ConnectionError):
            SocketConnection(end, 0, shared)


def test_secret_is_not_printed() -> None:
    with Line(configure(1, updates=100), "tcp") as line:
        assert str(line.sockets.endpoint.secret) not in repr(line.sockets.endpoint)
