#!/usr/bin/env python3
"""Checks that processes that read a run exit cleanly: thousands of processes, six at a time.

.venv/bin/python scripts/bench_reading.py [--calls 2000] [--at-once 6]

Simulates a run of 20 000 updates. Each call is then a process, forked with all modules imported,
that reads the run and exits normally: `asgd runs`, `asgd status`, or all tables as in a notebook.
Before that, other processes read a table from memory that belongs to Python, until one aborts or
all calls are used. If none aborts, the machine is too idle for the result to mean anything. Prints
how many calls ended in which way. Exit status 1 if one of our reads did not end with 0.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pyarrow.parquet  # noqa: F401  # before the first fork: else each child imports it
import rich.live  # noqa: F401

from asgd.__main__ import main as asgd
from asgd.config.make import make_config
from asgd.rundir.reader import read_run
from asgd.rundir.summary import status
from asgd.simulation.simulate import simulate

UPDATES = 20_000
Call = Callable[[], object]


def from_memory_of_python(run: Path) -> None:
    for part in sorted(run.rglob("part-*.parquet")):
        pd.read_parquet(io.BytesIO(part.read_bytes()))


def as_a_notebook(run: Path) -> None:
    found = read_run(run)
    print(found, len(found.trace), len(found.loss), len(found.members), found.environment)
    print(status(found))


def start(call: Call) -> int:
    """Fork a process that makes a call and exits normally; return its id."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        call()
        sys.exit(0)
    return pid


def ends(
    calls: Sequence[Call], count: int, at_once: int, enough: int | None = None
) -> Counter[int]:
    """Make calls in turn and count their exit statuses; a signal is negative."""
    found: Counter[int] = Counter()
    running: set[int] = set()
    for number in range(count + at_once):
        if number < count and (enough is None or count_aborts(found) < enough):
            running.add(start(calls[number % len(calls)]))
        if running and (len(running) >= at_once or number >= count):
            pid, status = os.wait()
            running.discard(pid)
            found[os.waitstatus_to_exitcode(status)] += 1
    return found


def count_aborts(found: Counter[int]) -> int:
    return sum(number for status, number in found.items() if status != 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=6)
    options = parser.parse_args()
    runs, parent = Path(tempfile.mkdtemp()), os.getpid()
    try:
        failed = compare(runs, options.calls, options.at_once)
    finally:  # forked children run this too
        if os.getpid() == parent:
            shutil.rmtree(runs)
    sys.exit(failed)


def compare(runs: Path, calls: int, at_once: int) -> bool:
    """Make a run and read it `calls` times; return whether one of our calls failed."""
    gc.freeze()  # so that the collector does not copy pages shared with the children
    run = runs / "run"
    made = start(lambda: make(run))  # in a child, as its threads must not exist before a fork
    if os.waitpid(made, 0)[1]:
        sys.exit("the run could not be made")
    known = ends([lambda: from_memory_of_python(run)], calls, at_once, 1)
    print(f"from memory of Python: {dict(known)}")
    ours: list[Call] = [
        lambda: asgd(["runs", str(runs)]),
        lambda: asgd(["status", str(run)]),
        lambda: as_a_notebook(run),
    ]
    begun = time.monotonic()
    found = ends(ours, calls, at_once)
    print(f"ours: {dict(found)} in {time.monotonic() - begun:.0f} s")
    return count_aborts(found) > 0


def make(path: Path) -> None:
    tables = {"problem": {"kind": "quadratic"}, "run": {"updates": UPDATES, "eval_every": 100}}
    simulate(make_config(tables), path)


if __name__ == "__main__":
    main()
