#!/usr/bin/env python3
"""Time and memory to inspect a run of millions of updates.

.venv/bin/python scripts/bench_long.py [--updates 5000000]

Generates the record of such a run, in parts like those of a server with eight workers. Then runs,
each in its own process, `asgd status`, `asgd runs`, a read of all columns of the trace,
`asgd profile` and `asgd verify`. Prints seconds, processor seconds and peak memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from asgd.config import make_config
from asgd.rundir.writer import RunWriter

ROWS = 16_384  # in a part
WORKERS = 8
READ = "import sys; from asgd import read_run; print(read_run(sys.argv[1]).trace.shape)"


def make(path: Path, updates: int) -> None:
    rng = np.random.default_rng(0)
    run = {"updates": updates, "eval_every": 25}
    tables = {"problem": {"kind": "quadratic"}, "cluster": {"workers": WORKERS}, "run": run}
    writer = RunWriter.create(path, make_config(tables))
    worker = rng.integers(WORKERS, size=updates)
    order = np.argsort(worker, kind="stable")
    starts = np.searchsorted(worker[order], np.arange(WORKERS))
    sequence, read_version = np.empty(updates, np.int64), np.empty(updates, np.int64)
    sequence[order] = np.arange(updates) - starts[worker[order]]
    read_version[order] = np.concatenate([[0], order[:-1] + 1])
    read_version[order[starts]] = 0
    update = np.arange(updates)
    columns = {
        "update": update,
        "worker": worker,
        "sequence": sequence,
        "read_version": read_version,
        "staleness": update - read_version,
        "batch_size": np.ones(updates),
        "compute_seconds": rng.exponential(2e-4, updates),
        "applied_seconds": np.cumsum(rng.exponential(3e-5, updates)),
        "gradient_norm": rng.exponential(1.0, updates),
    }
    due = np.arange(0, updates + 1, 25)
    seconds = np.concatenate([[0.0], columns["applied_seconds"]])[due]
    for first in range(0, updates, ROWS):
        part = slice(first, first + ROWS)
        writer.trace({name: column[part] for name, column in columns.items()})
        there = (due >= first) & (due < first + ROWS)
        writer.loss({"update": due[there], "seconds": seconds[there], "loss": 1 / (1 + due[there])})
    writer.event("interrupted")


def measure(name: str, *command: str) -> None:
    begun, process = time.monotonic(), subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    print(
        f"{name}: {time.monotonic() - begun:.1f} s, of its processor "
        f"{used.ru_utime + used.ru_stime:.1f} s, {used.ru_maxrss / 1e3:.0f} MB, status {status}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=5_000_000)
    updates = parser.parse_args().updates
    asgd = str(Path(sys.executable).with_name("asgd"))
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        # In another process, because children would inherit this memory in their peak.
        maker = get_context("spawn").Process(target=make, args=(run, updates))
        maker.start()
        maker.join()
        parts = list((run / "trace").iterdir())
        size = sum(part.stat().st_size for part in parts) / 1e6
        print(f"{updates} updates in {len(parts)} parts, {size:.0f} MB", flush=True)
        measure("asgd --help", asgd, "--help")
        measure("asgd status", asgd, "status", str(run))
        measure("asgd runs", asgd, "runs", place)
        measure("the whole trace", sys.executable, "-c", READ, str(run))
        measure("asgd profile", asgd, "profile", str(run))
        measure("asgd verify --no-replay", asgd, "verify", "--no-replay", str(run))


if __name__ == "__main__":
    main()
