#!/usr/bin/env python3
"""Time and memory to write and to inspect a run of millions of updates.

.venv/bin/python scripts/bench_long.py [--updates 5000000] [--only-outlines] [--record counts]

Writes the directory of such a run, in parts like those of a server with eight workers, which are
merged as they age. Prints the time, the peak memory after each tenth, and the number of files. Then
runs, each in its own process, `asgd status`, `asgd runs` and, without --only-outlines, three reads
of the whole trace: all its columns, `asgd profile` and `asgd verify`. Prints seconds, processor
seconds and peak memory.

With --record counts the run keeps counts in place of its older rows, so its columns cannot be read.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from asgd.config.make import make_config
from asgd.rundir.columns import COUNTS
from asgd.rundir.writer import RunWriter

ROWS = 16_384  # in a part
WORKERS = 8
EVERY = 25  # updates between two losses
READ = "import sys; from asgd import read_run; print(read_run(sys.argv[1]).trace.shape)"


def make(path: Path, updates: int, record: str) -> None:
    rng = np.random.default_rng(0)
    run = {"updates": updates, "eval_every": EVERY, "record": record}
    tables = {"problem": {"kind": "quadratic"}, "cluster": {"workers": WORKERS}, "run": run}
    config = make_config(tables)
    writer = RunWriter.create(path, config)
    sequence, read_version = np.zeros(WORKERS, int), np.zeros(WORKERS, int)  # of each worker's next
    seconds, peaks, longest, begun = 0.0, [], 0.0, time.monotonic()
    for first in range(0, updates, ROWS):
        size = min(ROWS, updates - first)
        part = trace(rng, first, size, sequence, read_version, seconds)
        times = np.append(seconds, part["applied_seconds"])
        seconds = float(times[-1])
        start = time.monotonic()
        writer.trace(part)
        writer.count(config, first - 4 * ROWS)  # two checkpoints back
        longest = max(longest, time.monotonic() - start)
        due = np.arange(-(-first // EVERY) * EVERY, first + size, EVERY)
        writer.loss({"update": due, "seconds": times[due - first], "loss": 1 / (1 + due)})
        if len(peaks) < 10 * (first + size) // updates:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    writer.event("interrupted")
    print(
        f"written in {time.monotonic() - begun:.0f} s, the longest part with its merges and counts "
        f"in {longest:.1f} s; peak after each tenth: {', '.join(f'{p:.0f}' for p in peaks)} MB"
    )


def trace(
    rng: np.random.Generator,
    first: int,
    size: int,
    sequence: np.ndarray,
    read_version: np.ndarray,
    seconds: float,
) -> dict[str, np.ndarray]:
    """Return rows of a trace of random workers, each of which reads after its own update."""
    update = np.arange(first, first + size)
    worker = rng.integers(WORKERS, size=size)
    columns = {"update": update, "worker": worker, "batch_size": np.ones(size)}
    columns["sequence"], columns["read_version"] = np.empty(size, int), np.empty(size, int)
    for one in range(WORKERS):
        own = update[worker == one]
        columns["sequence"][own - first] = sequence[one] + np.arange(len(own))
        columns["read_version"][own - first] = [read_version[one], *(own[:-1] + 1)][: len(own)]
        sequence[one] += len(own)
        read_version[one] = own[-1] + 1 if len(own) else read_version[one]
    return columns | {
        "staleness": update - columns["read_version"],
        "compute_seconds": rng.exponential(2e-4, size),
        "applied_seconds": seconds + np.cumsum(rng.exponential(3e-5, size)),
        "gradient_norm": rng.exponential(1.0, size),
    }


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
    parser.add_argument("--only-outlines", action="store_true")
    parser.add_argument("--record", choices=("updates", "counts"), default="updates")
    arguments = parser.parse_args()
    updates = arguments.updates
    asgd = str(Path(sys.executable).with_name("asgd"))
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        # In another process, because children would inherit this memory in their peak.
        maker = get_context("spawn").Process(target=make, args=(run, updates, arguments.record))
        maker.start()
        maker.join()
        for table in ("trace", "loss.parquet"):
            parts = list((run / table).iterdir())
            size = sum(part.stat().st_size for part in parts) / 1e6
            print(f"{table}: {len(parts)} files, {size:.1f} MB", flush=True)
        if arguments.record == "counts":
            print(f"{COUNTS}: {(run / COUNTS).stat().st_size / 1e6:.1f} MB", flush=True)
        measure("asgd --help", asgd, "--help")
        measure("asgd status", asgd, "status", str(run))
        measure("asgd runs", asgd, "runs", place)
        if arguments.only_outlines:
            return
        if arguments.record == "updates":
            measure("the whole trace", sys.executable, "-c", READ, str(run))
        measure("asgd profile", asgd, "profile", str(run))
        measure("asgd verify --no-replay", asgd, "verify", "--no-replay", str(run))


if __name__ == "__main__":
    main()
