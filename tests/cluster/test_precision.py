"""Runs in float32: the same values as in a replay, half the bytes, and limited memory."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asgd.config.make import make_config
from asgd.divergence import NOT_FINITE
from asgd.errors import InputError, RunFailedError
from asgd.problems.make import make_problem
from asgd.progress import Progress
from asgd.rules.make import make_rule
from asgd.rundir.checkpoint import CHECKPOINTS, paths
from asgd.rundir.reader import read_run
from asgd.simulation.replay import replay as replay_of
from asgd.simulation.simulate import simulate
from cluster import memory, resume, run
from cluster.core.worker import Worker
from cluster.sockets import buffers, wire
from cluster.storage.verify import verify
from tests.support.faults import replay
from tests.support.invariants import check_gradients
from tests.support.lines import Line, answer, configure
from tests.support.processes import actor_processes

transports = pytest.mark.parametrize("transport", ["tcp", "shm"])
# In float32, a vector of the second size is too long for a connection's own buffer.
dims = pytest.mark.parametrize("dim", [3, 20_000])


def single(dim: int, dtype: str = "float32") -> dict[str, Any]:
    options = {"dim": dim, "dtype": dtype}
    return {"kind": "tests.support.plugins:single", "options": options}


@transports
@dims
@pytest.mark.parametrize(
    "cluster",
    [{}, {"schedule": "uniform"}, {"mode": "sync"}, {"wire_dtype": "bfloat16", "mode": "sync"}],
)
def test_a_run_equals_the_replay_of_its_trace_to_the_last_bit(
    transport: str, dim: int, cluster: dict[str, str]
) -> None:
    config = configure(3, 150, single(dim), **cluster)
    with Line(config, transport, config.cluster.wire_dtype) as line:
        for worker in range(3):
            line.work(worker)
        record = line.finish(3)
    points = replay(config, line.problem, line.initial, record)
    assert line.server.parameters.dtype == points[-1].dtype == np.float32
    np.testing.assert_array_equal(line.server.parameters, points[-1])
    assert len(record.trace["update"]) == 150


def test_one_worker_equals_the_simulation_to_the_last_bit(tmp_path: Path) -> None:
    config = configure(1, 150, single(1000))
    simulated = read_run(simulate(config, tmp_path / "run"))
    with Line(config, "shm") as line:
        line.work(0)
        record = line.finish(1)
    np.testing.assert_array_equal(line.server.parameters, simulated.parameters)
    norms = simulated.trace["gradient_norm"].to_numpy()
    np.testing.assert_array_equal(record.trace["gradient_norm"], norms)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_the_rounding_of_messages_is_simulated_and_replayed(
    tmp_path: Path, transport: str, wire_dtype: str, dtype: str
) -> None:
    config = configure(1, 150, single(1000, dtype), wire_dtype=wire_dtype)
    simulated = read_run(simulate(config, tmp_path / "run"))
    with Line(config, transport, wire_dtype) as line:
        line.work(0)
        record = line.finish(1)
    np.testing.assert_array_equal(line.server.parameters, simulated.parameters)
    norms = simulated.trace["gradient_norm"].to_numpy()
    np.testing.assert_array_equal(record.trace["gradient_norm"], norms)
    assert verify(simulated).findings == []
    plain = read_run(simulate(configure(1, 150, single(1000, dtype)), tmp_path / "plain"))
    difference = np.abs(plain.parameters - simulated.parameters).max()
    unit = {"float32": 2.0**-24, "bfloat16": 2.0**-8}[wire_dtype]
    rounds = wire_dtype != dtype
    assert (difference > 0) == rounds
    # Steps of this problem contract, so differences do not add up beyond a few roundings.
    assert difference < 8 * unit * np.abs(plain.parameters).max()


def bytes_of_run(dtype: str, dim: int, wire_dtype: str = "auto") -> int:
    """Return how many bytes a worker sent and received over TCP, as counted by the kernel."""
    config = configure(1, 40, single(dim, dtype))
    with Line(config, "tcp", wire_dtype) as line:
        connection = line.connect(0)
        line.meanwhile(lambda: Worker(config, 0, line.problem).run(connection))
        info = connection._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    return sum(struct.unpack_from("<QQ", info, 120))  # tcpi_bytes_acked, tcpi_bytes_received


@dims
def test_the_bytes_on_the_wire_halve(dim: int) -> None:
    double, rounded, half = (
        bytes_of_run("float64", dim),
        bytes_of_run("float64", dim, "float32"),
        bytes_of_run("float32", dim),
    )
    vectors = 2 * 40  # forty gradients and, but for the last answer, as many snapshots
    assert abs(double - half - 4 * dim * vectors) < 200
    assert abs(rounded - half) < 200
    assert bytes_of_run("float32", dim, "float64") == pytest.approx(half, abs=200)
    quarter = bytes_of_run("float64", dim, "bfloat16")
    assert abs(double - quarter - 6 * dim * vectors) < 200


def test_an_overflow_is_named() -> None:
    with Line(configure(1, 100, single(3)), "tcp") as line:
        connection, snapshot = line.joined(0)
        assert snapshot.parameters.dtype == np.float32
        large = np.array([1.0, np.inf, 0.0], np.float32)
        line.meanwhile(lambda: connection.push(answer(snapshot, 0, large)))
        (event,) = line.events("gradient_rejected")
        assert event["reason"] == f"{NOT_FINITE} in float32, which ends at 3.4e38"


class Long:
    """Plays workers with long vectors over TCP, which share two buffers."""

    def __init__(self, workers: int, monkeypatch: pytest.MonkeyPatch, **cluster: str) -> None:
        monkeypatch.setattr(buffers, "_POOL_BYTES", 1)
        self.line = Line(configure(workers, 300, single(20_000), **cluster), "tcp")
        self.pool = self.line.sockets._long._pool

    def join_all(self) -> dict[int, Any]:
        """Return each worker's connection and snapshot."""
        workers = range(self.line.config.cluster.workers)
        connections = {worker: self.line.connect(worker) for worker in workers}
        for worker in workers:
            self.line.spawn(worker, lambda w=worker: connections[w].join(w))
        self.line.serve_until(lambda: len(self.line.replies) == len(workers))
        return {w: (connections[w], self.line.replies.pop(w)) for w in workers}

    def half(self, worker: int, connection: Any, snapshot: Any) -> memoryview:
        """Send the first half of a gradient of ones, and return the rest."""
        data = bytearray(wire.HEADER.size + 4 * 20_000)
        start = wire.push_start(worker, 4 * 20_000)
        wire.pack_push(data, start, answer(snapshot, worker, np.ones(1)))
        data[wire.HEADER.size :] = np.ones(20_000, np.float32).tobytes()
        connection._socket.sendall(data[:40_000])
        return memoryview(data)[40_000:]


def test_long_vectors_of_many_workers_share_two_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    long = Long(6, monkeypatch)
    most = []
    take_one_more = long.pool.take_one_more

    def counted() -> Any:
        buffer = take_one_more()
        most.append(long.pool._used)
        return buffer

    monkeypatch.setattr(long.pool, "take_one_more", counted)
    with long.line as line:
        for worker in range(6):
            line.work(worker)
        record = line.finish(6)
        assert long.pool._used == 0
        assert not line.sockets._long.paused
    assert max(most) <= 2  # the first snapshots, of one version, are one buffer
    assert len(most) > 150
    points = replay(line.config, line.problem, line.initial, record)
    np.testing.assert_array_equal(line.server.parameters, points[-1])
    for worker in range(6):
        own = record.trace["sequence"][record.trace["worker"] == worker]
        assert own.tolist() == list(range(len(own)))


@pytest.mark.parametrize("cluster", [{"schedule": "uniform"}, {"mode": "sync"}])
def test_gradients_that_are_applied_in_turn_do_not_wait_for_memory(
    monkeypatch: pytest.MonkeyPatch, cluster: dict[str, str]
) -> None:
    """Otherwise the next worker would wait for memory of others that wait for their turn."""
    with Long(5, monkeypatch, **cluster).line as line:
        for worker in range(5):
            line.work(worker)
        record = line.finish(5)
    points = replay(line.config, line.problem, line.initial, record)
    np.testing.assert_array_equal(line.server.parameters, points[-1])


def test_a_worker_that_waits_for_memory_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    long = Long(4, monkeypatch)
    with long.line as line:
        joined = long.join_all()
        rest = {worker: long.half(worker, *joined[worker]) for worker in (0, 1)}
        line.sockets.serve(0.05)
        connection, snapshot = joined[2]
        gradient = answer(snapshot, 2, np.ones(20_000, np.float32))
        line.spawn(2, lambda: connection.push(gradient))
        line.serve_until(lambda: line.sockets._long.paused)
        later = time.monotonic() + 1000.0
        line.sockets._next_sweep = later
        for peer in line.sockets._peers.values():
            peer.deadline = max(peer.deadline, later)
        line.sockets.sweep(later)
        computing = {w: one.computing for w, one in line.server.status(later).workers.items()}
        assert computing[0] == computing[1] == computing[2] == 0.0
        assert computing[3] > 900.0
        assert line.server.version == 0
        joined[0][0]._socket.sendall(rest[0])
        line.serve_until(lambda: line.server.version == 2)
        assert line.replies.pop(2).version == 2
        assert line.server.drain().trace["worker"].tolist() == [0, 2]


def test_the_memory_of_dead_workers_is_free_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They die while they send, wait for memory, or do not read."""
    long = Long(5, monkeypatch)
    with long.line as line:
        joined = long.join_all()
        for worker in (0, 1):
            long.half(worker, *joined[worker])
        line.sockets.serve(0.05)
        long.half(2, *joined[2])
        line.serve_until(lambda: line.sockets._long.paused)
        for worker in (2, 0, 1):
            joined[worker][0].close()
        events: list[Any] = []
        line.serve_until(lambda: events.extend(line.events("connection_lost")) or len(events) == 3)
        assert long.pool._used == 0
        for worker in (3, 4):
            connection, snapshot = joined[worker]
            gradient = answer(snapshot, worker, np.ones(20_000, np.float32))
            after = line.meanwhile(lambda c=connection, g=gradient: c.push(g))
            assert after.version == worker - 2


def test_a_held_gradient_outlives_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory stays reserved while the server may still apply it."""
    long = Long(3, monkeypatch)
    with long.line as line:
        joined = long.join_all()
        line.server.ledger.most_evaluations = 1  # full: updates wait for the recorder
        line.server.ledger.evaluation(0, 0.0, line.server.parameters)
        connection, snapshot = joined[0]
        line.spawn(0, lambda: connection.push(answer(snapshot, 0, np.full(20_000, 2.0, "f4"))))
        line.serve_until(lambda: line.server._turns)
        connection._socket.shutdown(socket.SHUT_RDWR)
        line.serve_until(lambda: 0 in line.replies)
        line.serve_until(lambda: 0 not in line.sockets._workers)
        connection, snapshot = joined[1]
        line.spawn(1, lambda: connection.push(answer(snapshot, 1, np.full(20_000, 7.0, "f4"))))
        line.serve_until(lambda: len(line.server._turns) == 2)
        line.server.ledger.most_evaluations = np.inf
        line.server.drain()
        x = line.initial
        for value in (2.0, 7.0):
            line.sockets.deliver(line.server.go_on(time.monotonic()))
            x = x - np.float32(0.05) * np.full(20_000, value, np.float32)
            np.testing.assert_array_equal(line.server.parameters, x)
        line.serve_until(lambda: 1 in line.replies)
        assert line.replies[1].version == 2


class Killer:
    """Kills a server and a worker once each, then interrupts."""

    def __init__(self) -> None:
        self.due = [(60, "ServerActor"), (160, "WorkerActor"), (260, None)]

    def __call__(self, progress: Progress) -> None:
        if self.due and progress.update >= self.due[0][0]:
            _, kind = self.due.pop(0)
            if kind is None:
                raise KeyboardInterrupt
            os.kill(min(actor_processes(kind)), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@transports
@pytest.mark.parametrize(("dim", "durability"), [(3, "auto"), (20_000, "log")])
def test_a_killed_and_resumed_run_equals_its_replay(
    tmp_path: Path, transport: str, dim: int, durability: str
) -> None:
    config = make_config(
        {
            "problem": single(dim),
            "optimizer": {"rule": "momentum", "learning_rate": 0.01, "batch_size": 4},
            "cluster": {
                "workers": 3,
                "transport": transport,
                "compute_time": {"law": "constant", "mean": 0.01},
            },
            "run": {"updates": 400, "checkpoint_every": 50, "durability": durability},
        }
    )
    killer = Killer()
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", progress=killer)
    assert not killer.due
    result = read_run(resume(tmp_path / "run"))
    kinds = [event["event"] for event in result.events]
    assert kinds.count("server_restored") == 2
    assert "worker_lost" in kinds
    assert len(result.trace) == 400
    check_gradients(result)
    *_, last = replay_of(result, make_problem(config))
    assert result.parameters.dtype == last.parameters.dtype == np.float32
    np.testing.assert_array_equal(result.parameters, last.parameters)
    assert not verify(result).findings
    size = paths(result.path / CHECKPOINTS)[0].stat().st_size
    assert 0 < size - 2 * 4 * dim < 2000  # the parameters and the state of the rule


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_every_transport_carries_the_same_network(tmp_path: Path) -> None:
    """Its parameters are float32 from the worker to the file."""
    found = {}
    for transport in ("ray", "tcp", "shm"):
        config = make_config(
            {
                "problem": {"kind": "tests.support.networks:jax_perceptron"},
                "cluster": {"workers": 1, "transport": transport},
                "run": {"updates": 60, "eval_every": 20},
            }
        )
        found[transport] = read_run(run(config, tmp_path / transport))
        assert found[transport].parameters.dtype == np.float32
    *_, last = replay_of(found["shm"], make_problem(config))
    for one in found.values():
        np.testing.assert_array_equal(one.parameters, last.parameters)


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_a_run_in_another_precision_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    config = make_config({"problem": single(3), "run": {"updates": 10**6}})
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", progress=stop)
    from tests.support.plugins import Single

    monkeypatch.setattr(Single, "dtype", "float64", raising=False)
    original = Single.__init__

    def changed(self: Single, **options: Any) -> None:
        original(self, **{**options, "dtype": "float64"})

    monkeypatch.setattr(Single, "__init__", changed)
    with pytest.raises((InputError, RunFailedError), match=r"dtype is float64, was float32"):
        resume(tmp_path / "run")


def test_the_memory_asked_for_depends_on_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {}
    for dtype in ("float64", "float32"):
        config = make_config({"problem": single(100_000, dtype), "cluster": {"workers": 100}})
        problem = make_problem(config)
        monkeypatch.setattr(memory, "_free_bytes", lambda: 1)
        with pytest.raises(InputError, match=rf"100,000 parameters in {dtype} their") as error:
            memory.check_memory(config, problem, make_rule(config))
        needed[dtype] = float(str(error.value).partition("take ")[2].split()[0])
    apart = memory._without_vectors(config) / 1e9
    assert needed["float32"] - apart == pytest.approx((needed["float64"] - apart) / 2, abs=0.1)


def test_more_processes_than_the_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise Ray would start them, and kill one after another."""
    monkeypatch.setattr(memory, "_FRAMEWORKS", ())  # other tests may have imported one
    monkeypatch.setattr(memory, "_free_bytes", lambda: 6 * 10**9)
    config = make_config({"problem": {"kind": "quadratic"}, "cluster": {"workers": 64}})
    memory.check_memory(config, make_problem(config), make_rule(config))
    config = make_config({"problem": {"kind": "quadratic"}, "cluster": {"workers": 200}})
    with pytest.raises(
        InputError, match=r"cluster.workers = 200: .* 14\.\d GB, and 6\.0 GB are free"
    ) as error:
        memory.check_memory(config, make_problem(config), make_rule(config))
    remedy = "expected fewer workers, cluster.workers_per_process = 3 or more, or more machines"
    assert remedy in str(error.value)
    sharing = {"workers": 200, "workers_per_process": 3}
    config = make_config({"problem": {"kind": "quadratic"}, "cluster": sharing})
    memory.check_memory(config, make_problem(config), make_rule(config))
    monkeypatch.setattr(memory, "_free_bytes", lambda: 10**8)  # Ray alone takes more
    with pytest.raises(InputError, match=r"are free: expected fewer workers, or more machines"):
        memory.check_memory(config, make_problem(config), make_rule(config))
