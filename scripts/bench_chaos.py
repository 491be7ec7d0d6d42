#!/usr/bin/env python3
"""Injects faults into runs: kills processes and nodes, damages files, and checks the results.

.venv/bin/python scripts/bench_chaos.py [--runs 10] [--updates 3000] [--faults 6] [--no-nodes]
.venv/bin/python scripts/bench_chaos.py --launched 20 [--faults 2] [--seed 0]

Each run trains softmax regression on the digits data with four workers. Transport and durability
change from run to run, and each draws the policy of its server, its update rule, the data of its
workers and how many of them share a process. Faults come at random updates:

- kill -9 of a worker, the server or the recorder;
- a flipped bit in the newest checkpoint, unless it is the last one, then kill -9 of the server;
- kill -9 of a Ray node with its workers, at most once per run.

The checks of each run: every update is recorded once; staleness is right and never negative; each
gradient is applied or discarded once, or reported; no sample is used twice in an epoch; every lost
update is reported, and with a log none is lost; every loss is recorded or skipped; the final
parameters equal, to the last bit, those of a serial replay of the trace. Exit status 1 if a run
does not finish or fails a check.

With `--launched`, each run is an `asgd run` in its own process, and the faults end it or damage its
files:

- kill -9 of Ray's gcs_server, raylet or an agent, the guard, the launcher, the server, the recorder
  or a worker;
- a flipped bit in a part of the trace or of the losses;
- a flood of unauthenticated connections;
- a run directory that becomes read-only, or a full disk (as root, if `unshare -m` works).

A run that ended is resumed with `--resume`. Each end must give its reason in one line and in the
events, and leave nothing behind. A finished run must pass the checks above. While a flipped bit is
still there, reading it must fail.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.errors import AsgdError
from asgd.progress import Progress
from asgd.rundir.checkpoint import CHECKPOINTS, paths, version_of
from asgd.rundir.reader import Run, read_run
from tests.support.invariants import violations
from tests.support.processes import actor_processes

ROOT = Path(__file__).resolve().parents[1]

WORKERS = 4
VARIANTS = [
    ("log", "auto"),
    ("checkpoint", "tcp"),
    ("log", "tcp"),
    ("checkpoint", "ray"),
    ("log", "shm"),
    ("checkpoint", "auto"),
]
POLICIES: list[dict[str, Any]] = [
    {},
    {"schedule": "uniform"},
    {"discard_above": 2},
    {"mode": "sync"},
    {"mode": "sync", "gradients_per_update": 2},
    {"mode": "sync", "gradients_per_update": 2, "late": "keep"},
    {"mode": "bounded", "max_staleness": 3},
    {"mode": "buffered", "gradients_per_update": 3},
    {"mode": "buffered", "gradients_per_update": 6, "discard_above": 0},
]
# Update rules, and the learning rate and other keys of each.
RULES: dict[str, dict[str, Any]] = {
    "sgd": {"learning_rate": 0.3},
    "momentum": {"learning_rate": 0.05},
    "nesterov": {"learning_rate": 0.05},
    "corrected_momentum": {"learning_rate": 0.05},
    "adam": {"learning_rate": 0.003},
    "adamw": {"learning_rate": 0.003},
    "rmsprop": {"learning_rate": 0.003},
    "staleness_aware": {"learning_rate": 0.3},
    "staleness_power": {"learning_rate": 0.3},
    "capped": {"learning_rate": 0.3, "cap": 0.5},
    "delay_compensated": {"learning_rate": 0.3},
    "tests.support.rules:Full": {"learning_rate": 0.1},
    "local steps": {
        "rule": "nesterov",
        "learning_rate": 0.1,
        "local_steps": 3,
        "local_rule": "adam",
        "local_learning_rate": 0.003,
        "local_state": "keep",
    },
}
DATA: list[dict[str, Any]] = [
    {},
    {"shards": "by_label"},
    {"sampling": "epoch"},
    {"shards": "dirichlet", "alpha": 0.3, "sampling": "epoch"},
]
NEED_ASYNC = ("delay_compensated", "tests.support.rules:Full")
KINDS = ("worker", "worker", "worker", "server", "recorder", "checkpoint", "node")
PATIENCE = 20.0  # seconds for a process to come back before it is killed again


def configure(number: int, updates: int) -> RunConfig:
    durability, transport = VARIANTS[number % len(VARIANTS)]
    draws = np.random.default_rng([number, 17])
    policy = POLICIES[int(draws.integers(len(POLICIES)))]
    able = [rule for rule in RULES if "mode" not in policy or rule not in NEED_ASYNC]
    rule = able[int(draws.integers(len(able)))]
    data = DATA[int(draws.integers(len(DATA)))]
    together = int(draws.integers(1, WORKERS + 1))
    if "local_steps" in RULES[rule]:  # they do not go with epochs
        data = {**data, "sampling": "replacement"}
    compute_time = {"law": "exponential", "mean": 0.01}
    run = {"updates": updates, "checkpoint_every": 200, "seed": number}
    return make_config(
        {
            "problem": {"kind": "softmax"},
            "data": data,
            "optimizer": {"rule": rule, **RULES[rule]},
            "cluster": {
                "workers": WORKERS,
                "workers_per_process": together,
                "transport": transport,
                "compute_time": compute_time,
                **policy,
            },
            "run": {**run, "durability": durability},
        }
    )


def choices(config: RunConfig) -> str:
    """Describe the settings drawn for a run."""
    cluster, data = config.cluster, config.data
    names = (config.optimizer.rule, config.run.durability, cluster.transport, cluster.mode)
    policy = (cluster.gradients_per_update, cluster.late, cluster.discard_above)
    together = f"{cluster.workers_per_process} in a process"
    return ", ".join((*names, data.shards, data.sampling, cluster.schedule, str(policy), together))


# --- faults -------------------------------------------------------------------------------------


def flip(path: Path, random: np.random.Generator) -> None:
    with path.open("r+b") as file:  # does not recreate a file that was removed meanwhile
        data = bytearray(file.read())
        data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
        file.seek(0)
        file.write(data)


class Injector:
    """Injects the faults of one run in its own thread; `watch` is the run's progress callback."""

    def __init__(
        self, path: Path, updates: int, kinds: list[str], seed: int, nodes: Nodes | None
    ) -> None:
        self.injected: Counter[str] = Counter()
        self.falls: list[tuple[int, int]] = []
        self._path = path
        self._updates = updates
        self._random = np.random.default_rng(seed)
        at = np.sort(self._random.integers(updates // 20, updates * 17 // 20, len(kinds)))
        self._plan = list(zip(at.tolist(), kinds, strict=True))
        self._nodes = nodes
        self._killed: set[int] = set()
        self._version = 0
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._inject)

    def __enter__(self) -> Injector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join()

    def watch(self, progress: Progress) -> None:
        with self._changed:
            if progress.update < self._version:
                self.falls.append((self._version, progress.update))
            self._version = progress.update
            self._changed.notify()

    def _inject(self) -> None:
        for update, kind in self._plan:
            with self._changed:
                self._changed.wait_for(lambda at=update: self._over or self._version >= at)
                if self._over:
                    return
            time.sleep(float(self._random.uniform(0.0, 0.25)))  # not always right after a report
            if self._fault(kind):
                self.injected[kind] += 1

    def _fault(self, kind: str) -> bool:
        if kind == "node":
            return self._nodes is not None and self._nodes.kill()
        if kind == "checkpoint":
            newest = next(iter(paths(self._path / CHECKPOINTS)), None)
            # The last checkpoint is never saved again, and the log is removed with it.
            if newest is None or version_of(newest) == self._updates:
                return False
            with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
                flip(newest, self._random)
            kind = "server"
        return self._kill(f"{kind.capitalize()}Actor")

    def _kill(self, kind: str) -> bool:
        deadline = time.monotonic() + PATIENCE
        while not self._over and time.monotonic() < deadline:
            found = sorted(actor_processes(kind) - self._killed)
            if found:
                pid = int(self._random.choice(found))
                self._killed.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    return True
            time.sleep(0.05)
        return False


# --- runs ---------------------------------------------------------------------------------------


class Nodes:
    """A Ray cluster of two nodes on this machine: the driver's, and one that can be killed."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        health = {
            "health_check_initial_delay_ms": 500,
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 1000,
            "health_check_failure_threshold": 5,
        }
        # Ray starts an idle process for each core, which no actor reserves.
        self._size = {"num_cpus": 1, "object_store_memory": 100_000_000}
        head = {**self._size, "include_dashboard": False, "_system_config": health}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")
        self._node: Any = None

    def complete(self) -> None:
        """Start the second node if it is missing; Ray requires the main thread for this."""
        if self._node is None:
            self._node = self._cluster.add_node(**self._size)

    def kill(self) -> bool:
        """Kill the second node and its processes; return whether there was one."""
        node, self._node = self._node, None
        if node is not None:
            self._cluster.remove_node(node, allow_graceful=False)
        return node is not None

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()


@contextmanager
def nodes_of(many: bool) -> Iterator[Nodes | None]:
    """Provide Ray: a cluster with its own directory, or a single node."""
    from cluster.local_ray.session import ray_session

    if not many:
        with ray_session():
            yield None
        return
    with tempfile.TemporaryDirectory(prefix="a-", dir="/tmp", ignore_cleanup_errors=True) as tmp:
        os.environ["RAY_TMPDIR"] = tmp
        nodes = Nodes()
        try:
            yield nodes
        finally:
            nodes.close()


def launched(first: int, runs: int, faults: int, seed: int) -> int:
    """Inject faults that end the run into runs in separate processes."""
    from scripts.launched_chaos import Launched, chaos, own_mounts, plan

    mounts = own_mounts()
    if mounts and "ASGD_OWN_MOUNTS" not in os.environ:
        os.environ["ASGD_OWN_MOUNTS"] = "1"
        os.execvp("unshare", ["unshare", "-m", sys.executable, *sys.argv])
    if not mounts:
        print("without read-only directories and full disks: they need root and private mounts")
    wrong, faulty, totals = 0, 0, Counter[str]()
    for number in range(first, first + runs):
        random = np.random.default_rng([seed, number])
        kinds = plan(random, faults, mounts)
        with tempfile.TemporaryDirectory(prefix="a-", dir="/tmp") as directory:
            run = Launched(Path(directory), random, mounts)
            try:
                hit = chaos(run, kinds)
                found = run.wrong + still_wrong(run.out, run.ends[-1] == "finished", run.damaged)
            finally:
                run.close()
        totals += Counter(hit)
        faulty += bool(found)
        wrong += len(found)
        print(
            f"run {number}: faults {', '.join(hit) or 'none'}; {' | '.join(run.ends)}", flush=True
        )
        for words in found:
            print(f"  wrong: {words[:1000]}", flush=True)
    kinds_hit = ", ".join(f"{kind} {count}" for kind, count in sorted(totals.items()))
    print(f"{runs} runs, {sum(totals.values())} faults ({kinds_hit}); {faulty} runs wrong")
    return int(wrong > 0)


def still_wrong(path: Path, finished: bool, damaged: list[Path]) -> list[str]:
    """Return the violated invariants of a run that claims to be finished."""
    if not finished:
        return []
    run = read_run(path)
    found = violations(run, [])
    verify = subprocess.run(
        [sys.executable, "-m", "asgd", "verify", path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    told = any(event["event"] == "loss_damaged" for event in run.events)
    there = any(part.exists() for part in damaged)
    if verify.returncode and not there:
        found.append(f"asgd verify: status {verify.returncode}: {verify.stdout}{verify.stderr}")
    if there:  # reading the part must fail
        found = [words for words in found if "digest" not in words]
    if told:  # the event reports a part that cannot be read
        found = [words for words in found if words != "losses are missing"]
    return found


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--updates", type=int, default=3000, help="updates per run")
    parser.add_argument("--faults", type=int, default=6, help="faults per run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults")
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--no-nodes", action="store_true", help="one node, which is not killed")
    parser.add_argument(
        "--launched", type=int, metavar="RUNS", help="number of runs in separate processes"
    )
    options = parser.parse_args(arguments)
    if options.launched:
        return launched(options.first, options.launched, options.faults, options.seed)
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_worker_maximum_startup_concurrency="64",  # otherwise one for each core
        RAY_worker_niceness="0",  # at Ray's 15, workers wait for other processes
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
    )
    from cluster import run

    random = np.random.default_rng(options.seed)
    kinds = [kind for kind in KINDS if not (options.no_nodes and kind == "node")]
    totals: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory, nodes_of(not options.no_nodes) as nodes:
        for number in range(options.first, options.first + options.runs):
            config, path = configure(number, options.updates), Path(directory) / f"{number}"
            # The first fault takes the kinds in turn; the others are random.
            plan = [kinds[::-1][number % len(set(kinds))]]
            plan += random.choice(kinds, options.faults - 1).tolist()
            if nodes is not None:
                nodes.complete()
            seed, start = int(random.integers(2**32)), time.monotonic()
            with Injector(path, options.updates, plan, seed, nodes) as injector:
                try:
                    run(config, path, progress=injector.watch)
                except AsgdError as error:
                    print(f"run {number}: {error}", flush=True)
            result = read_run(path)
            found = violations(result, injector.falls)
            report(number, result, injector, found, time.monotonic() - start)
            faults += injector.injected
            events = Counter(event["event"] for event in result.events)
            totals["finished"] += result.state == "finished"
            totals["lost"] += sum(e.get("updates_lost", 0) for e in result.events)
            totals["gradients"] += events["gradient_lost"]
            totals["violated"] += len(found)
    print(
        f"{options.runs} runs of {options.updates} updates, {sum(faults.values())} faults "
        f"({', '.join(f'{kind} {count}' for kind, count in sorted(faults.items()))})\n"
        f"runs finished         {totals['finished']} of {options.runs}\n"
        f"updates lost          {totals['lost']} at least\n"
        f"gradients lost        {totals['gradients']}, each reported\n"
        f"invariants violated   {totals['violated']}"
    )
    return int(totals["finished"] < options.runs or totals["violated"] > 0)


def report(number: int, result: Run, injector: Injector, found: list[str], seconds: float) -> None:
    config, events = result.config, Counter(event["event"] for event in result.events)
    faults = ", ".join(f"{kind} {count}" for kind, count in sorted(injector.injected.items()))
    lost = sum(event.get("updates_lost", 0) for event in result.events)
    print(
        f"run {number} ({choices(config)}): {result.state} in "
        f"{seconds:.0f} s; faults: {faults}; workers lost {events['worker_lost']}, server restored "
        f"{events['server_restored']}, damaged checkpoints {events['checkpoint_damaged']}, "
        f"gradients discarded {len(result.discarded)}, updates "
        f"lost {lost}, gradients lost {events['gradient_lost']}; violated: {len(found)}",
        flush=True,
    )
    reasons = Counter(e["reason"] for e in result.events if e["event"] == "worker_lost")
    print(f"  workers lost: {dict(reasons)}", flush=True)
    for words in found:
        print(f"  violated: {words[:400]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
