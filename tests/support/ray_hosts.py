"""A Ray cluster of several hosts, started with the commands on the page on clusters."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from asgd.rundir.reader import Run, read_run
from tests.support.hosts import ROOT, Host, hosts_of
from tests.support.processes import PARTS, below

PAGE = ROOT / "scripts" / "deploy" / "README.md"
# Ray notices a silent node after 13 s instead of a minute; a busy machine is silent for seconds.
FAST = {"period_ms": 500, "timeout_ms": 2000, "failure_threshold": 5}

_POLL_SECONDS = 0.05
_STARTS = 3


class StarvedError(Exception):
    """Ray did not start on a host, because the machine is too busy; no run is at fault."""


def told(start: str) -> list[str]:
    """Return the words of the command on the page that begins with `start`."""
    block = re.search(r"## Machines with a shell.*?```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    [line] = [line for line in block[1].splitlines() if line.startswith(start)]
    return shlex.split(line, comments=True)


class RayHosts:
    """A Ray cluster: the first host is its head, without cores.

    Attributes
    ----------
    hosts
        Every host of the network, some of them nodes of the cluster.
    """

    def __init__(self, hosts: list[Host], home: Path, health: Mapping[str, int]) -> None:
        self.hosts = hosts
        self._started: dict[str, Sequence[str]] = {}
        # A Ray of this process has its token in the environment; the hosts have their own.
        own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ASGD_"))}
        name, _, value = told("export")[1].partition("=")
        self._environment = {
            **own,
            name: value,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": "/dev/shm",  # each host has its own
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # otherwise 15, and workers wait for all other processes
            **{f"RAY_health_check_{name}": str(value) for name, value in health.items()},
        }
        self._call(hosts[0], "ray", "get-auth-token", "--generate")
        self._start(hosts[0], *told("ray start --head"))

    def complete(self, nodes: Mapping[Host, Sequence[str]]) -> None:
        """Make hosts nodes of the cluster one by one, with additional options of `ray start`.

        A host started with the same options, and not given up since, stays as it is.
        """
        for host, options in nodes.items():
            if self._started.get(host.name) != options:
                self._start(host, *self._filled("ray start --address"), *options)
                self._started[host.name] = options

    def is_node(self, host: Host) -> bool:
        """Whether a host was made a node, was not given up since, and its raylet lives."""
        return host.name in self._started and any(
            PARTS["raylet"] in line for line in below(host.pid).values()
        )

    def give_up(self, *hosts: Host) -> None:
        """Note that nodes will die, so that `complete` starts them again."""
        for host in hosts:
            self._started.pop(host.name, None)

    def kill(self, *hosts: Host) -> None:
        """Kill all processes on hosts, which then have no Ray."""
        self.give_up(*hosts)
        for host in hosts:
            host.call("sh", "-c", "kill -9 -1")

    def call(self, host: Host, *command: str) -> str:
        """Return what a command prints on a host, with the environment of the cluster."""
        return host.call(*command, environment=self._environment)

    def run(self, config: Path, out: Path, *options: str) -> subprocess.Popen[str]:
        """Start `asgd run` on the first host."""
        words = self._filled("asgd run")
        words[words.index("run.toml")] = str(config)
        words[words.index("--out") + 1] = str(out)
        return self.hosts[0].start(
            *words,
            *options,
            environment=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def _filled(self, start: str) -> list[str]:
        return [word.replace("HEAD", self.hosts[0].address) for word in told(start)]

    def _start(self, host: Host, *command: str) -> None:
        """Start Ray on a host.

        On a busy machine, `ray start` fails after 30 s but leaves a raylet, which becomes a node
        later.

        Raises
        ------
        StarvedError
            It failed several times and left no raylet.
        """
        for _ in range(_STARTS):
            if below(host.pid):
                self._call(host, *told("ray stop"), "--force")
            try:
                self._call(host, *command)
                return
            except OSError as error:
                if any(PARTS["raylet"] in line for line in below(host.pid).values()):
                    return
                said = str(error).strip().splitlines()[-1]
        raise StarvedError(f"{host.name}: {said}")

    def _call(self, host: Host, *command: str) -> None:
        host.call(*command, environment=self._environment)


@contextmanager
def ray_hosts(
    number: int, home: Path, health: Mapping[str, int] = FAST, rate: str | None = None
) -> Iterator[RayHosts]:
    """Provide hosts, the first of which is the head of a Ray cluster."""
    with hosts_of(number, rate) as hosts:
        yield RayHosts(hosts, home, health)


def wait_for(path: Path, holds: Callable[[Run], bool], seconds: float = 60.0) -> Run:
    """Wait until a condition holds for a run, and return the run.

    Raises
    ------
    TimeoutError
        It did not hold in time; the message has the events.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (path / "events.jsonl").exists():
            run = read_run(path)
            if holds(run):
                return run
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(str((path / "events.jsonl").read_text() if path.exists() else "no run"))
