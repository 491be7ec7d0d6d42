"""What processes there are, by what the kernel says of them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# Starts a program with the default answer to signals. A background job of a script is started with
# Ctrl-C ignored, and hands that down: to this suite, say, and to what it starts.
DEFAULT_SIGNALS = ("env", "--default-signal=HUP,INT,TERM")


def actor_processes(kind: str) -> set[int]:
    """Return the processes below this one that are Ray actors of a kind."""
    parents, titles = {}, {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(directory.name)
            parents[pid] = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            titles[pid] = (directory / "cmdline").read_bytes().decode(errors="replace")

    def is_ours(pid: int) -> bool:
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return {p for p, title in titles.items() if title.startswith(f"ray::{kind}") and is_ours(p)}


def processes_in(directory: Path | str) -> set[int]:
    """Return the processes that have files of a directory open."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            files = [os.readlink(file) for file in (process / "fd").iterdir()]
            if any(file.startswith(str(directory)) for file in files):
                found.add(int(process.name))
    return found
