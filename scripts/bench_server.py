#!/usr/bin/env python3
"""Updates per second of a real run, compared with plain Ray calls and the machine's limits.

.venv/bin/python scripts/bench_server.py [SECTION ...] [--quick | --full] [--out figures]
.venv/bin/python scripts/bench_server.py --table figures/bench_server.csv

Sections (all by default):

loop      `cluster.run` with its recorder, over tcp and shm (with 4 workers and float64 also over
          ray), against an asynchronous parameter server like that in Ray's documentation: actor
          calls, a loop over `ray.wait` in the driver, no record
limits    the same runs against a bare socket echo of the same frames (d = 10) and against the
          memory bandwidth of one core for the bytes that the server moves (d = 1e6, tcp beside it)
rules     updates/s over shm under other update rules against plain SGD, beside the bound of memory
          traffic, which holds where nothing else counts (large d)
policies  gradients/s, applied or discarded, under other policies of the server and with epochs,
          over those of mode async
record    the cost of recording and of evaluating the loss
idle      the processor time of a server and of workers that wait
scaling   gradients that take 2, 10 and 50 ms: updates/s against the ideal workers / time, and the
          law of the staleness

Alternatives are measured in turn, within the same minute. Prints medians and their ratios; a CSV
file contains every measurement, for the figure and `--table`. The gradient of sections loop, limits
and idle is a constant vector that costs nothing, so they measure the parameter server alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from bench_peers import Discard, RayLoop, echo_rate, memory_bytes_per_second, server_bytes
from server_runs import actors, steady_rate
from server_shown import LOOP, TRANSPORTS, draw, markdown

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.rundir.reader import Run, read_run
from cluster import fleet, run
from cluster.local_ray.session import ray_session

# Expected updates per second; they only set the length of a measurement.
EXPECTED = {
    LOOP: {10: 900, 1000: 800, 100_000: 130, 1_000_000: 60},
    "ray": {10: 900, 1000: 800, 100_000: 130, 1_000_000: 60},
    "tcp": {10: 50_000, 1000: 40_000, 100_000: 4000, 1_000_000: 150},
    "shm": {10: 60_000, 1000: 50_000, 100_000: 9000, 1_000_000: 600},
}
ALL_DIMS = (10, 1000, 100_000, 1_000_000)
# Vectors that a rule reads and writes beside those of plain SGD, per update.
RULES = {
    "momentum": 2,
    "nesterov": 2,
    "adam": 4,
    "adamw": 4,
    "rmsprop": 2,
    "staleness_aware": 0,
    "delay_compensated": 3,  # the snapshot, and its copy from the parameters when it is sent
}
POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "discard_above 2": {"discard_above": 2},
    "buffered 4": {"mode": "buffered", "gradients_per_update": 4},
    "sync": {"mode": "sync"},
    "3 of 4": {"mode": "sync", "gradients_per_update": 3},
    "3 of 4, kept": {"mode": "sync", "gradients_per_update": 3, "late": "keep"},
    "epochs": {"sampling": "epoch"},
}
Rows = list[dict[str, Any]]


def configure(updates: int, problem: dict[str, Any], every: int, **cluster: Any) -> RunConfig:
    durability, rule = cluster.pop("durability", "auto"), cluster.pop("rule", "sgd")
    sampling = cluster.pop("sampling", "replacement")
    return make_config(
        {
            "problem": problem,
            "data": {"sampling": sampling},
            "optimizer": {"learning_rate": 1e-6, "rule": rule},
            "cluster": cluster,
            "run": {"updates": updates, "eval_every": every, "durability": durability},
        }
    )


def constant(dim: int, dtype: str = "float64") -> dict[str, Any]:
    return {"kind": "bench_peers:constant", "options": {"dim": dim, "dtype": dtype}}


def recorded(config: RunConfig) -> Run:
    """Run a configuration and return its record."""
    with tempfile.TemporaryDirectory() as directory:
        result = read_run(run(config, Path(directory) / "run"))
        _ = result.trace, result.members, result.discarded, result.events
        return result


def updates_in(system: str, dim: int, seconds: float) -> int:
    return max(50, int(seconds * EXPECTED[system][dim]))


def our_rate(
    transport: str, dim: int, workers: int, dtype: str, seconds: float, **settings: Any
) -> float:
    updates = updates_in(transport, dim, seconds)
    cluster = {"workers": workers, "transport": transport, **settings}
    return steady_rate(recorded(configure(updates, constant(dim, dtype), updates, **cluster)))


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
    print("updates/s, medians; in brackets the ratio to the Ray loop")
    for dim in options.dims or ((10, 100_000) if options.quick else ALL_DIMS):
        for workers in (4,) if options.quick else (1, 2, 4, 8):
            for dtype in ("float64", "float32"):
                if dtype == "float64" or options.full or (workers == 4 and not options.quick):
                    loop_cell(rows, options, dim, workers, dtype)


def loop_cell(rows: Rows, options: argparse.Namespace, dim: int, workers: int, dtype: str) -> None:
    peer = RayLoop(dim, workers, dtype)
    jobs = {LOOP: lambda: peer.rate(updates_in(LOOP, dim, options.seconds))}
    for transport in TRANSPORTS if (workers, dtype) == (4, "float64") else TRANSPORTS[1:]:
        jobs[transport] = lambda name=transport: our_rate(
            name, dim, workers, dtype, options.seconds
        )
    fields = {"dim": dim, "workers": workers, "dtype": dtype}
    median = in_turn(rows, "loop", options.repeats, jobs, **fields)
    peer.close()
    base = median.pop(LOOP)
    line = f"d={dim:<8} workers={workers} {dtype}  {LOOP} {base:,.0f}"
    for name, rate in median.items():
        line += f"  {name} {rate:,.0f} ({rate / base:.1f})"
    print(line, flush=True)


def section_limits(rows: Rows, options: argparse.Namespace) -> None:
    seconds, repeats = 2 * options.seconds, options.repeats
    jobs = {
        "echo": lambda: echo_rate(10, 4, int(seconds * 80_000)),
        "tcp": lambda: our_rate("tcp", 10, 4, "float64", seconds, durability="checkpoint"),
        "tcp, logged": lambda: our_rate("tcp", 10, 4, "float64", seconds, durability="log"),
    }
    median = in_turn(rows, "limits", repeats, jobs, dim=10, workers=4, dtype="float64")
    print(
        f"d=10, 4 workers: of {median['echo']:,.0f}/s bare echo tcp makes {median['tcp']:,.0f}/s "
        f"= {median['tcp'] / median['echo']:.0%}, every update logged "
        f"{median['tcp, logged']:,.0f}/s = {median['tcp, logged'] / median['echo']:.0%}",
        flush=True,
    )
    dim = 1_000_000
    for dtype in ("float64",) if options.quick else ("float64", "float32"):
        jobs = {
            "memory": lambda: memory_bytes_per_second(dim, seconds),
            "shm": lambda t=dtype: our_rate("shm", dim, 4, t, seconds),
            "tcp": lambda t=dtype: our_rate("tcp", dim, 4, t, seconds),
        }
        median = in_turn(rows, "limits", repeats, jobs, dim=dim, workers=4, dtype=dtype)
        moved = server_bytes(dim, dtype)
        limit = median["memory"] / moved
        print(
            f"d=1e6, {dtype}: shm {median['shm']:,.0f}/s of {limit:,.0f}/s "
            f"({moved / 1e6:.0f} MB per update at {median['memory'] / 1e9:.1f} GB/s) "
            f"= {median['shm'] / limit:.0%}; tcp {median['tcp']:,.0f}/s",
            flush=True,
        )


def section_rules(rows: Rows, options: argparse.Namespace) -> None:
    print("updates/s over shm, 4 workers; in brackets over plain SGD, and the bound of memory")
    for dim, dtype in points(options):
        jobs = {
            rule: lambda r=rule, d=dim, t=dtype: our_rate(
                "shm", d, 4, t, options.seconds, durability="checkpoint", rule=r
            )
            for rule in ("sgd", *RULES)
            if wanted(rule, options)
        }
        fields = {"dim": dim, "workers": 4, "dtype": dtype}
        median = in_turn(rows, "rules", options.repeats, jobs, **fields)
        base, moved = median.pop("sgd"), server_bytes(dim, dtype)
        line = f"d={dim:<8} {dtype}  sgd {base:,.0f}"
        for rule, rate in median.items():
            bound = moved / (moved + np.dtype(dtype).itemsize * dim * RULES[rule])
            line += f"  {rule} {rate:,.0f} ({rate / base:.2f}, bound {bound:.2f})"
        print(line, flush=True)


def section_policies(rows: Rows, options: argparse.Namespace) -> None:
    print("gradients/s over shm, 4 workers, applied or discarded; in brackets over plain")
    for dim, dtype in points(options):
        jobs = {
            name: lambda p=policy, d=dim, t=dtype: gradient_rate(d, t, options.seconds, p)
            for name, policy in POLICIES.items()
            if wanted(name, options)
        }
        fields = {"dim": dim, "workers": 4, "dtype": dtype}
        median = in_turn(rows, "policies", options.repeats, jobs, **fields)
        base = median.pop("plain")
        shares = (f"{name} {rate:,.0f} ({rate / base:.2f})" for name, rate in median.items())
        print(f"d={dim:<8} {dtype}  plain {base:,.0f}  {'  '.join(shares)}", flush=True)


def points(options: argparse.Namespace) -> list[tuple[int, str]]:
    """Return (d, dtype) of the sections rules and policies."""
    dims = options.dims or ((10, 1_000_000) if options.quick else ALL_DIMS)
    dtypes = ("float64",) if options.quick else ("float64", "float32")
    return [(dim, dtype) for dim in dims for dtype in dtypes]


def wanted(name: str, options: argparse.Namespace) -> bool:
    return options.only is None or name in ("sgd", "plain", *options.only)


def gradient_rate(dim: int, dtype: str, seconds: float, policy: dict[str, Any]) -> float:
    """Return gradients/s, applied or discarded."""
    updates = updates_in("shm", dim, seconds) // policy.get("gradients_per_update", 1)
    cluster = {"workers": 4, "transport": "shm", "durability": "checkpoint", **policy}
    result = recorded(configure(updates, constant(dim, dtype), updates, **cluster))
    gradients = (len(result.members) or len(result.trace)) + len(result.discarded)
    return steady_rate(result) * gradients / len(result.trace)


def section_record(rows: Rows, options: argparse.Namespace) -> None:
    updates = int(options.seconds * 40_000)

    def rate(every: int) -> float:
        return steady_rate(recorded(digits_run(updates, every)))

    jobs = {
        "nothing": lambda: unrecorded_rate(digits_run(updates, updates)),
        "the trace": lambda: rate(updates),
        "and the loss every 100": lambda: rate(100),
        "and the loss every 25": lambda: rate(25),
    }
    fields = {"dim": 650, "workers": 4, "dtype": "float64"}
    median = in_turn(rows, "record", options.repeats, jobs, **fields)
    nothing = median["nothing"]
    shares = [f"{name} {value:,.0f}/s = {value / nothing:.0%}" for name, value in median.items()]
    print(f"digits, 4 workers, updates/s when recorded is: {'; '.join(shares)}", flush=True)


def digits_run(updates: int, every: int) -> RunConfig:
    problem = {"kind": "softmax"}
    return configure(updates, problem, every, workers=4, transport="tcp", durability="checkpoint")


def unrecorded_rate(config: RunConfig) -> float:
    """Return updates/s, after the first record, of a run whose records go nowhere."""
    directory = tempfile.TemporaryDirectory()
    with directory, mock.patch.object(fleet, "RecorderActor", Discard):
        return float((run(config, Path(directory.name) / "run") / "rate").read_text())


def section_idle(rows: Rows, options: argparse.Namespace) -> None:
    print("processor time of one process while all workers compute, by sleeping, for 4 s")
    for transport in TRANSPORTS:
        law = {"law": "constant", "mean": 4.0}
        cluster = {"workers": 4, "transport": transport, "compute_time": law}
        config = configure(4, constant(10), 4, **cluster)
        used: dict[str, list[float]] = {}
        over = threading.Event()
        watching = threading.Thread(target=watch_idle, args=(over, used))
        watching.start()
        recorded(config)
        over.set()
        watching.join()
        for role, shares in used.items():
            share = statistics.median(shares)
            fields = {"dim": 10, "workers": 4, "dtype": "float64", "repeat": 0, "value": share}
            rows.append({"section": "idle", "system": f"{transport}, {role}", **fields})
        print(
            f"{transport}: " + ", ".join(f"{r} {statistics.median(s):.1%}" for r, s in used.items())
        )


def watch_idle(over: threading.Event, used: dict[str, list[float]]) -> None:
    """Record every second the share of a core used by each server and worker."""
    before: dict[Path, float] = {}
    while not over.wait(1.0):
        now = {}
        for process, role in actors():
            with suppress(OSError):  # the process has ended
                now[process] = processor_seconds(process)
            if role != "recorder" and process in now and process in before:
                used.setdefault(role, []).append(now[process] - before[process])
        before = now


def processor_seconds(process: Path) -> float:
    """Return the processor time of a process, given its directory in /proc."""
    fields = (process / "stat").read_text().rpartition(") ")[2].split()
    return sum(int(ticks) for ticks in fields[11:13]) / os.sysconf("SC_CLK_TCK")


def section_scaling(rows: Rows, options: argparse.Namespace) -> None:
    print("exponential compute times: updates/s, share of the ideal, staleness against geometric")
    for mean in (0.01,) if options.quick else (0.002, 0.010, 0.050):
        kept_up = 0
        for workers in (1, 4) if options.quick else (1, 4, 16, 32, 64):
            ideal = workers / mean
            updates = int(options.seconds * 6 * min(ideal, 10_000))
            law = {"law": "exponential", "mean": mean}
            cluster = {"workers": workers, "transport": "auto", "compute_time": law}
            start = time.perf_counter()
            result = recorded(configure(updates, constant(10), updates, **cluster))
            taken = time.perf_counter() - start - float(result.trace["applied_seconds"].iloc[-1])
            rate = steady_rate(result)
            staleness = result.trace["staleness"].to_numpy()[len(result.trace) // 10 :]
            p0 = float(np.mean(staleness == 0)) * workers
            spread = float(np.var(staleness)) / max(1, workers * (workers - 1))
            row = {"section": "scaling", "system": "auto", "dim": 10, "workers": workers}
            rows.append({**row, "compute": mean, "value": rate, "p0": p0, "variance": spread})
            kept_up = workers if rate >= 0.9 * ideal else kept_up
            print(
                f"{mean * 1e3:.0f} ms, {workers} workers: {rate:,.0f}/s = {rate / ideal:.0%}; "
                f"P p0 = {p0:.2f}, variance / P(P-1) = {spread:.2f}; start and end {taken:.1f} s",
                flush=True,
            )
        print(f"{mean * 1e3:.0f} ms: at least 90 % of the ideal up to {kept_up} workers")


SECTIONS: dict[str, Callable[[Rows, argparse.Namespace], None]] = {
    "loop": section_loop,
    "limits": section_limits,
    "rules": section_rules,
    "policies": section_policies,
    "record": section_record,
    "idle": section_idle,
    "scaling": section_scaling,
}


def parse(arguments: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="under two minutes, few points")
    parser.add_argument("--full", action="store_true", help="float32 with every number of workers")
    parser.add_argument("--repeats", type=int, help="default 5, quick 1")
    parser.add_argument("--seconds", type=float, help="seconds of a measurement; default 0.5")
    parser.add_argument(
        "--dims", type=int, nargs="+", choices=ALL_DIMS, help="of loop, rules and policies"
    )
    parser.add_argument("--only", nargs="+", help="rules or policies, beside plain SGD")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument(
        "--table", type=Path, metavar="CSV", help="print this file for cluster/README.md"
    )
    options = parser.parse_args(arguments)
    for name in options.sections:
        if name not in SECTIONS:
            parser.error(f"section {name}: expected one of {', '.join(SECTIONS)}")
    options.repeats = options.repeats or (1 if options.quick else 5)
    options.seconds = options.seconds or 0.5
    return options


def main(arguments: Iterable[str] | None = None) -> None:
    options = parse(arguments)
    if options.table is not None:
        print(markdown(pd.read_csv(options.table)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    rows: Rows = []
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start")
    with ray_session(object_store_bytes=2_000_000_000):
        for name in options.sections:
            SECTIONS[name](rows, options)
            pd.DataFrame(rows).to_csv(options.out / "bench_server.csv", index=False)
    if {"loop", "scaling"} <= set(options.sections):
        draw(pd.DataFrame(rows), options.out / "bench_server.svg")
    print(f"written to {options.out}/bench_server.csv")


if __name__ == "__main__":
    main()
