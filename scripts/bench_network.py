#!/usr/bin/env python3
"""Updates per second over a network, compared with the capacity of its links and plain Ray calls.

.venv/bin/python -m scripts.bench_network [--quick] [--numbers float64 ...] [--out FILE.csv]

Three hosts with networks of their own on this machine (`tests/support/hosts.py`; it needs root):
the driver and the server on one, two workers on each of the others. Every link has the same rate in
both directions, so the server's link is the bottleneck: an update takes a gradient to it and a
snapshot from it. Its capacity is its rate divided by the bytes of a vector with packet headers. The
gradient is a constant vector that costs nothing. The loop is that of Ray's documentation
(`bench_peers.RayLoop`), its server and its workers on the same hosts. With "bfloat16", our messages
are rounded to it, and our parameters and the loop's messages are float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import ray

from asgd.arrays import number_type
from asgd.rundir.reader import read_run
from scripts.bench_peers import RayLoop
from scripts.server_runs import steady_rate
from tests.support.ray_hosts import RayHosts, ray_hosts

RATES = {"100mbit": 100e6, "1gbit": 1e9}  # bits per second, as `tc` reads them
DIMS = (10_000, 100_000, 1_000_000)
NUMBERS = ("float64", "float32", "bfloat16")
WORKERS = 4
LEAST = 100  # updates of a measurement, as gradients that share a link arrive 4 at a time
PACKET, PAYLOAD = 1514, 1448  # bytes of a packet on a link, and those of a vector in it
HEALTH = {"period_ms": 5000, "timeout_ms": 30_000, "failure_threshold": 5}  # of Ray; never needed


def allowed(rate: float, dim: int, numbers: str) -> float:
    """Return the capacity of a link in each direction, in updates/s."""
    return rate / 8 / (dim * number_type(numbers).itemsize * PACKET / PAYLOAD)


def precision(numbers: str) -> str:
    """Return the type of the parameters."""
    return "float64" if numbers == "float64" else "float32"


def our_rate(cluster: RayHosts, dim: int, numbers: str, seconds: float) -> float:
    """Return updates/s of a run after its first tenth."""
    tables = {
        "problem": {
            "kind": "scripts.bench_peers:constant",
            "options": {"dim": dim, "dtype": precision(numbers)},
        },
        "optimizer": {"learning_rate": 1e-6},
        "cluster": {"workers": WORKERS, "transport": "tcp", "wire_dtype": numbers},
        "run": {"updates": 10**9, "eval_every": 10**9, "max_seconds": seconds},
    }
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "run.json"
        config.write_text(json.dumps(tables))
        with cluster.run(config, Path(directory) / "run") as process:
            said = process.communicate()[1]
        if process.returncode:
            raise SystemExit(said)
        return steady_rate(read_run(Path(directory) / "run"))


def loop_rate(cluster: RayHosts, dim: int, dtype: str, updates: int) -> float:
    """Return updates/s of Ray's loop, which runs in another process on the first host."""
    said = cluster.call(
        cluster.hosts[0],
        *(sys.executable, "-m", "scripts.bench_network", "--loop", str(dim), dtype, str(updates)),
    )
    return float(said.splitlines()[-1])


def make_loop(dim: int, dtype: str, updates: int) -> None:
    """Run Ray's loop, with its processes on the same nodes as ours, and print its rate."""
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    loop = RayLoop(dim, WORKERS, dtype, [here, *others * (WORKERS // len(others))])
    print(loop.rate(updates))
    loop.close()


def measured(rate: str, kinds: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a row per dimension and kind of numbers."""
    with tempfile.TemporaryDirectory() as home, ray_hosts(3, Path(home), HEALTH, rate) as cluster:
        cluster.complete(dict.fromkeys(cluster.hosts[1:], ("--num-cpus=2",)))
        for dim in DIMS:
            for numbers in kinds:
                most = allowed(RATES[rate], dim, numbers)
                ours = our_rate(cluster, dim, numbers, max(seconds, LEAST / most))
                updates = max(LEAST, int(seconds * min(most, 300.0) / 2))
                loop = loop_rate(cluster, dim, precision(numbers), updates)
                yield {
                    "link": rate,
                    "d": dim,
                    "numbers": numbers,
                    "allowed": most,
                    "ours": ours,
                    "of_allowed": ours / most,
                    "loop": loop,
                    "over_loop": ours / loop,
                    "load": os.getloadavg()[0],
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="mostly 5 s each")
    parser.add_argument("--numbers", nargs="+", choices=NUMBERS, default=NUMBERS)
    parser.add_argument("--out", type=Path, help="a CSV file")
    parser.add_argument("--loop", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        dim, dtype, updates = options.loop
        make_loop(int(dim), dtype, int(updates))
        return
    seconds = 5.0 if options.quick else 20.0
    rows = []
    for rate in RATES:
        for row in measured(rate, options.numbers, seconds):
            rows.append(row)
            print(*(f"{name}={value}" for name, value in row.items()), flush=True)
    print(f"\n{pd.DataFrame(rows).to_string(index=False, float_format='{:.3g}'.format)}")
    if options.out:
        pd.DataFrame(rows).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
