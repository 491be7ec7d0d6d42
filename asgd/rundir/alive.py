"""The heartbeat of a run: whether its process is still alive.

During a run, the file `alive` in its directory names the process and its host. The process locks
the file, and the kernel releases the lock when the process ends. For readers on other hosts, the
process touches the file every few seconds. A run that ends normally removes the file.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from asgd.rundir.files import locked
from asgd.stored_json import parse_json

_NAME = "alive"
_BEAT_SECONDS = 2.0
_LONGEST = 10_000  # characters of the file
_SILENT_SECONDS = 30.0  # without a heartbeat, until a run on another host counts as silent


@dataclass(frozen=True)
class Heartbeat:
    """The state of the process of a run.

    Attributes
    ----------
    presence
        "here" (alive) or "gone" for a process of this host, which is certain; "elsewhere" (recent
        heartbeat) or "silent" for a process of another host.
    host, pid
        Host and process id.
    age
        Seconds since the last heartbeat, at least zero.
    """

    presence: Literal["here", "gone", "elsewhere", "silent"]
    host: str
    pid: int
    age: float


@contextmanager
def heartbeat(directory: Path) -> Iterator[None]:
    """Write heartbeats into a run directory during the block."""
    path, ended = directory / _NAME, threading.Event()
    with locked(path) as file:
        file.truncate(0)
        file.write(json.dumps({"host": platform.node(), "pid": os.getpid()}) + "\n")
        file.flush()
        beats = threading.Thread(target=_beat, args=(path, ended), daemon=True)
        beats.start()
        try:
            yield
        finally:
            ended.set()
            beats.join()
            with suppress(OSError):  # a read-only or moved directory must not end the run
                path.unlink(missing_ok=True)


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_SECONDS):
        with suppress(OSError):  # writers report a full disk
            os.utime(path)


def read_heartbeat(directory: Path) -> Heartbeat | None:
    """Return the state of the process of a run, None without a readable file."""
    try:
        with (directory / _NAME).open(encoding="utf-8") as file:
            said = parse_json(file.read(_LONGEST))
            host, pid = str(said["host"]), int(said["pid"])
            age = max(0.0, time.time() - os.fstat(file.fileno()).st_mtime)
            if host != platform.node():
                return Heartbeat("elsewhere" if age < _SILENT_SECONDS else "silent", host, pid, age)
        try:
            with locked(directory / _NAME, "r", shared=True, wait=False):
                return Heartbeat("gone", host, pid, age)
        except BlockingIOError:
            return Heartbeat("here", host, pid, age)
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return None
