"""Hosts on one machine: namespaces joined by a bridge whose links can be cut.

Each host has its own network, processes, name, `/dev/shm` and abstract sockets; all share the file
system, like machines that mount the same directories. A host lives as long as its first process,
which ends when its standard input does, and nothing of it is registered outside. So nothing is left
after a test fails or is killed.

A cut is silent, as in a real network: the host gets a false hardware address of the other host, so
its packets are lost without an error. A cut in one direction leaves connections half open.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_SECONDS_TO_END = 10.0
_NOBODY = "02:00:00:00:00:ff"  # a hardware address that no link has

_FIRST_COMMANDS = """
read number rest < /proc/self/stat  # its process id outside, before it mounts its own /proc
mount -t proc proc /proc && mount -t tmpfs tmpfs /dev/shm && hostname "$1" &&
ip link set lo up && exec "$0" -I -S -c "$2" $number
"""
# Orphans of the host become its children; it ignores their exits, or they would stay zombies.
_FIRST_PROCESS = """
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print(sys.argv[1], flush=True)
sys.stdin.read()
"""


@cache
def why_no_hosts() -> str | None:
    """Return in one line why hosts cannot be made here; None if they can."""
    missing = [name for name in ("unshare", "nsenter", "ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"hosts need the commands {', '.join(missing)} (util-linux, iproute2)"
    if os.geteuid():
        return "hosts need root"
    try:
        with hosts_of(1, rate="1gbit"):
            return None
    except OSError as error:
        return f"hosts cannot be made here: {' '.join(str(error).split())}"


class Host:
    """A host of the network.

    Attributes
    ----------
    name, address
        Its name, and its address on the bridge.
    """

    def __init__(self, stack: ExitStack, name: str, address: str = "") -> None:
        spaces = ["--net"] if not address else ["--net", "--mount", "--uts", "--ipc", "--pid"]
        self.name = name
        self.address = address
        # The bridge needs no processes of its own.
        fork = ["--fork", "--kill-child"] if address else []
        script = _FIRST_COMMANDS if address else 'exec "$0" -I -S -c "$2" $$'
        self._process = subprocess.Popen(
            ["unshare", *spaces, *fork, "sh", "-c", script, sys.executable, name, _FIRST_PROCESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the test, which then ends the hosts
        )
        stack.callback(self.end)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise OSError(self._process.communicate()[1])
        self.pid = int(line)
        self._inside = [*("nsenter", "--target", str(self.pid)), *spaces]

    def start(
        self, *command: str | Path, environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a command on this host, in the directory of the project."""
        return subprocess.Popen(
            [*self._inside, f"--wd={ROOT}", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            text=True,
            **options,
        )

    def call(
        self,
        *command: str | Path,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Return what a command prints on this host.

        Raises
        ------
        OSError
            The command failed; the message contains its output.
        """
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with self.start(*command, environment=environment, **pipes) as process:
            printed = process.communicate()[0]
        if process.returncode:
            raise OSError(f"{self.name}: {' '.join(map(str, command))}: {printed}")
        return printed

    def end(self) -> None:
        """End the host with all its processes, as a power failure does."""
        self._process.kill()  # the first process; the kernel then kills all others of the host
        self._process.communicate(timeout=_SECONDS_TO_END)

    def cut(self, *others: Host) -> None:
        """Lose everything that this host sends to the others."""
        for other in others:
            neighbour = (other.address, "lladdr", _NOBODY, "dev", "eth0", "nud", "permanent")
            self.call("ip", "neigh", "replace", *neighbour)

    def mend(self, *others: Host) -> None:
        """Deliver what this host sends to the others again."""
        for other in others:
            self.call("ip", "neigh", "del", other.address, "dev", "eth0")


@contextmanager
def hosts_of(number: int, rate: str | None = None) -> Iterator[list[Host]]:
    """Provide hosts during the block: host1, host2, ... at 10.77.0.1, 10.77.0.2, ...

    Parameters
    ----------
    number
        The number of hosts.
    rate
        The rate of each link in each direction, in the syntax of `tc`, such as "100mbit".
    """
    with ExitStack() as stack:
        bridge = Host(stack, "bridge")
        bridge.call("ip", "link", "add", "bridge", "type", "bridge")
        bridge.call("ip", "link", "set", "bridge", "up")
        hosts = []
        for at in range(1, number + 1):
            host = Host(stack, f"host{at}", f"10.77.0.{at}")
            link = ("link", "add", f"port{at}", "type", "veth")
            bridge.call("ip", *link, "peer", "name", "eth0", "netns", str(host.pid))
            bridge.call("ip", "link", "set", f"port{at}", "master", "bridge", "up")
            host.call("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.call("ip", "link", "set", "eth0", "up")
            # Programs find their own address by a route to the outside, as on a real network.
            host.call("ip", "route", "add", "default", "via", "10.77.0.254")
            if rate is not None:
                limit = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "100ms")
                bridge.call("tc", "qdisc", "add", "dev", f"port{at}", *limit)
                host.call("tc", "qdisc", "add", "dev", "eth0", *limit)
            hosts.append(host)
        yield hosts


@contextmanager
def parted(some: Iterable[Host], others: Iterable[Host]) -> Iterator[None]:
    """Cut hosts off from others during the block, in both directions."""
    some, others = list(some), list(others)
    for one in some:
        one.cut(*others)
    for other in others:
        other.cut(*some)
    try:
        yield
    finally:
        for one in some:
            one.mend(*others)
        for other in others:
            other.mend(*some)
