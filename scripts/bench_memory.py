#!/usr/bin/env python3
"""Memory of a run's processes, in vectors of its parameters.

.venv/bin/python scripts/bench_memory.py [--dim 10_000_000] [--workers 8] [--updates 60]

For both precisions, and over tcp and shared memory: the peak memory of the server, a worker and the
recorder during a run, minus that of the same process in a run with 20,000 parameters, which is
printed after it: that of Python and of libraries, the compiler of update rules included. The first
number is private memory; the one in brackets adds memory shared with other processes (vectors in
shared memory, and Ray's objects). The gradient is a constant vector, which counts as one of the
worker's; the loss is evaluated every tenth update.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from server_runs import ROLES, actors

from asgd.config.make import make_config
from cluster import run
from cluster.local_ray.session import ray_session

POLL_SECONDS = 0.005
LIBRARIES_DIM = 20_000  # little memory, but more than `asgd.rules.base.BLOCK`
Peaks = dict[str, tuple[int, int]]  # by role: private, and with shared memory, in bytes


def watch(over: threading.Event, older: set[Path], peaks: Peaks) -> None:
    """Record the peak memory of any process of each role, except older processes."""
    while not over.wait(POLL_SECONDS):
        for process, role in actors():
            if process in older:
                continue
            with suppress(OSError):
                lines = (process / "status").read_text().splitlines()
                sizes = {line.split(":")[0]: line.split()[1] for line in lines if "kB" in line}
                private, shared = (1024 * int(sizes.get(k, 0)) for k in ("RssAnon", "RssShmem"))
                before = peaks.get(role, (0, 0))
                peaks[role] = max(before[0], private), max(before[1], private + shared)


def measured(dim: int, dtype: str, transport: str, options: argparse.Namespace) -> Peaks:
    """Run, and return the peaks."""
    config = make_config(
        {
            "problem": {
                "kind": "bench_peers:constant",
                "options": {"dim": dim, "dtype": dtype},
            },
            "optimizer": {"learning_rate": 1e-6},
            "cluster": {"workers": options.workers, "transport": transport},
            "run": {"updates": options.updates, "eval_every": 10, "checkpoint_every": 30},
        }
    )
    peaks: Peaks = {}
    over = threading.Event()
    older = {process for process, _ in actors()}
    watching = threading.Thread(target=watch, args=(over, older, peaks))
    with tempfile.TemporaryDirectory() as directory:
        watching.start()
        try:
            run(config, Path(directory) / "run")
        finally:
            over.set()
            watching.join()
    return peaks


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--precisions", nargs="+", default=["float64", "float32"])
    options: Any = parser.parse_args(arguments)
    vectors = 4 * (options.workers + 8)
    with ray_session(object_store_bytes=100_000_000 + vectors * 8 * options.dim):
        for transport in ("tcp", "shm"):
            for dtype in options.precisions:
                small = measured(LIBRARIES_DIM, dtype, transport, options)
                large = measured(options.dim, dtype, transport, options)
                size = options.dim * (8 if dtype == "float64" else 4)
                line = f"{transport}, {dtype}, {options.workers} workers:"
                for role in ROLES.values():
                    own, whole = (
                        (a - b) / size for a, b in zip(large[role], small[role], strict=True)
                    )
                    line += f"  {role} {own:.1f} ({whole:.1f})"
                    line += f" + {small[role][0] / 1e6:.0f} MB"
                print(line, flush=True)


if __name__ == "__main__":
    main()
