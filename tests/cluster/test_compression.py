"""Compressed gradients in real runs: fewer bytes, the same bits, deaths, hostile frames."""

from __future__ import annotations

import os
import signal
import socket
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from asgd.arrays import Array
from asgd.compression import BLOCK, SCRATCH, Int8, TopK
from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.divergence import not_finite
from asgd.progress import Progress
from asgd.rules.sgd import Sgd
from asgd.rundir.reader import read_run
from asgd.simulation.simulate import simulate
from cluster import run
from cluster.core.worker import Worker
from cluster.memory import vectors
from cluster.sockets import wire
from cluster.sockets.compressed import gradient_nbytes, packing_of
from cluster.sockets.wire import HEADER, VectorFormat
from tests.support.faults import Crowd, replay
from tests.support.invariants import check_verified
from tests.support.lines import Line, answer
from tests.support.lines import configure as lined
from tests.support.machine import Machine, configure, work
from tests.support.processes import actor_processes

TOP: dict[str, Any] = {"compression": "top_k", "compression_share": 0.1}
BYTES: dict[str, Any] = {"compression": "int8"}
kinds = pytest.mark.parametrize("kind", [TOP, BYTES], ids=lambda one: one["compression"])
transports = pytest.mark.parametrize("transport", ["tcp", "shm"])
# Vectors of the second are too long for a buffer of each connection.
dims = pytest.mark.parametrize("dim", [3, 300, 20_000])
FORMATS = [
    VectorFormat(dim, dtype, precision, compression)
    for dim in (1, BLOCK, 2 * BLOCK + 7)
    for dtype, precision in (("float64",) * 2, ("float32",) * 2, ("bfloat16", "float64"))
    for compression in (TopK(0.1), TopK(1.0), Int8())
]
MODES: list[dict[str, Any]] = [
    {},
    {"mode": "bounded", "max_staleness": 2},
    {"discard_above": 1},
    {"mode": "buffered", "gradients_per_update": 2, "discard_above": 1},
    {"mode": "sync", "gradients_per_update": 2, "late": "keep"},
]


def single(dim: int, dtype: str = "float64") -> dict[str, Any]:
    options = {"dim": dim, "dtype": dtype}
    return {"kind": "tests.support.plugins:single", "options": options}


# --- payloads ---


@pytest.mark.parametrize("vectors", FORMATS, ids=str)
def test_what_is_packed_comes_out_to_the_last_bit(vectors: VectorFormat) -> None:
    packing, compression = packing_of(vectors), vectors.compression
    assert packing is not None
    assert compression is not None
    assert gradient_nbytes(vectors) == packing.nbytes
    out = np.full(vectors.dimension, 9.0, vectors.precision)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        vector = rng.standard_normal(vectors.dimension) * 10.0 ** rng.integers(-45, 30)
        vector[rng.random(vectors.dimension) < seed / 20] = 0.0  # the last ones mostly zeros
        sent = compression.compressed(vector.astype(vectors.precision))
        sent = sent.astype(vectors.numbers).astype(vectors.precision)
        payload = bytearray(packing.nbytes)
        packing.pack(sent, payload)
        packing.unpack(payload, out)
        np.testing.assert_array_equal(out, sent)


def test_sizes_of_payloads() -> None:
    for dim, dtype, compression, expected in [
        (10_000, "float64", TopK(0.01), 100 * 12),
        (10_000, "float32", TopK(0.01), 100 * 8),
        (10_000, "bfloat16", TopK(0.01), 100 * 6),
        (10_000, "float64", Int8(), 10_000 + 40 * 2),
        (3, "float64", TopK(0.01), 12),
    ]:
        assert gradient_nbytes(VectorFormat(dim, dtype, "float64", compression)) == expected
        assert gradient_nbytes(VectorFormat(dim, dtype)) == VectorFormat(dim, dtype).nbytes


# --- over sockets ---


@kinds
@transports
@dims
@pytest.mark.parametrize(
    "cluster",
    [{}, {"mode": "sync"}, {"schedule": "uniform", "wire_dtype": "bfloat16"}],
    ids=str,
)
def test_a_run_equals_the_replay_of_its_trace_to_the_last_bit(
    kind: dict[str, Any], transport: str, dim: int, cluster: dict[str, Any]
) -> None:
    config = lined(3, 60, single(dim), **cluster, **kind)
    with Line(config, transport, config.cluster.wire_dtype) as line:
        for worker in range(3):
            line.work(worker)
        record = line.finish(3)
    points = replay(config, line.problem, line.initial, record)
    np.testing.assert_array_equal(line.server.parameters, points[-1])
    assert len(record.trace["update"]) == 60


@kinds
@transports
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_one_worker_equals_the_simulation_to_the_last_bit(
    tmp_path: Path, kind: dict[str, Any], transport: str, dtype: str
) -> None:
    config = lined(1, 100, single(1000, dtype), **kind)
    simulated = read_run(simulate(config, tmp_path / "run"))
    with Line(config, transport) as line:
        line.work(0)
        record = line.finish(1)
    np.testing.assert_array_equal(line.server.parameters, simulated.parameters)
    norms = simulated.trace["gradient_norm"].to_numpy()
    np.testing.assert_array_equal(record.trace["gradient_norm"], norms)


def bytes_of_worker(**cluster: Any) -> tuple[int, int]:
    """Return the bytes that a worker sent and received over TCP, as its kernel counts them."""
    config = lined(1, 40, single(20_000), **cluster)
    with Line(config, "tcp", config.cluster.wire_dtype) as line:
        connection = line.connect(0)
        line.meanwhile(lambda: Worker(config, 0, line.problem).run(connection))
        info = connection._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    acked, received = struct.unpack_from("<QQ", info, 120)
    return acked, received


@pytest.mark.parametrize(
    ("cluster", "per_gradient"),
    [
        ({}, 20_000 * 8),
        (BYTES, 20_000 + 79 * 2),
        (TOP, 2000 * 12),
        (TOP | {"compression_share": 0.01}, 200 * 12),
        (TOP | {"wire_dtype": "bfloat16"}, 2000 * 6),
    ],
    ids=str,
)
def test_gradients_are_smaller_and_snapshots_are_not(
    cluster: dict[str, Any], per_gradient: int
) -> None:
    sent, received = bytes_of_worker(**cluster)
    assert abs(sent - 40 * (HEADER.size + per_gradient)) < 300  # the handshake
    number = 2 if cluster.get("wire_dtype") == "bfloat16" else 8
    assert abs(received - 40 * (HEADER.size + 20_000 * number)) < 300


# --- hostile frames ---


def frame(line: Line, snapshot: Any, payload: bytes) -> bytes:
    """Return a PUSH of worker 0 with this payload."""
    header = bytearray(HEADER.size)
    start = wire.push_start(0, len(payload))
    wire.pack_push(header, start, answer(snapshot, 0, line.initial))
    return bytes(header) + payload


def largest(numbers: list[float], indices: list[int]) -> bytes:
    return np.array(numbers, "<f8").tobytes() + np.array(indices, "<u4").tobytes()


HOSTILE = [
    (TOP, largest([1.0, 2.0, 3.0], [1, 1, 2]), "whose indices do not ascend"),
    (TOP, largest([1.0, 2.0, 3.0], [2, 1, 0]), "whose indices do not ascend"),
    (TOP, largest([1.0, 2.0, 3.0], [1, 2, 30]), "whose indices do not ascend"),
    (TOP, largest([1.0, 2.0, 3.0], [1, 2, 2**32 - 1]), "whose indices do not ascend"),
    (TOP, largest([1.0, 2.0], [1, 2]), "of kind 6 and 24 bytes is not allowed now"),
    (TOP, bytes(30 * 8), "of kind 6 and 240 bytes is not allowed now"),
    (BYTES, struct.pack("<h", 1019) + bytes(30), "with a scale that its numbers cannot have"),
    (BYTES, struct.pack("<h", -1023) + bytes(30), "with a scale that its numbers cannot have"),
    (BYTES, bytes(33), "of kind 6 and 33 bytes is not allowed now"),
]


@pytest.mark.parametrize(("kind", "payload", "reason"), HOSTILE)
def test_an_impossible_payload_closes_the_connection_and_the_run_goes_on(
    kind: dict[str, Any], payload: bytes, reason: str
) -> None:
    config = lined(2, 50, single(30), schedule="uniform", **kind)
    with Line(config, "tcp") as line:
        connection = line.connect(0)
        line.work(1)
        snapshot = line.meanwhile(lambda: connection.join(0))
        connection._socket.sendall(frame(line, snapshot, payload))
        line.serve_until(lambda: line.server.stopping)
        record = line.server.drain()
    lost = [event for event in record.events if event["event"] == "connection_lost"]
    assert [event["worker"] for event in lost] == [0]
    assert reason in lost[0]["reason"]
    assert set(record.trace["worker"].tolist()) == {1}
    assert len(record.trace["update"]) == 50


@kinds
@pytest.mark.parametrize("dim", [30, 20_000])
def test_a_length_that_is_not_that_of_a_gradient_takes_no_memory(
    kind: dict[str, Any], dim: int
) -> None:
    with Line(lined(1, 50, single(dim), **kind), "tcp") as line:
        connection, snapshot = line.joined(0)
        data = bytearray(frame(line, snapshot, b""))
        data[16:24] = (2**40).to_bytes(8, "little")
        connection._socket.sendall(data)
        lost: list[dict[str, Any]] = []
        line.serve_until(lambda: lost.extend(line.events("connection_lost")) or lost)
        assert lost[0]["reason"] == f"a frame of kind 6 and {2**40} bytes is not allowed now"
        assert line.sockets._long._pool._used == 0


@kinds
@transports
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_refused_as_one(
    kind: dict[str, Any], transport: str, wrong: float, dtype: str
) -> None:
    """The reason is that of the same gradient sent whole, although large numbers are beside it."""
    with Line(lined(1, 50, single(300, dtype), **kind), transport) as line:
        connection, snapshot = line.joined(0)
        value = line.initial.copy()
        value[[7, 8]] = wrong
        value[9:200] = 1e38
        sent = Worker(line.config, 0, line.problem)._pushes._rule.push(
            0, 0, line.initial, lambda step, x: value
        )
        after = line.meanwhile(lambda: connection.push(answer(snapshot, 0, sent)))
        assert (after.version, after.sequence) == (0, 2)  # its number, and that of the reset
        record = line.server.drain()
    events = [e for e in record.events if e["event"] in ("gradient_rejected", "state_reset")]
    assert [event["event"] for event in events] == ["gradient_rejected", "state_reset"]
    assert events[0]["reason"] == not_finite(value)


@kinds
def test_a_gradient_of_another_shape_is_refused_as_one(kind: dict[str, Any]) -> None:
    with Line(lined(1, 50, single(300), **kind), "tcp") as line:
        connection, snapshot = line.joined(0)
        after = line.meanwhile(lambda: connection.push(answer(snapshot, 0, np.ones((2, 2)))))
        assert (after.version, after.sequence) == (0, 2)
        (event,) = line.events("gradient_rejected")
        assert event["reason"] == "shape (2, 2), expected (300,)"


def test_a_worker_compresses_only_to_its_format() -> None:
    with Line(lined(1, 50, single(30), **TOP), "tcp") as line:
        connection, snapshot = line.joined(0)
        with pytest.raises(ValueError, match="30"):
            connection.push(answer(snapshot, 0, np.ones(30)))


# --- deaths and restored servers ---


def compressed(config: RunConfig, **cluster: Any) -> RunConfig:
    changed = msgspec.to_builtins(config)
    changed["problem"] = {"kind": "logistic"}
    changed["cluster"] |= cluster
    return make_config(changed)


@kinds
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("durability", ["log", "checkpoint"])
def test_a_restored_run_is_its_replay(
    tmp_path: Path, kind: dict[str, Any], durability: str, mode: dict[str, Any]
) -> None:
    config = compressed(configure(3, 120, durability, **mode), **kind)
    machine = Machine(tmp_path / "run", config)
    for reached in (31, 45, 97):
        work(machine.crowd, reached - 6, seed=reached)
        machine.crowd.die(reached % 3)
        work(machine.crowd, reached - 3, seed=reached)
        machine.crowd.join(reached % 3)
        work(machine.crowd, reached, seed=reached + 1)
        machine.record()
        before = machine.crowd.server.version
        parameters: Array = machine.crowd.server.parameters.copy()
        machine.restart()
        assert machine.crowd.server.version == (
            before if durability == "log" else before // 20 * 20
        )
        if durability == "log":
            np.testing.assert_array_equal(machine.crowd.server.parameters, parameters)
    machine.work(120)
    check_verified(read_run(machine.path))
    assert machine.events("state_reset")


@kinds
def test_the_residual_of_a_worker_that_died_is_reset(kind: dict[str, Any]) -> None:
    crowd = Crowd(compressed(configure(2, 40), **kind))
    crowd.join_all()
    work(crowd, 9)
    before = crowd.at_hand[0].sequence
    crowd.die(0)
    work(crowd, 12)
    crowd.workers[0] = Worker(crowd.config, 0, crowd.problem)
    crowd.join(0)
    assert crowd.at_hand[0].sequence == before + 2
    work(crowd, 40)
    record = crowd.server.drain()
    told = [e for e in record.events if e["event"] in ("gradient_lost", "state_reset")]
    assert [(event["event"], event["sequence"]) for event in told] == [
        ("gradient_lost", before),
        ("state_reset", before + 1),
    ]
    points = replay(crowd.config, crowd.problem, crowd.initial, record)
    np.testing.assert_array_equal(points[-1], crowd.server.parameters)


def test_memory_counts_residuals() -> None:
    plain = configure(3)
    counted = vectors(compressed(configure(3), **BYTES), 10, Sgd())
    assert counted == vectors(plain, 10, Sgd()) + 3 * (1 + SCRATCH)


# --- on Ray ---


class Killer:
    """Kills a worker, then the server, each once."""

    def __init__(self) -> None:
        self.due = [(80, "WorkerActor"), (180, "ServerActor")]

    def __call__(self, progress: Progress) -> None:
        if self.due and progress.update >= self.due[0][0]:
            os.kill(min(actor_processes(self.due.pop(0)[1])), signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(("kind", "durability"), [(TOP, "log"), (BYTES, "checkpoint")])
def test_killed_it_equals_its_replay_to_the_last_bit(
    tmp_path: Path, kind: dict[str, Any], durability: str
) -> None:
    config = make_config(
        {
            "problem": {"kind": "softmax"},
            "optimizer": {"learning_rate": 0.1, "batch_size": 4},
            "cluster": {
                "workers": 3,
                "transport": "tcp",
                "compute_time": {"law": "exponential", "mean": 0.02},
                **kind,
            },
            "run": {
                "updates": 500,
                "eval_every": 20,
                "checkpoint_every": 50,
                "durability": durability,
            },
        }
    )
    killer = Killer()
    found = read_run(run(config, tmp_path / "run", progress=killer))
    assert not killer.due
    told = [event["event"] for event in found.events]
    assert told.count("server_restored") == 1
    assert "worker_lost" in told
    check_verified(found)
    assert "state_reset" in told
    assert len(found.trace) == 500


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@kinds
def test_every_transport_applies_the_same(tmp_path: Path, kind: dict[str, Any]) -> None:
    found = {}
    for transport in ("ray", "tcp", "shm"):
        config = make_config(
            {
                "problem": {"kind": "softmax"},
                "cluster": {"workers": 1, "transport": transport, **kind},
                "run": {"updates": 60, "eval_every": 20},
            }
        )
        found[transport] = read_run(run(config, tmp_path / transport))
        check_verified(found[transport])
    simulated = read_run(simulate(config, tmp_path / "simulated"))
    for one in found.values():
        np.testing.assert_array_equal(one.parameters, simulated.parameters)
