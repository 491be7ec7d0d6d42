"""Baselines of `bench_server.py`: Ray's own loop, a socket echo, memory bandwidth, no recorder."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors import RecorderActor
from cluster.core.ledger import Record
from cluster.sockets.wire import HEADER


class Constant:
    """A problem whose gradient costs nothing."""

    n_samples = 1000

    def __init__(self, dim: int, dtype: str = "float64") -> None:
        self.dim, self.dtype = dim, dtype
        self._gradient = np.full(dim, 1e-3, dtype)

    def initial_point(self, rng: np.random.Generator) -> np.ndarray:
        return np.zeros(self.dim)

    def loss(self, x: np.ndarray) -> float:
        return float(np.mean(x))

    def gradient(self, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return self._gradient


def constant(dim: int, dtype: str = "float64") -> Constant:
    """Return the problem; the plug-in is `bench_peers:constant`."""
    return Constant(dim, dtype)


def start(kind: type, *arguments: Any, node: str | None = None) -> Any:
    """Start an actor, on a node if one is given."""
    place = "DEFAULT" if node is None else NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": place}
    return ray.remote(kind).options(**options).remote(*arguments)


class LoopServer:
    """Parameters behind actor calls."""

    def __init__(self, dim: int, dtype: str) -> None:
        self.parameters = np.zeros(dim, dtype)

    def weights(self) -> np.ndarray:
        return self.parameters

    def apply(self, gradient: np.ndarray) -> np.ndarray:
        self.parameters = self.parameters - 1e-6 * gradient
        return self.parameters


class LoopWorker:
    """Computes one gradient per call."""

    def __init__(self, dim: int, dtype: str) -> None:
        self.problem = Constant(dim, dtype)

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        return self.problem.gradient(weights, np.zeros(1, int))


class RayLoop:
    """The asynchronous parameter server of Ray's documentation; actors are kept between calls.

    On a cluster, `nodes` has the node of the server and those of the workers.
    """

    def __init__(
        self, dim: int, workers: int, dtype: str, nodes: Sequence[str] | None = None
    ) -> None:
        server, *others = nodes or [None] * (workers + 1)
        self._server = start(LoopServer, dim, dtype, node=server)
        self._workers = [start(LoopWorker, dim, dtype, node=node) for node in others]

    def rate(self, updates: int) -> float:
        """Return updates/s; gradients are applied as they arrive, the first tenth is warm-up."""
        weights = self._server.weights.remote()
        pending = {worker.gradient.remote(weights): worker for worker in self._workers}
        warm, begin = max(2 * len(pending), updates // 10), 0.0
        for update in range(warm + updates):
            if update == warm:
                ray.get(weights)
                begin = time.perf_counter()
            (ready,), _ = ray.wait(list(pending), num_returns=1)
            worker = pending.pop(ready)
            weights = self._server.apply.remote(ready)
            pending[worker.gradient.remote(weights)] = worker
        ray.get(weights)
        seconds = time.perf_counter() - begin
        ray.get(list(pending))
        return updates / seconds

    def close(self) -> None:
        for actor in (self._server, *self._workers):
            ray.kill(actor)


class EchoServer:
    """Sends every frame back: the least work of any server over these sockets."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))

    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def serve(self, clients: int, size: int, frames: int) -> tuple[float, float]:
        """Return frames/s after the first tenth, and processor seconds per frame."""
        epoll, peers = select.epoll(), {}
        for _ in range(clients):
            peer, _ = self.listener.accept()
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.setblocking(False)
            peers[peer.fileno()] = peer
            epoll.register(peer, select.EPOLLIN)
        data, done, begin, used = memoryview(bytearray(size)), 0, 0.0, 0.0
        first = frames // 10
        while done < frames:
            for descriptor, _ in epoll.poll():
                peer = peers[descriptor]
                if peer.recv_into(data) == size:
                    peer.send(data)
                    done += 1
                    if done == first:
                        begin, used = time.perf_counter(), time.process_time()
        seconds, used = time.perf_counter() - begin, time.process_time() - used
        for peer in peers.values():
            peer.close()
        epoll.close()
        return (done - first) / seconds, used / (done - first)


class EchoClient:
    """Sends the next frame when the previous one is back."""

    def echo(self, port: int, size: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            data = memoryview(bytearray(size))
            try:
                while True:
                    connection.sendall(data)
                    if not connection.recv_into(data, size, socket.MSG_WAITALL):
                        return
            except ConnectionError:
                return


def echo_rate(dim: int, workers: int, frames: int) -> float:
    """Return the vector frames per second of a bare echo."""
    size = HEADER.size + 8 * dim
    server, clients = start(EchoServer), [start(EchoClient) for _ in range(workers)]
    port = ray.get(server.port.remote())
    for client in clients:
        client.echo.remote(port, size)
    rate, _ = ray.get(server.serve.remote(workers, size, frames))
    for actor in (server, *clients):
        ray.kill(actor)
    return float(rate)


def memory_bytes_per_second(dim: int, seconds: float) -> float:
    """Return the copy bandwidth of one core (bytes read plus written) over a run's vectors."""
    vectors = [np.ones(dim) for _ in range(10)]
    begin, count = time.perf_counter(), 0
    while time.perf_counter() < begin + seconds:
        np.copyto(vectors[count % 10], vectors[(count + 5) % 10])
        count += 1
    return 2 * 8 * dim * count / (time.perf_counter() - begin)


def server_bytes(dim: int, dtype: str) -> int:
    """Return the bytes that the server reads and writes for one update over shared memory.

    The norm and the step read g (the step stays in the cache); the parameters are read and written;
    the snapshot reads them and is written.
    """
    return 6 * dim * np.dtype(dtype).itemsize


class Discard(RecorderActor):
    """A recorder that discards records and only measures the rate."""

    def _open(self) -> None:
        self._paces: list[tuple[int, float]] = []

    def record(self, record: Record) -> float:
        if len(record.trace["update"]):
            last = int(record.trace["update"][-1]), float(record.trace["applied_seconds"][-1])
            self._paces.append(last)
            (first, begin), (update, end) = self._paces[0], last
            if end > begin:
                rate = (update - first) / (end - begin)
                (Path(self._path) / "rate").write_text(repr(rate))
        return 0.0
