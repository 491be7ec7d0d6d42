#!/usr/bin/env python3
"""Many workers on one machine, and a server with many connections.

.venv/bin/python -m scripts.bench_many [--workers 64 200] [--together 25] [--seconds 20]
.venv/bin/python -m scripts.bench_many --connections 8 64 512

Workers: real runs on the digits, whose gradients take 50 ms more on average (exponential), with
`--together` workers in a process. Prints the seconds from the call until the last worker has joined
and until the first update, updates/s over the last nine tenths, the processes, and the most memory
(PSS: what several share is divided among them) of all processes of the run: the driver, Ray's, the
server, the recorder and the workers.

Connections: one process plays all workers over tcp with d = 10 and answers each snapshot at once,
beside the process of a server without a recorder. Prints medians of `--repeats`: updates/s, and
the processor time of the server per update, the better measure on a busy machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import select
import statistics
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.problems.base import starting_point
from asgd.problems.make import make_problem
from asgd.progress import Progress
from asgd.rundir.reader import read_run
from cluster import run
from cluster.core.messages import Gradient
from cluster.core.server import ParameterServer
from cluster.sockets import wire
from cluster.sockets.connection import Endpoint, SocketConnection
from cluster.sockets.server import SocketServer
from cluster.sockets.wire import HEADER, VectorFormat
from scripts.server_runs import steady_rate
from tests.support.processes import below

MEAN_SECONDS = 0.05
SAMPLE_SECONDS = 1.0  # between two samples of the memory
DIM = 10  # of least squares on the diabetes data
EXPECTED = 25_000  # updates/s of a server, for the length of a measurement
WARM_UP = 10  # updates of each worker


class Memory:
    """Peak memory of this process and all below it; used as the run's progress callback."""

    def __init__(self) -> None:
        self.peak = 0
        self.processes = 0
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() < self._next:
            return
        found = {os.getpid(), *below(os.getpid())}
        total = sum(proportional(pid) for pid in found)
        if total > self.peak:
            self.peak, self.processes = total, len(found)
        self._next = time.monotonic() + SAMPLE_SECONDS


def proportional(pid: int) -> int:
    """Return the PSS of a process in bytes, 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


def measure_workers(workers: int, together: int, seconds: float) -> None:
    updates = int(seconds * workers / MEAN_SECONDS)
    config = make_config(
        {
            "problem": {"kind": "softmax"},
            "optimizer": {"learning_rate": 0.1 / workers},
            "cluster": {
                "workers": workers,
                "workers_per_process": together,
                "compute_time": {"law": "exponential", "mean": MEAN_SECONDS},
            },
            "run": {"updates": updates, "eval_every": updates // 20},
        }
    )
    memory = Memory()
    with tempfile.TemporaryDirectory() as directory:
        began = time.time()
        result = read_run(run(config, Path(directory) / "run", progress=memory))
        joined = [e["time"] for e in result.events if e["event"] == "worker_joined"]
        rate = steady_rate(result)
    assert len(joined) == workers, f"{len(joined) - workers} workers joined again"
    begun = max(joined) + result.trace["applied_seconds"].iloc[0]
    computing = result.trace["compute_seconds"].mean()
    print(
        f"{workers} workers, {together} in a process: all joined after "
        f"{max(joined) - began:.1f} s, first update after {begun - began:.1f} s; "
        f"{rate:,.0f} updates/s "
        f"({rate * MEAN_SECONDS / workers:.0%} of {workers / MEAN_SECONDS:,.0f}), compute_seconds "
        f"{1e3 * computing:.1f} ms; {memory.processes} processes, {memory.peak / 1e9:.2f} GB",
        flush=True,
    )


def serve(config: RunConfig, parent: Connection) -> None:
    """Serve until the last update."""
    initial = starting_point(make_problem(config), 0)
    server = ParameterServer(config, initial)
    sockets = SocketServer(server, VectorFormat.of(len(initial), initial.dtype, config.cluster))
    parent.send(sockets.endpoint)
    warm, begun = 0, 0.0
    while not server.stopping:
        sockets.serve(0.01)
        if not warm and server.version >= config.cluster.workers * WARM_UP:
            warm, begun = server.version, time.process_time()
        if server.ledger.ready:
            server.drain()
            sockets.deliver(server.go_on(time.monotonic()))
    parent.send((time.process_time() - begun) / (server.version - warm))
    parent.recv()  # the driver is done
    sockets.close()


class Player:
    """One worker, without a thread of its own."""

    def __init__(self, endpoint: Endpoint, worker: int) -> None:
        connection = SocketConnection(endpoint, worker)
        self.socket, self.frame = connection._socket, connection._frame
        self.push, self.start = connection._push, connection._push_start
        wire.copy_vector(connection._vector, np.full(DIM, 1e-3))
        self.gradient = bytes(self.push[HEADER.size :])
        self.worker = worker
        self.socket.sendall(wire.pack(wire.JOIN, worker))

    def answer(self) -> bool:
        """Answer a snapshot; return whether there was one."""
        got = self.socket.recv_into(self.frame)
        if got != len(self.push):
            return False  # told to stop
        _, _, _, sequence, version, epoch, _ = wire.SNAPSHOT_FIELDS.unpack_from(self.frame)
        gradient = Gradient(self.worker, sequence, version, epoch, np.empty(0), 0.0)
        wire.pack_push(self.push, self.start, gradient)
        self.push[HEADER.size :] = self.gradient
        self.socket.sendall(self.push)
        return True


def measure_server(workers: int, updates: int) -> tuple[float, float]:
    """Return updates/s after the warm-up, and the server's processor seconds per update."""
    config = make_config(
        {
            "problem": {"kind": "least_squares"},
            "optimizer": {"learning_rate": 1e-6},
            "cluster": {"workers": workers},
            "run": {"updates": updates, "eval_every": updates, "durability": "checkpoint"},
        }
    )
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(config, there))
    server.start()
    endpoint: Endpoint = here.recv()
    players = [Player(endpoint, worker) for worker in range(workers)]
    epoll = select.epoll()
    of = {player.socket.fileno(): player for player in players}
    for descriptor in of:
        epoll.register(descriptor, select.EPOLLIN)
    done, warm, begun, going = 0, 0, 0.0, True
    while going:
        for descriptor, _ in epoll.poll():
            going = going and of[descriptor].answer()
            done += going
        if not warm and done >= workers * WARM_UP:
            warm, begun = done, time.perf_counter()
    rate = (done - warm) / (time.perf_counter() - begun)
    cost: float = here.recv()
    here.send("done")
    server.join()
    for player in players:
        player.socket.close()
    return rate, cost


def measure_connections(counts: list[int], seconds: float, repeats: int) -> None:
    measured: dict[int, list[tuple[float, float]]] = {workers: [] for workers in counts}
    for _ in range(repeats):  # alternatives in turn
        for workers, found in measured.items():
            found.append(measure_server(workers, int(seconds * EXPECTED)))
    for workers, found in measured.items():
        rates, costs = zip(*found, strict=True)
        values = ", ".join(f"{rate:,.0f}" for rate in rates)
        print(
            f"{workers} connections: {statistics.median(rates):,.0f} updates/s ({values}), "
            f"{1e6 * statistics.median(costs):.0f} us of the server's processor time each"
        )


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[64, 200])
    parser.add_argument("--together", type=int, nargs="+", default=[25])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--connections", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=5)
    options: Any = parser.parse_args(arguments)
    if options.connections:
        measure_connections(options.connections, options.seconds, options.repeats)
        return
    for workers in options.workers:
        for together in options.together:
            measure_workers(workers, together, options.seconds)


if __name__ == "__main__":
    main()
