#!/usr/bin/env python3
"""Speed of a large simulation.

.venv/bin/python scripts/bench_simulation.py [--repeats 3]

Prints medians of processor and wall-clock seconds. The server has 10 000 workers, makes 1e6 updates
of a one-dimensional problem and writes its run directory. With a service time, gradients queue, so
the order is simulated event by event.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from asgd.config.make import make_config
from asgd.simulation.simulate import simulate

WORKERS, UPDATES = 10_000, 1_000_000


def one_server(service_time: float) -> None:
    config = make_config(
        {
            "problem": {"kind": "quadratic"},
            "optimizer": {"learning_rate": 1e-5},
            "cluster": {
                "workers": WORKERS,
                "compute_time": {"law": "exponential", "mean": 1.0},
            },
            "simulation": {"service_time": service_time},
            "run": {"updates": UPDATES, "eval_every": UPDATES // 100},
        }
    )
    with tempfile.TemporaryDirectory() as directory:
        simulate(config, Path(directory) / "run")


def measure(job: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Return the medians of processor and wall-clock seconds."""
    used, taken = [], []
    for _ in range(repeats):
        processor, wall = time.process_time(), time.perf_counter()
        job()
        used.append(time.process_time() - processor)
        taken.append(time.perf_counter() - wall)
    return statistics.median(used), statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    size = f"{WORKERS:,} workers, {UPDATES:,} updates"
    for name, service_time in (("no service time", 0.0), ("service time 1e-5 s", 1e-5)):
        used, taken = measure(lambda t=service_time: one_server(t), repeats)
        print(f"{size}, {name}: {used:.1f} s of processor, {taken:.1f} s", flush=True)


if __name__ == "__main__":
    main()
