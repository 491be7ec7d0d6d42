"""Messages: vectors arrive unchanged, and late answers reach their caller."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import ray

from asgd.config.make import make_config
from asgd.problems.scalar import Quadratic
from asgd.progress import Progress
from asgd.rundir.checkpoint import CHECKPOINTS
from asgd.rundir.reader import read_run
from asgd.simulation.simulate import simulate
from cluster import run
from cluster.actors import ServerActor
from cluster.core.messages import Snapshot, Stop
from cluster.sockets.wire import VectorFormat
from cluster.transport import ServerGoneError, Waiting, connect, decode, encode
from tests.support.invariants import check_trace
from tests.support.processes import actor_processes, listeners

pytestmark = pytest.mark.ray

DOUBLE = VectorFormat(0)


@pytest.mark.parametrize("value", [[], [1.5], [np.pi, -0.0, 5e-324, 1.7e308]])
def test_vectors_arrive_unchanged(value: list[float]) -> None:
    array = np.array(value, dtype=float)
    received = decode(encode(array, DOUBLE), DOUBLE)
    assert received.tobytes() == array.tobytes()
    assert not received.flags.writeable


def test_a_strided_vector_arrives_unchanged() -> None:
    array = np.arange(10.0)[::3]
    np.testing.assert_array_equal(decode(encode(array, DOUBLE), DOUBLE), array)


def test_a_snapshot_is_encoded_before_the_server_continues() -> None:
    async def scenario() -> bytes:
        waiting = Waiting(DOUBLE)
        answer = waiting.expect(0)
        live = np.zeros(3)
        waiting.send([(0, Snapshot(live, 1, 0, 1, 16))])
        live += 1.0
        return bytes((await answer)[0])

    np.testing.assert_array_equal(decode(asyncio.run(scenario()), DOUBLE), np.zeros(3))


def test_answers_may_come_late_and_in_another_order() -> None:
    async def scenario() -> list[str]:
        waiting = Waiting(DOUBLE)
        answers = [waiting.expect(worker) for worker in range(3)]
        waiting.send([])
        waiting.send([(2, Stop("c")), (0, Stop("a"))])
        waiting.send([(1, Stop("b")), (1, Stop("dropped: nobody waits"))])
        return [(await answer)[0] for answer in answers]

    assert asyncio.run(scenario()) == ["a", "b", "c"]


def test_second_call_of_a_worker_replaces_the_first() -> None:
    async def scenario() -> tuple[bool, str]:
        waiting = Waiting(DOUBLE)
        older = waiting.expect(0)
        newer = waiting.expect(0)
        waiting.send([(0, Stop("answer"))])
        return older.cancelled(), (await newer)[0]

    assert asyncio.run(scenario()) == (True, "answer")


@pytest.mark.parametrize("value", [[1.0, 1e300, -1e300], [0.1, 5e-324, -0.0]])
def test_float32_rounds_and_overflows_silently(value: list[float]) -> None:
    rounded = VectorFormat(len(value), "float32")
    received = decode(encode(np.array(value), rounded), rounded)
    assert received.dtype == np.float64
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(received, np.array(value, np.float32))


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    ("dtype", "transports"),
    [
        ("float64", ["ray", "tcp", "shm", "auto"]),
        ("float32", ["ray", "shm"]),
        ("bfloat16", ["ray", "tcp"]),
    ],
)
def test_every_transport_carries_the_same_run(
    tmp_path: Path, dtype: str, transports: list[str]
) -> None:
    results = {}
    for transport in transports:
        config = make_config(
            {
                "problem": {"kind": "softmax"},
                "cluster": {"workers": 1, "transport": transport, "wire_dtype": dtype},
                "run": {"updates": 100, "eval_every": 20},
            }
        )
        results[transport] = read_run(run(config, tmp_path / transport))
        check_trace(results[transport])
    used = {
        transport: [e["transport"] for e in result.events if e["event"] == "worker_joined"]
        for transport, result in results.items()
    }
    expected = {"ray": ["ray"], "tcp": ["tcp"], "shm": ["shm"], "auto": ["shm"]}
    assert used == {transport: expected[transport] for transport in transports}
    for result in results.values():
        np.testing.assert_array_equal(
            result.trace["gradient_norm"], results["ray"].trace["gradient_norm"]
        )
        np.testing.assert_array_equal(result.loss["loss"], results["ray"].loss["loss"])


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_uniform_schedule_is_the_same_over_every_transport(tmp_path: Path, transport: str) -> None:
    config = make_config(
        {
            "problem": {"kind": "quadratic"},
            "cluster": {"workers": 4, "transport": transport, "schedule": "uniform"},
            "run": {"updates": 400},
        }
    )
    real = read_run(run(config, tmp_path / "real"))
    check_trace(real)
    simulated = read_run(simulate(config, tmp_path / "simulated"))
    for column in ("worker", "sequence", "read_version", "gradient_norm"):
        np.testing.assert_array_equal(real.trace[column], simulated.trace[column])


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_run_finishes_although_worker_processes_die_again_and_again(
    tmp_path: Path, transport: str
) -> None:
    config = make_config(
        {
            "problem": {
                "kind": "tests.support.plugins:bowl",
                "options": {"fault": "exit", "after": 60},
            },
            "cluster": {"workers": 2, "transport": transport},
            "run": {"updates": 200},
        }
    )
    result = read_run(run(config, tmp_path / "run"))
    assert result.state == "finished"
    assert result.trace["update"].tolist() == list(range(200))
    kinds = [event["event"] for event in result.events]
    assert kinds.count("connection_lost") == kinds.count("worker_lost") >= 2
    lost = {(e["worker"], e["sequence"]) for e in result.events if e["event"] == "gradient_lost"}
    applied = set(zip(result.trace["worker"], result.trace["sequence"], strict=True))
    assert len(applied) == 200
    assert not applied & lost
    for worker in range(2):
        own = sorted(s for w, s in applied | lost if w == worker)
        assert own == list(range(len(own)))


@pytest.mark.usefixtures("shared_ray")
def test_a_killed_worker_rejoins_during_a_flood_of_strangers(tmp_path: Path) -> None:
    config = make_config(
        {
            "problem": {"kind": "quadratic"},
            "cluster": {"workers": 2, "transport": "tcp", "compute_time": {"mean": 0.002}},
            "run": {"updates": 10**6, "eval_every": 1000},
        }
    )
    killed: list[int] = []
    with contextlib.ExitStack() as strangers:

        def flood_and_kill(progress: Progress) -> None:
            events = [event["event"] for event in read_run(tmp_path / "run").events]
            if events.count("worker_joined") == 3:
                raise KeyboardInterrupt
            if progress.update and not killed:
                ((_, port),) = [
                    (address, port)
                    for address, port in listeners(actor_processes("ServerActor"))
                    if address.version == 4  # Ray's are of version 6
                ]
                for _ in range(400):
                    strangers.enter_context(socket.create_connection(("127.0.0.1", port)))
                killed.append(min(actor_processes("WorkerActor")))
                os.kill(killed[0], signal.SIGKILL)

        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "run", progress=flood_and_kill)
    events = read_run(tmp_path / "run").events
    (lost,) = [event for event in events if event["event"] == "worker_lost"]
    assert lost["reason"].startswith("its process died: killed (by the kernel, if memory ran out")
    assert any(event["event"] == "connection_refused" for event in events)


@pytest.mark.usefixtures("shared_ray")
def test_data_plane_of_our_own_ray_listens_on_loopback(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINTS).mkdir()
    actor = ray.remote(ServerActor).options(num_cpus=0)
    server = actor.remote(
        config=make_config(), parameters=np.zeros(2), recorder=None, path=str(tmp_path)
    )
    try:
        endpoint, node = ray.get(server.endpoint.remote())
        assert endpoint.host == "127.0.0.1"
        assert node == ray.get_runtime_context().get_node_id()
        assert ray.get(server.endpoint.remote())[0] == endpoint
    finally:
        ray.kill(server)
    with pytest.raises(ServerGoneError):
        connect(server, make_config(), 0, Quadratic())
