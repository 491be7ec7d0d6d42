#!/usr/bin/env python3
"""Cuts hosts off from one another, kills processes, and checks the records of the runs.

.venv/bin/python scripts/hosts_chaos.py [--partitions 20] [--kills 20] [--faults 8] [--seed 0]

As root: four hosts are network namespaces on this machine, joined by a bridge. One is the head with
the driver, without cores; two of the others may run the server. Runs are drawn as in
`bench_chaos.py`. Faults come at random moments; a kill after a partition often comes during it:

- a worker's host cut off from all others, or the server's from the driver, the workers or both: for
  some seconds, in one direction only, until the run has replaced the processes there, for a minute,
  or for the rest of the run;
- kill -9 of a worker, the server, the recorder, a raylet, or all processes of a host.

The checks of each run: it continues after each fault and finishes; the checks of `bench_chaos.py`
and `asgd verify`; no file of the run changes after its end, when every link is restored; none of
its processes is left on any host. Exit status 1 if one fails; 3 if Ray did not start.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.rundir.reader import Run, read_run
from scripts.bench_chaos import WORKERS, choices, configure, still_wrong
from tests.support.hosts import Host, parted, why_no_hosts
from tests.support.processes import PARTS, below
from tests.support.ray_hosts import FAST, RayHosts, StarvedError, ray_hosts

UPDATES = 4000
# No log monitors: on a busy machine, starting Ray takes long enough without them.
NODE = ("--include-log-monitor=false", "--num-cpus=2")
NODES = ((*NODE, "--labels=asgd=server"), (*NODE, "--labels=asgd=server"), NODE)
# Whose host is cut off, from which others, for how long.
PARTITIONS = [
    ("worker", "all", "seconds"),
    ("worker", "all", "one way"),
    ("worker", "all", "replaced"),
    ("worker", "all", "a minute"),
    ("worker", "all", "ever"),
    ("server", "driver", "seconds"),
    ("server", "driver", "one way"),
    ("server", "driver", "replaced"),
    ("server", "workers", "seconds"),
    ("server", "workers", "one way"),
    ("server", "workers", "replaced"),
    ("server", "all", "seconds"),
    ("server", "all", "replaced"),
]
KILLS = ("worker", "server", "recorder", "raylet", "host")
ACTORS = ("server", "recorder", "worker")
PATIENCE = 300.0  # seconds for a run to go on
MOST_STARVED = 3  # runs in a row
SECONDS_TO_CLEAR = 90.0
_POLL_SECONDS = 0.25

Fault = tuple[str, ...]


class StillError(Exception):
    """A run ended early, or did not make progress in time."""


def drawn(random: np.random.Generator, partitions: int, kills: int) -> list[Fault]:
    """Draw the faults; each kind of a partition and of a kill comes as often as any other."""
    faults: list[Fault] = []
    for kinds, number in ((PARTITIONS, partitions), ([(kind,) for kind in KILLS], kills)):
        order = [kinds[at] for _ in range(number) for at in random.permutation(len(kinds))]
        faults += order[:number]
    return [faults[at] for at in random.permutation(len(faults))]


def hosts_config(number: int, until: Path) -> RunConfig:
    """Draw a run that gets slower and slower until the file `until` exists."""
    tables = json.loads(configure(number, UPDATES).to_json())
    problem = {"kind": "tests.support.plugins:paced", "options": {"until": str(until)}}
    tables["cluster"]["compute_time"]["mean"] = 0.002
    # Checkpoint often: then a new server repeats few updates, and progress shows soon.
    tables["run"]["checkpoint_every"] = 20
    return make_config({**tables, "problem": problem})


class HostsRun:
    """A run over the hosts of a cluster, and the faults that are injected into it."""

    def __init__(
        self, cluster: RayHosts, number: int, directory: Path, random: np.random.Generator
    ) -> None:
        self.injected: Counter[str] = Counter()
        self.violated: list[str] = []
        self.old_servers = 0
        self.out = directory / "run"
        self._cluster = cluster
        self._number = number
        self._random = random
        self._cut_off: list[Host] = []  # for the rest of the run
        self._links = ExitStack()
        self._until = directory / "enough"
        self.config = hosts_config(number, self._until)
        (directory / "run.json").write_text(self.config.to_json())
        self.complete()
        self._process = cluster.run(directory / "run.json", self.out)

    def __enter__(self) -> HostsRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._links.close()
        for pid in below(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.communicate()

    def complete(self) -> None:
        """Add every reachable host to the cluster again, one after another."""
        options_of = dict(zip(self._cluster.hosts, ((), *NODES), strict=True))
        for host in self._reached()[1:]:
            if not self._cluster.is_node(host):
                self._cluster.give_up(host)
            try:
                self._cluster.complete({host: options_of[host]})
            except StarvedError as error:
                say(f"    starved: {error}")

    @property
    def over(self) -> bool:
        """Whether the run has ended with status 0."""
        return self._process.poll() == 0

    def start(self) -> None:
        """Wait until all workers have joined.

        Raises
        ------
        StarvedError
            They did not join in time.
        """
        try:
            self._wait("start", lambda run: len(named(run, "worker_joined")) >= WORKERS)
        except StillError as error:
            if self._process.poll() is not None:
                raise
            raise StarvedError(str(error)) from error

    def inject(self, fault: Fault, following: Fault | None) -> None:
        """Inject a fault, and the following one while it lasts; then wait for the run to go on."""
        if len(fault) == 1:
            self._kill(fault[0])
        else:
            self._partition(fault, following)
        if not any(self._cluster.is_node(host) for host in self._reached()[1:]):
            self.complete()  # without a node, the run rightly waits
        began = time.monotonic()
        self._go_on()
        say(f"    went on after {time.monotonic() - began:.1f} s")

    def finish(self) -> None:
        """Let the run end, and check it."""
        self._until.touch()
        try:
            _, errors = self._process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.violated.append(f"no end within {PATIENCE:.0f} s")
            return
        if self._process.returncode != 0:
            self.violated.append(f"status {self._process.returncode}: {errors.strip()[-500:]}")
            return
        before = digests(self.out)
        self._links.close()  # the host of an old server comes back
        deadline = time.monotonic() + SECONDS_TO_CLEAR
        while (left := self._actors()) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        self.violated += [f"left behind: {line}" for line in left]
        changed = sorted(set(before.items()) ^ set(digests(self.out).items()))
        self.violated += [f"{name} changed after the end" for name in dict(changed)]
        self.violated += still_wrong(self.out, True, [])

    def report(self) -> None:
        """Print how the run went."""
        names = ("worker_lost", "server_restored", "gradient_lost", "connection_lost")
        if (self.out / "events.jsonl").exists():
            events = read_run(self.out).events
            counts = Counter(str(event["event"]) for event in events)
            say(f"  {', '.join(f'{name} {counts[name]}' for name in names)}")
            lost = [event for event in events if event["event"] == "worker_lost"]
            say(f"  reasons: {dict(Counter(str(event['reason']) for event in lost))}")
            if self.violated:
                say("".join(f"  {json.dumps(event)[:300]}\n" for event in events))
        say(f"  old servers seen {self.old_servers}; violated: {len(self.violated)}")
        for words in self.violated:
            say(f"  violated: {words[:1000]}")

    # --- faults ---------------------------------------------------------------------------------

    def _partition(self, fault: Fault, following: Fault | None) -> None:
        whom, others, length = fault
        known = self._known()
        server = self._host_of_server(known)
        if whom == "server" and server is self._cluster.hosts[0]:  # with the driver, on the head
            whom, others = "worker", "all"
        if whom == "worker":
            busy = self._hosts_of_workers(known) - {server}
            if not busy:
                return
            target = self._choice(sorted(busy, key=lambda host: host.name))
        else:
            target = server
        apart = self._others(target, others)
        self._note("partition", f"{target.name} ({whom}'s) cut off from {others}: {length}", known)
        with ExitStack() as links:
            if length == "one way" and self._random.random() < 0.5:
                links.callback(target.mend, *apart)
                target.cut(*apart)
            elif length == "one way":
                for other in apart:
                    links.callback(other.mend, target)
                    other.cut(target)
            else:
                links.enter_context(parted([target], apart))
            if length in ("replaced", "ever"):
                if others != "workers":  # then Ray declares the host dead
                    self._cluster.give_up(target)
                seen = len(known.events)
                self._wait("loss", lambda run: self._noticed(target, whom, others, run, seen))
            else:
                time.sleep(60.0 if length == "a minute" else float(self._random.uniform(2.0, 6.0)))
            if following is not None:
                self._kill(following[0])
                if length == "replaced":
                    self._go_on()
            self.old_servers += len(self._actors("server")) > 1
            if length == "ever":
                self._cut_off.append(target)
                self._links.enter_context(links.pop_all())

    def _noticed(self, target: Host, whom: str, others: str, run: Run, known: int) -> bool:
        """Whether the events after the known ones report the loss of a host or its connections."""
        events = run.events[known:]
        if whom == "worker":
            return any(e["event"] == "worker_lost" and e["host"] == target.name for e in events)
        signs = {"connection_lost", "worker_lost"} if others == "workers" else {"server_restored"}
        return any(event["event"] in signs for event in events)

    def _others(self, target: Host, others: str) -> list[Host]:
        """Return the hosts from which a host is to be cut off."""
        head = self._cluster.hosts[0]
        whom = {
            "driver": [head],
            "workers": [host for host in self._cluster.hosts if host is not head],
            "all": self._cluster.hosts,
        }[others]
        return [host for host in whom if host is not target and host in self._reached()]

    def _kill(self, kind: str) -> None:
        known = self._known()
        head, *hosts = self._reached()
        if kind == "host":
            host = self._choice(hosts)
            self._note("kill", f"all processes of {host.name}", known)
            self._cluster.kill(host)
            return
        hosts = [host for host in hosts if found(host, kind)]
        if kind in ("server", "recorder") and found(head, kind):
            hosts.append(head)
        if hosts:
            host = self._choice(hosts)
            pid = int(self._random.choice(found(host, kind)))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._note("kill", f"the {kind} on {host.name}", known)

    def _note(self, kind: str, words: str, known: Run) -> None:
        self.injected[kind] += 1
        say(f"  update {len(known.trace)}: {kind}: {words}")

    def _reached(self) -> list[Host]:
        """Return the hosts that are not cut off for good, the head first."""
        return [host for host in self._cluster.hosts if host not in self._cut_off]

    def _choice(self, hosts: list[Host]) -> Host:
        return hosts[int(self._random.integers(len(hosts)))]

    def _host_of_server(self, run: Run) -> Host:
        return self._named(named(run, "server_placed")[-1])

    def _hosts_of_workers(self, run: Run) -> set[Host]:
        latest = {event["worker"]: event for event in named(run, "worker_placed")}
        return {self._named(event) for event in latest.values()} - set(self._cut_off)

    def _named(self, event: dict[str, Any]) -> Host:
        [host] = [host for host in self._cluster.hosts if host.name == event["host"]]
        return host

    def _actors(self, *kinds: str) -> list[str]:
        """Return the actors on all hosts."""
        marks = tuple(PARTS[kind] for kind in kinds or ACTORS)
        return [
            f"{host.name}: {line}"
            for host in self._cluster.hosts
            for line in below(host.pid).values()
            if line.startswith(marks)
        ]

    # --- progress -------------------------------------------------------------------------------

    def _known(self) -> Run:
        return self._wait("any update", lambda run: len(run.trace) > 0)

    def _go_on(self) -> None:
        known = len(self._known().trace)
        self._wait("more updates", lambda run: len(run.trace) > min(known + 20, UPDATES - 1))

    def _wait(self, what: str, holds: Callable[[Run], bool]) -> Run:
        """Wait until a condition holds for the run.

        Raises
        ------
        StillError
            The run ended, or the condition did not hold in time.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            ended = self._process.poll() is not None
            if (self.out / "events.jsonl").exists():
                run = read_run(self.out)
                if holds(run):
                    return run
            if ended:
                raise StillError(f"the run ended: no {what}")
            time.sleep(_POLL_SECONDS)
        raise StillError(f"no {what} within {PATIENCE:.0f} s")


def named(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events if event["event"] == kind]


def found(host: Host, kind: str) -> list[int]:
    """Return the processes of a kind on a host."""
    return sorted(pid for pid, line in below(host.pid).items() if PARTS[kind] in line)


def digests(directory: Path) -> dict[str, str]:
    """Return the digest of each file below a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def say(words: str) -> None:
    print(words, flush=True)


def chaos(run: HostsRun, faults: list[Fault], most: int, random: np.random.Generator) -> None:
    """Inject faults from the list, and remove them from it, until there were `most` or it ends."""
    try:
        run.start()
        while faults and run.injected.total() < most:
            run.complete()
            time.sleep(float(random.uniform(0.0, 2.0)))
            fault, following = faults.pop(0), None
            if len(fault) > 1 and faults and len(faults[0]) == 1 and random.random() < 0.6:
                following = faults.pop(0)
            run.inject(fault, following)
    except StillError as error:
        if not run.over:
            run.violated.append(str(error))
    run.finish()


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--partitions", type=int, default=20)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--faults", type=int, default=8, help="approximate faults per run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs and the faults")
    parser.add_argument(
        "--patient", action="store_true", help="Ray's default time to detect a dead node"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    if (why := why_no_hosts()) is not None:
        say(why)
        return 3
    try:
        totals = runs(options)
    except StarvedError as error:
        say(f"starved: {error}")
        return 3
    left = below(os.getpid())
    say(
        f"{totals['run']} runs, {totals['partition']} partitions, {totals['kill']} kills, "
        f"{totals['starved']} starved; processes left {len(left)}; "
        f"invariants violated {totals['violated']}"
    )
    return int(totals["violated"] + len(left) > 0)


def runs(options: argparse.Namespace) -> Counter[str]:
    """Make runs until all faults are injected, and count what happened.

    Raises
    ------
    StarvedError
        The cluster did not start, or several runs in a row did not.
    """
    random = np.random.default_rng(options.seed)
    faults = drawn(random, options.partitions, options.kills)
    number, starved, totals = 1000 * options.seed, 0, Counter[str]()
    with (
        tempfile.TemporaryDirectory(prefix="a-") as home,
        ray_hosts(1 + len(NODES), Path(home), {} if options.patient else FAST) as cluster,
    ):
        while faults:
            with tempfile.TemporaryDirectory(prefix="a-") as directory:
                try:
                    with HostsRun(cluster, number, Path(directory), random) as run:
                        say(f"run {number} ({choices(run.config)})")
                        chaos(run, faults, options.faults, random)
                        run.report()
                    totals += run.injected + Counter(run=1, violated=len(run.violated))
                    starved = 0
                except StarvedError as error:
                    starved += 1
                    if starved == MOST_STARVED:
                        raise
                    say(f"  starved: {error}")
            number += 1
            totals["starved"] += starved > 0
    return totals


if __name__ == "__main__":
    sys.exit(main())
