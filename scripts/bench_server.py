#!/usr/bin/env python3
"""Updates per second of a real run, against plain Ray calls and against the machine's limits.

.venv/bin/python scripts/bench_server.py [SECTION ...] [--quick] [--out figures]

Sections (all by default):

loop      the whole of `cluster.run`, recorder and all, over ray, tcp and shm, against an
          asynchronous parameter server in the shape of the one in Ray's documentation: actor
          calls, a loop over `ray.wait` in the driver, nothing recorded
limits    the same runs against a bare socket echo of the same frames (d = 10) and against the
          memory bandwidth of one core for the bytes that the server moves (d = 1e6)
record    what recording and evaluating the loss cost a run
scaling   gradients that take 2, 10 and 50 ms: updates/s against the ideal workers / time, and the
          law of the staleness

What is compared is measured in turn, within the same minute; medians and their ratios are printed
and every single measurement goes into a CSV file. The gradient of sections loop, limits and
record is a constant vector that costs nothing: this measures the parameter server alone.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray

from asgd.config import RunConfig, make_config
from asgd.trace import Run, read_run
from cluster import run
from cluster.session import ray_session
from cluster.wire import HEADER

LOOP, TRANSPORTS = "Ray loop", ("ray", "tcp", "shm")
# Updates per second to be expected: they set how long a measurement takes, nothing else.
EXPECTED = {
    LOOP: {10: 900, 1000: 800, 100_000: 130, 1_000_000: 60},
    "ray": {10: 900, 1000: 800, 100_000: 130, 1_000_000: 60},
    "tcp": {10: 20_000, 1000: 15_000, 100_000: 1500, 1_000_000: 80},
    "shm": {10: 20_000, 1000: 18_000, 100_000: 3000, 1_000_000: 250},
}
Rows = list[dict[str, Any]]


class Constant:
    """A problem whose gradient costs nothing."""

    n_samples = 2

    def __init__(self, dim: int, dtype: str = "float64") -> None:
        self.dim = dim
        self._gradient = np.full(dim, 1e-3, dtype)

    def initial_point(self, rng: np.random.Generator) -> np.ndarray:
        return np.zeros(self.dim)

    def loss(self, x: np.ndarray) -> float:
        return float(np.mean(x))

    def gradient(self, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return self._gradient


def constant(dim: int) -> Constant:
    """Make the problem: a plug-in, `bench_server:constant`."""
    return Constant(dim)


# --- Ray's documentation ------------------------------------------------------------------------


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


def loop_rate(dim: int, workers: int, dtype: str, updates: int) -> float:
    """Return updates/s of the asynchronous loop: each gradient is applied as it comes."""
    server = ray.remote(LoopServer).options(num_cpus=0).remote(dim, dtype)
    actors = [ray.remote(LoopWorker).options(num_cpus=0).remote(dim, dtype) for _ in range(workers)]
    weights = server.weights.remote()
    pending = {actor.gradient.remote(weights): actor for actor in actors}
    warm = max(2 * workers, updates // 10)
    start = 0.0
    for update in range(warm + updates):
        if update == warm:
            ray.get(weights)
            start = time.perf_counter()
        (ready,), _ = ray.wait(list(pending), num_returns=1)
        actor = pending.pop(ready)
        weights = server.apply.remote(ready)
        pending[actor.gradient.remote(weights)] = actor
    ray.get(weights)
    rate = updates / (time.perf_counter() - start)
    for actor in (server, *actors):
        ray.kill(actor)
    return rate


# --- this project -------------------------------------------------------------------------------


def configure(updates: int, problem: dict[str, Any], every: int, **cluster: Any) -> RunConfig:
    return make_config(
        {
            "problem": problem,
            "optimizer": {"learning_rate": 1e-6},
            "cluster": cluster,
            "run": {"updates": updates, "eval_every": every},
        }
    )


def recorded(config: RunConfig) -> Run:
    """Run a configuration and return its record."""
    with tempfile.TemporaryDirectory() as directory:
        result = read_run(run(config, Path(directory) / "run"))
        _ = result.trace, result.events
        return result


def steady_rate(result: Run) -> float:
    """Return updates/s after the first tenth of a run."""
    seconds = result.trace["applied_seconds"].to_numpy()
    first = len(seconds) // 10
    return float((len(seconds) - 1 - first) / (seconds[-1] - seconds[first]))


def our_rate(transport: str, dim: int, workers: int, dtype: str, updates: int) -> float:
    problem = {"kind": "bench_server:constant", "options": {"dim": dim}}
    config = configure(
        updates, problem, updates, workers=workers, transport=transport, wire_dtype=dtype
    )
    return steady_rate(recorded(config))


def measure(system: str, dim: int, workers: int, dtype: str, seconds: float) -> float:
    updates = max(50, int(seconds * EXPECTED[system][dim]))
    if system == LOOP:
        return loop_rate(dim, workers, dtype, updates)
    return our_rate(system, dim, workers, dtype, updates)


# --- limits -------------------------------------------------------------------------------------


class EchoServer:
    """Sends every frame back: what any server over these sockets does at the least."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))

    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def serve(self, clients: int, size: int, frames: int) -> float:
        """Return frames/s, after the first tenth."""
        epoll, peers = select.epoll(), {}
        for _ in range(clients):
            peer, _ = self.listener.accept()
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.setblocking(False)
            peers[peer.fileno()] = peer
            epoll.register(peer, select.EPOLLIN)
        data, done, start = memoryview(bytearray(size)), 0, 0.0
        first = frames // 10
        while done < frames:
            for descriptor, _ in epoll.poll():
                peer = peers[descriptor]
                if peer.recv_into(data) == size:
                    peer.send(data)
                    done += 1
                    if done == first:
                        start = time.perf_counter()
        rate = (done - first) / (time.perf_counter() - start)
        for peer in peers.values():
            peer.close()
        epoll.close()
        return rate


class EchoClient:
    """Sends a frame whenever the last one is back."""

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
    size = HEADER.size + 8 * dim
    server = ray.remote(EchoServer).options(num_cpus=0).remote()
    clients = [ray.remote(EchoClient).options(num_cpus=0).remote() for _ in range(workers)]
    port = ray.get(server.port.remote())
    for client in clients:
        client.echo.remote(port, size)
    rate: float = ray.get(server.serve.remote(workers, size, frames))
    for actor in (server, *clients):
        ray.kill(actor)
    return rate


def memory_bytes_per_second(dim: int, seconds: float) -> float:
    """Return what one core copies, read and written, between as many vectors as a run has."""
    vectors = [np.ones(dim) for _ in range(10)]
    end, count, start = time.perf_counter() + seconds, 0, time.perf_counter()
    while time.perf_counter() < end:
        np.copyto(vectors[count % 10], vectors[(count + 5) % 10])
        count += 1
    return 2 * 8 * dim * count / (time.perf_counter() - start)


def server_bytes(dim: int, dtype: str) -> int:
    """Return the bytes that the server reads and writes for one update over shared memory.

    The norm reads g; the step reads g and is written; the parameters and the step are read and
    the parameters written; the snapshot reads them and is written. A gradient in float32 is first
    converted, and the snapshot is half as long.
    """
    wire = np.dtype(dtype).itemsize
    convert = (wire + 8) if wire == 4 else 0
    return dim * (convert + 8 + 16 + 24 + 8 + wire)


# --- sections -----------------------------------------------------------------------------------


def in_turn(
    rows: Rows, section: str, repeats: int, jobs: dict[str, Callable[[], float]], **fields: Any
) -> dict[str, float]:
    """Measure each job `repeats` times, one after the other; return the medians."""
    values: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats):
        for name, job in jobs.items():
            value = job()
            values[name].append(value)
            row = {"section": section, "system": name, **fields, "repeat": repeat}
            rows.append({**row, "value": value})
    return {name: statistics.median(v) for name, v in values.items()}


def section_loop(rows: Rows, options: argparse.Namespace) -> None:
    quick = options.quick
    print("updates/s, medians; in brackets the ratio to the Ray loop")
    for dim in (10, 100_000) if quick else (10, 1000, 100_000, 1_000_000):
        for workers in (4,) if quick else (1, 2, 4, 8):
            for dtype in ("float64",) if quick else ("float64", "float32"):
                jobs = {
                    system: lambda s=system, d=dim, w=workers, t=dtype: measure(
                        s, d, w, t, options.seconds
                    )
                    for system in (LOOP, *TRANSPORTS)
                }
                fields = {"dim": dim, "workers": workers, "dtype": dtype}
                median = in_turn(rows, "loop", options.repeats, jobs, **fields)
                line = f"d={dim:<8} workers={workers} {dtype}  {LOOP} {median[LOOP]:,.0f}"
                for name in TRANSPORTS:
                    line += f"  {name} {median[name]:,.0f} ({median[name] / median[LOOP]:.1f})"
                print(line, flush=True)


def section_limits(rows: Rows, options: argparse.Namespace) -> None:
    seconds, repeats = options.seconds, options.repeats
    jobs = {
        "echo": lambda: echo_rate(10, 4, int(seconds * 30_000)),
        "tcp": lambda: measure("tcp", 10, 4, "float64", seconds),
    }
    median = in_turn(rows, "limits", repeats, jobs, dim=10, workers=4, dtype="float64")
    print(
        f"d=10, 4 workers: tcp {median['tcp']:,.0f}/s of {median['echo']:,.0f}/s bare echo "
        f"= {median['tcp'] / median['echo']:.0%}",
        flush=True,
    )
    dim = 1_000_000
    for dtype in ("float64",) if options.quick else ("float64", "float32"):
        jobs = {
            "memory": lambda: memory_bytes_per_second(dim, seconds),
            "shm": lambda t=dtype: measure("shm", dim, 4, t, seconds),
        }
        median = in_turn(rows, "limits", repeats, jobs, dim=dim, workers=4, dtype=dtype)
        moved = server_bytes(dim, dtype)
        limit = median["memory"] / moved
        print(
            f"d=1e6, {dtype}: shm {median['shm']:,.0f}/s of {limit:,.0f}/s "
            f"({moved / 1e6:.0f} MB per update at {median['memory'] / 1e9:.1f} GB/s) "
            f"= {median['shm'] / limit:.0%}",
            flush=True,
        )


def section_record(rows: Rows, options: argparse.Namespace) -> None:
    updates = int(options.seconds * 10_000)
    problem = {"kind": "softmax"}

    def rate(every: int) -> float:
        config = configure(updates, problem, every, workers=4, transport="tcp")
        return steady_rate(recorded(config))

    jobs = {"never": lambda: rate(updates), "every 25": lambda: rate(25)}
    median = in_turn(rows, "record", options.repeats, jobs, dim=650, workers=4, dtype="float64")
    print(
        f"digits, loss never evaluated {median['never']:,.0f}/s, every 25 updates "
        f"{median['every 25']:,.0f}/s = {median['every 25'] / median['never']:.0%}",
        flush=True,
    )


def section_scaling(rows: Rows, options: argparse.Namespace) -> None:
    print("exponential compute times: updates/s, share of the ideal, staleness against geometric")
    problem = {"kind": "bench_server:constant", "options": {"dim": 10}}
    times = (0.01,) if options.quick else (0.002, 0.010, 0.050)
    for mean in times:
        for workers in (1, 4) if options.quick else (1, 2, 4, 8, 16, 32, 64):
            ideal = workers / mean
            updates = int(options.seconds * 2 * min(ideal, 10_000))
            law = {"law": "exponential", "mean": mean}
            config = configure(
                updates, problem, updates, workers=workers, transport="auto", compute_time=law
            )
            result = recorded(config)
            rate = steady_rate(result)
            staleness = result.trace["staleness"].to_numpy()[len(result.trace) // 10 :]
            p0 = float(np.mean(staleness == 0)) * workers
            spread = float(np.var(staleness)) / max(1, workers * (workers - 1))
            row = {"section": "scaling", "system": "auto", "dim": 10, "workers": workers}
            rows.append({**row, "compute": mean, "value": rate, "p0": p0, "variance": spread})
            print(
                f"{mean * 1e3:.0f} ms, {workers} workers: {rate:,.0f}/s = {rate / ideal:.0%}; "
                f"P p0 = {p0:.2f}, variance / P(P-1) = {spread:.2f}",
                flush=True,
            )


SECTIONS: dict[str, Callable[[Rows, argparse.Namespace], None]] = {
    "loop": section_loop,
    "limits": section_limits,
    "record": section_record,
    "scaling": section_scaling,
}


def draw(rows: Rows, path: Path) -> None:
    """Draw the medians of section loop: updates/s against d for each system."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    table = pd.DataFrame(rows)
    table = table[(table["section"] == "loop") & (table["dtype"] == "float64")]
    most = table["workers"].value_counts().index[0]
    median = table[table["workers"] == most].groupby(["system", "dim"])["value"].median()
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for system in (LOOP, *TRANSPORTS):
        line = median[system]
        axes.loglog(line.index, line.to_numpy(), "o-", label=system)
    axes.set(xlabel="parameters d", ylabel="updates per second", title=f"{most} workers, float64")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="under two minutes, few points")
    parser.add_argument("--repeats", type=int, help="default 5, quick 1")
    parser.add_argument("--seconds", type=float, help="of one measurement; default 2, quick 0.5")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)
    for name in options.sections:
        if name not in SECTIONS:
            parser.error(f"section {name}: expected one of {', '.join(SECTIONS)}")
    options.repeats = options.repeats or (1 if options.quick else 5)
    options.seconds = options.seconds or (0.5 if options.quick else 2.0)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: Rows = []
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f} before the start")
    with ray_session(object_store_bytes=2_000_000_000):
        for name in options.sections:
            SECTIONS[name](rows, options)
            pd.DataFrame(rows).to_csv(options.out / "bench_server.csv", index=False)
    if "loop" in options.sections:
        draw(rows, options.out / "bench_server.svg")
    print(f"written to {options.out}/bench_server.csv")


if __name__ == "__main__":
    main()
