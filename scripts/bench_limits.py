#!/usr/bin/env python3
"""Measures the time of `analysis.stability_limits`, and prints the limits with their errors.

.venv/bin/python scripts/bench_limits.py [--workers 2 4 8 16 32 64 128 512] [--rules sgd]

One row per compute-time law, rule and number of workers: processor seconds, wall-clock seconds,
and the limits of the mean, of the mean square and of almost every run. Everything is compiled and
imported before the first row.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

import analysis
from asgd.delays import ComputeTime

TIMES: dict[str, dict[str, Any]] = {
    "exponential": {"law": "exponential"},
    "one 4 times slower": {"law": "exponential"},
    "lognormal 1": {"law": "lognormal", "variation": 1.0},
    "gamma .5": {"law": "gamma", "variation": 0.5},
    "constant": {"law": "constant"},
}
RULES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum .9": {"momentum": 0.9},
    "eta/(1+tau)": {"staleness_aware": True},
}


def compute_times(name: str, workers: int) -> ComputeTime:
    """Return the times of so many workers, of mean one second."""
    mean = np.ones(workers)
    if name == "one 4 times slower":
        mean[-1] = 4.0
    return ComputeTime(mean=mean, **TIMES[name])


def header() -> str:
    """Return the names of the columns, which end where those of `row` do."""
    known = f"{'compute times':20} {'rule':12} {'P':>4} {'processor':>9} {'wall':>8}"
    return " ".join([known, *(f"{name:>21}" for name in ("mean", "mean square", "almost sure"))])


def row(times: str, rule: str, workers: int) -> str:
    """Return one row of the table."""
    server = compute_times(times, workers)
    processor, wall = time.process_time(), time.perf_counter()
    limits = analysis.stability_limits(server, **RULES[rule])
    used, taken = time.process_time() - processor, time.perf_counter() - wall
    cells = [f"{times:20} {rule:12} {workers:4} {used:9.2f} {taken:8.2f}"]
    for limit in (limits.mean, limits.mean_square, limits.almost_sure):
        cells.append(f"{limit.value:10.4g} +- {limit.error:7.2g}" if limit else f"{'':21}")
    return " ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 128, 512])
    parser.add_argument("--times", nargs="+", choices=TIMES, default=list(TIMES))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    asked = parser.parse_args()
    for rule in RULES.values():
        analysis.stability_limits(compute_times("gamma .5", 2), **rule)
    print(header())
    for rule in asked.rules:
        for times in asked.times:
            for workers in asked.workers:
                print(row(times, rule, workers), flush=True)


if __name__ == "__main__":
    main()
