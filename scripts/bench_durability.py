#!/usr/bin/env python3
"""Measures the cost of the record, the checkpoints and the write-ahead log of a run.

.venv/bin/python scripts/bench_durability.py [CASE ...] [--repeats 5] [--seconds 2] [--out figures]

The same run, in turn, with the same server, workers and sockets:

nothing      the server records nothing: no trace, no loss, no checkpoint, no log
recorded     the trace, and a checkpoint every 1000 updates
evaluated    the same, and the loss every 25 updates, which the recorder computes
logged       the same, and the write-ahead log

for softmax regression on the digits data (case "digits", d = 650) and for constant gradients of
10, 1000 and 10000 numbers ("free-10", ...), the worst case: they cost nothing, so the server does
all the work. Prints updates/s and processor seconds per update of the server, as medians of their
ratio to "nothing" in the same repeat. On a shared machine, processor seconds are more reliable.

The first measurement is the log alone, by number of parameters: processor seconds of a server in
this process, alternately with and without the log, and the size of the log of 1000 updates.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.problems.base import starting_point
from asgd.problems.make import make_problem
from asgd.rundir.checkpoint import CHECKPOINTS
from asgd.rundir.writer import RunWriter
from cluster.actors import ASIDE, RecorderActor, ServerActor, WorkerActor
from cluster.core.ledger import Ledger
from cluster.core.messages import Gradient
from cluster.core.server import ParameterServer
from cluster.local_ray.session import ray_session
from cluster.storage.lease import Lease
from cluster.storage.write_ahead import WriteAheadLog

NEVER = 10**9
# Evaluations and checkpoints every so many updates, and the durability.
VARIANTS: dict[str, tuple[int, int, str]] = {
    "nothing": (NEVER, NEVER, "checkpoint"),
    "recorded": (NEVER, 1000, "checkpoint"),
    "evaluated": (25, 1000, "checkpoint"),
    "logged": (25, 1000, "log"),
}
# Name: problem, and expected updates per second, which set the length of a measurement.
FREE = "bench_peers:constant"
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "digits": ({"kind": "softmax"}, 25_000),
    "free-10": ({"kind": FREE, "options": {"dim": 10}}, 40_000),
    "free-1000": ({"kind": FREE, "options": {"dim": 1000}}, 30_000),
    "free-10000": ({"kind": FREE, "options": {"dim": 10_000}}, 12_000),
}
LARGEST_LOGGED = 1000  # above this dimension, the log of a run would fill the disk


class Silent(Ledger):
    """Records nothing."""

    def update(self, update: Any) -> None:
        pass

    def evaluation(
        self, update: int, seconds: float, parameters: Any, *, needed: bool = False
    ) -> None:
        pass


class TimedServer(ServerActor):
    """Reports the seconds of the run and its processor seconds."""

    async def silence(self) -> None:
        self._server.ledger = Silent()

    async def cost(self) -> tuple[float, float]:
        return self._server.state().counts.seconds, time.process_time()


class TimedRecorder(RecorderActor):
    """Reports its processor seconds."""

    def cost(self) -> float:
        return time.process_time()


def configure(problem: dict[str, Any], updates: int, variant: str) -> RunConfig:
    evaluate, checkpoint, durability = VARIANTS[variant]
    run = {"eval_every": evaluate, "checkpoint_every": checkpoint, "durability": durability}
    return make_config(
        {
            "problem": problem,
            "optimizer": {"learning_rate": 1e-3},
            "cluster": {"workers": 4},
            "run": {"updates": updates, **run},
        }
    )


def measure(config: RunConfig, path: Path, silent: bool) -> dict[str, float]:
    """Run and return updates/s and processor microseconds per update."""
    RunWriter.create(path, config)
    epoch = Lease(path / CHECKPOINTS).take()
    initial = starting_point(make_problem(config), config.run.seed)
    of_run = {"config": config, "path": str(path), "epoch": epoch}
    recorder = actor(TimedRecorder, **of_run, umask=0o077)
    server = actor(TimedServer, **of_run, parameters=initial, recorder=recorder)
    if silent:
        ray.get(server.silence.remote())
    workers = [actor(WorkerActor) for _ in range(config.cluster.workers)]
    ray.get(recorder.latest.remote())
    (_, before), before_recorder = ray.get([server.cost.remote(), recorder.cost.remote()])
    tasks = [w.run.remote(config, number, server) for number, w in enumerate(workers)]
    ray.get(server.stopped.remote())
    ray.get(server.flush.remote())
    (seconds, after), after_recorder = ray.get([server.cost.remote(), recorder.cost.remote()])
    assert ray.get(tasks) == [None] * len(tasks)
    for one in (server, recorder, *workers):
        ray.kill(one)
    updates = config.run.updates
    return {
        "updates_per_second": updates / seconds,
        "server_us": (after - before) / updates * 1e6,
        "recorder_us": (after_recorder - before_recorder) / updates * 1e6,
    }


def serve(dim: int, updates: int, directory: Path | None) -> float:
    """Return processor microseconds per update of a server in this process."""
    config = make_config(
        {"cluster": {"workers": 1}, "run": {"updates": NEVER, "eval_every": NEVER}}
    )
    server = ParameterServer(config, np.zeros(dim))
    if directory is not None:
        server.log = WriteAheadLog(directory, Lease(directory).take(), 0, dim, 1000)
    gradient = np.full(dim, 1e-9)
    ((_, snapshot),) = server.join(0, 0.0)
    start = 0.0
    for update in range(updates):
        if update == updates // 5:
            start = time.process_time()
        number = (snapshot.sequence, snapshot.version, snapshot.epoch)
        ((_, snapshot),) = server.receive(Gradient(0, *number, gradient, 0.0), 0.0)
    cost = (time.process_time() - start) / (updates - updates // 5) * 1e6
    if server.log is not None:
        server.log.close()
    return cost


def log_alone(repeats: int) -> None:
    print("the log alone: microseconds of processor for an update, medians")
    for dim in (1, 10, 100, 650, 1000, 3000, 10_000, 100_000):
        updates = min(20_000, 20_000_000 // dim)
        found = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(dir=".") as directory:
                with_log = serve(dim, updates, Path(directory))
            found.append((serve(dim, updates, None), with_log))
        without, with_log = np.median(found, axis=0)
        added = np.median([one - other for other, one in found])
        print(
            f"  d = {dim:<7} without {without:7.1f}   with {with_log:7.1f}   added {added:7.1f}   "
            f"1000 updates fill {(8 * dim + 90) / 1000:.1f} MB",
            flush=True,
        )


def actor(kind: type, **arguments: Any) -> Any:
    """Start an actor as `cluster.fleet` does."""
    options: dict[str, Any] = {}
    if issubclass(kind, ServerActor):
        options["max_concurrency"] = 32
    elif issubclass(kind, RecorderActor):
        options["concurrency_groups"] = {ASIDE: 1}
    return ray.remote(num_cpus=0, **options)(kind).remote(**arguments)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="approximate length of a run")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)
    for name in options.cases:
        if name not in CASES:
            parser.error(f"case {name}: expected one of {', '.join(CASES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start", flush=True)
    log_alone(options.repeats)
    with ray_session(object_store_bytes=1_000_000_000):
        for case in options.cases or CASES:
            problem, expected = CASES[case]
            dim = problem.get("options", {}).get("dim", 650)
            names = [v for v in VARIANTS if v != "logged" or dim <= LARGEST_LOGGED]
            updates = int(options.seconds * expected)
            for repeat in range(options.repeats):
                for name in names:
                    with tempfile.TemporaryDirectory() as directory:
                        config = configure(problem, updates, name)
                        found = measure(config, Path(directory) / "run", name == "nothing")
                    rows.append({"case": case, "variant": name, "repeat": repeat, **found})
                pd.DataFrame(rows).to_csv(options.out / "bench_durability.csv", index=False)
            show(case, names, pd.DataFrame(rows))
    print(f"written to {options.out}/bench_durability.csv")


def show(case: str, names: list[str], rows: pd.DataFrame) -> None:
    table = rows[rows["case"] == case].pivot(index="repeat", columns="variant")
    print(case)
    for name in names:
        rate, server = table["updates_per_second"], table["server_us"]
        ratios = [np.median(column[name] / column["nothing"]) for column in (rate, server)]
        print(
            f"  {name:9} {rate[name].median():9,.0f} updates/s ({ratios[0]:.3f})   "
            f"server {server[name].median():6.1f} us/update ({ratios[1]:.3f})   "
            f"recorder {table['recorder_us'][name].median():6.1f} us/update",
            flush=True,
        )


if __name__ == "__main__":
    main()
