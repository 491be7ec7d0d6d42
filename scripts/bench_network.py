#!/usr/bin/env python3
"""Updates per second over a network, compared with the capacity of its links and plain Ray calls.

.venv/bin/python -m scripts.bench_network [--quick] [--numbers float64 ...] [--out FILE.csv]
.venv/bin/python -m scripts.bench_network --ours --compressions none int8 top_k --upload 10mbit

Three hosts with networks of their own on this machine (`tests/support/hosts.py`; it needs root):
the driver and the server on one, two workers on each of the others. Every link has the same rate in
both directions, unless `--upload` gives another one to what the workers' hosts send. An update
takes a gradient to the server and a snapshot from it; the capacity is that of the slower direction,
with packet headers. The gradient is a constant vector that costs nothing; a compression costs what
it does elsewhere. The loop is that of Ray's documentation (`bench_peers.RayLoop`), its server and
its workers on the same hosts. With "bfloat16", our messages are rounded to it, and our parameters
and the loop's messages are float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray

from asgd.config.make import make_config
from asgd.rundir.reader import read_run
from cluster.sockets.compressed import gradient_nbytes
from cluster.sockets.wire import VectorFormat
from scripts.bench_peers import RayLoop
from scripts.server_runs import steady_rate
from tests.support.ray_hosts import RayHosts, ray_hosts

RATES = {"10mbit": 10e6, "100mbit": 100e6, "1gbit": 1e9}  # bits per second, as `tc` reads them
DIMS = (10_000, 100_000, 1_000_000)
NUMBERS = ("float64", "float32", "bfloat16")
COMPRESSIONS = ("none", "int8", "top_k")
WORKERS = 4
LEAST = 100  # updates of a measurement, as gradients that share a link arrive 4 at a time
PACKET, PAYLOAD = 1514, 1448  # bytes of a packet on a link, and those of a vector in it
HEALTH = {"period_ms": 5000, "timeout_ms": 30_000, "failure_threshold": 5}  # of Ray; never needed


def allowed(rate: float, upload: float, dim: int, cluster: dict[str, Any]) -> float:
    """Return the capacity of the links, in updates/s.

    The server's link carries snapshots at its rate, and gradients as fast as both hosts upload.
    """
    settings = make_config({"cluster": cluster}).cluster
    vectors = VectorFormat.of(dim, np.dtype(precision(settings.wire_dtype)), settings)
    snapshots = rate / 8 / vectors.nbytes
    gradients = min(rate, 2 * upload) / 8 / gradient_nbytes(vectors)
    return min(snapshots, gradients) * PAYLOAD / PACKET


def precision(numbers: str) -> str:
    """Return the type of the parameters."""
    return "float64" if numbers == "float64" else "float32"


def our_rate(cluster: RayHosts, dim: int, settings: dict[str, Any], seconds: float) -> float:
    """Return updates/s of a run after its first tenth."""
    tables = {
        "problem": {
            "kind": "scripts.bench_peers:constant",
            "options": {"dim": dim, "dtype": precision(settings["wire_dtype"])},
        },
        "optimizer": {"learning_rate": 1e-6},
        "cluster": {"workers": WORKERS, "transport": "tcp", **settings},
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


def measured(rate: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row per dimension, kind of numbers and compression."""
    seconds, upload = 5.0 if options.quick else 20.0, options.upload or rate
    with tempfile.TemporaryDirectory() as home, ray_hosts(3, Path(home), HEALTH, rate) as cluster:
        cluster.complete(dict.fromkeys(cluster.hosts[1:], ("--num-cpus=2",)))
        limit = ("root", "tbf", "rate", upload, "burst", "256kb", "latency", "100ms")
        for host in cluster.hosts[1:]:
            host.call("tc", "qdisc", "replace", "dev", "eth0", *limit)
        for dim, numbers, compression in product(
            options.dims, options.numbers, options.compressions
        ):
            settings = {"wire_dtype": numbers, "compression": compression}
            most = allowed(RATES[rate], RATES[upload], dim, settings)
            ours = our_rate(cluster, dim, settings, max(seconds, LEAST / most))
            row = {"link": rate, "upload": upload, "d": dim, **settings}
            row |= {"allowed": most, "ours": ours, "of_allowed": ours / most}
            if not options.ours:
                updates = max(LEAST, int(seconds * min(most, 300.0) / 2))
                loop = loop_rate(cluster, dim, precision(numbers), updates)
                row |= {"loop": loop, "over_loop": ours / loop}
            yield {**row, "load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="mostly 5 s each")
    parser.add_argument("--links", nargs="+", choices=RATES, default=["100mbit", "1gbit"])
    parser.add_argument("--upload", choices=RATES, help="of a worker's host, by default its link's")
    parser.add_argument("--dims", nargs="+", type=int, default=DIMS)
    parser.add_argument("--numbers", nargs="+", choices=NUMBERS, default=NUMBERS)
    parser.add_argument("--compressions", nargs="+", choices=COMPRESSIONS, default=["none"])
    parser.add_argument("--ours", action="store_true", help="without Ray's loop")
    parser.add_argument("--out", type=Path, help="a CSV file")
    parser.add_argument("--loop", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        dim, dtype, updates = options.loop
        make_loop(int(dim), dtype, int(updates))
        return
    rows = []
    for rate in options.links:
        for row in measured(rate, options):
            rows.append(row)
            print(*(f"{name}={value}" for name, value in row.items()), flush=True)
    print(f"\n{pd.DataFrame(rows).to_string(index=False, float_format='{:.3g}'.format)}")
    if options.out:
        pd.DataFrame(rows).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
