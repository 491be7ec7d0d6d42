"""Finds processes in /proc."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from pathlib import Path

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Starts a program with default signal handlers. A background job of a script ignores SIGINT, and
# its children, such as this suite, inherit that.
DEFAULT_SIGNALS = ("env", "--default-signal=HUP,INT,TERM")


# A part of the command line of each process of a run, except the launcher.
PARTS = {
    "gcs_server": "/gcs_server",
    "raylet": "/raylet/raylet",
    "dashboard_agent": "ray::DashboardAgent",
    "runtime_env_agent": "ray::RuntimeEnvAgent",
    "server": "ray::ServerActor",
    "recorder": "ray::RecorderActor",
    "worker": "ray::WorkerActor",
    "guard": "/local_ray/guard.py",
}
LAUNCHER = "launcher"


def parts(launcher: int, name: str) -> list[int]:
    """Return the processes called `name` of the run started by the process `launcher`."""
    if name == LAUNCHER:
        return [launcher]
    return sorted(pid for pid, line in below(launcher).items() if PARTS[name] in line)


def below(ancestor: int) -> dict[int, str]:
    """Return the command lines of all descendants of a process."""
    parents, lines = {}, {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(directory.name)
            parents[pid] = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            lines[pid] = (directory / "cmdline").read_bytes().decode(errors="replace")

    def is_below(pid: int) -> bool:
        while pid > 1 and pid != ancestor:
            pid = parents.get(pid, 0)
        return pid == ancestor

    return {pid: line for pid, line in lines.items() if pid != ancestor and is_below(pid)}


def actor_processes(kind: str) -> set[int]:
    """Return the descendants of this process that are Ray actors of a kind."""
    return {pid for pid, line in below(os.getpid()).items() if line.startswith(f"ray::{kind}")}


def processes_in(directory: Path | str) -> set[int]:
    """Return the processes with open files in a directory."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            files = [os.readlink(file) for file in (process / "fd").iterdir()]
            if any(file.startswith(str(directory)) for file in files):
                found.add(int(process.name))
    return found


def listeners(processes: set[int]) -> set[tuple[Address, int]]:
    """Return the addresses and ports on which processes accept connections."""
    sockets = set()
    for pid in processes:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(file))
            except OSError:
                continue
    addresses: set[tuple[Address, int]] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                address, port = local.split(":")
                words = re.findall("." * 8, address)  # each in the byte order of x86
                packed = b"".join(bytes.fromhex(word)[::-1] for word in words)
                addresses.add((ipaddress.ip_address(packed), int(port, 16)))
    return addresses
