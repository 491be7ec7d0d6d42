"""Heartbeat files: they tell whether the process that made them is still alive.

Such a file names a process and its host. The process touches it every few seconds and removes it
when its work ends. This needs no locks, which not every file system has.

During a run, its directory has the heartbeat file `alive`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from asgd.rundir.files import replace_file
from asgd.stored_json import parse_json

SILENT_SECONDS = 30.0  # without a heartbeat, until a process on another host counts as silent

_NAME = "alive"
_BEAT_SECONDS = 2.0
_LONGEST = 10_000  # characters of the file
_STATE, _STARTED = 0, 19  # places in /proc/PID/stat after the name
_DEAD = ("X", "Z")


@dataclass(frozen=True)
class Heartbeat:
    """The state of the process that made a heartbeat file.

    Attributes
    ----------
    presence
        "here" (alive) or "gone" if this host can look the process up, so it is certain; else
        "elsewhere" (recent heartbeat) or "silent".
    host, pid
        Host and process id.
    beat
        Time of the last heartbeat, in seconds since 1970 by the clock of the file system.
    """

    presence: Literal["here", "gone", "elsewhere", "silent"]
    host: str
    pid: int
    beat: float

    @property
    def age(self) -> float:
        """Seconds since the last heartbeat, at least zero."""
        return max(0.0, time.time() - self.beat)


@contextmanager
def heartbeat(directory: Path) -> Iterator[None]:
    """Keep the file `alive` in a run directory during the block."""
    with signs(directory / _NAME):
        yield


def read_heartbeat(directory: Path) -> Heartbeat | None:
    """Return the state of the process of a run, None without a readable file."""
    try:
        return read_signs(directory / _NAME)
    except (OSError, ValueError):
        return None


def is_at_work(directory: Path) -> bool:
    """Whether the process of a run is alive, as far as this host can tell."""
    sign = read_heartbeat(directory)
    return sign is not None and sign.presence in ("here", "elsewhere")


@contextmanager
def signs(path: Path) -> Iterator[None]:
    """Keep a heartbeat file during the block."""
    content = json.dumps(_own()).encode() + b"\n"
    replace_file(path, content)
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        if not sys.is_finalizing():  # else the thread is gone, and Python 3.13 waits forever
            beats.join()
        with suppress(OSError):  # a read-only or moved directory must not end the run
            if path.read_bytes() == content:  # else another process has taken over
                path.unlink()


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_SECONDS):
        with suppress(OSError):  # writers report a full disk
            os.utime(path)


def read_signs(path: Path) -> Heartbeat:
    """Return the state of the process that made a heartbeat file.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is damaged.
    """
    with path.open(encoding="utf-8") as file:  # NFS shows the newest state when a file is opened
        text, beat = file.read(_LONGEST), os.fstat(file.fileno()).st_mtime
    try:
        said = parse_json(text)
        host, pid = str(said["host"]), int(said["pid"])
        known = said.get("place") == _place() != ""
        started = int(said["started"]) if known else 0
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a heartbeat: {error!r}") from None
    if known:
        presence: Literal["here", "gone"] = "here" if -1 < started == _started(pid) else "gone"
        return Heartbeat(presence, host, pid, beat)
    silent = time.time() - beat >= SILENT_SECONDS
    return Heartbeat("silent" if silent else "elsewhere", host, pid, beat)


def _own() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": platform.node(), "pid": pid, "place": _place(), "started": _started(pid)}


def _place() -> str:
    """Return an identifier of this boot and process namespace, "" if it is unknown.

    The host name is not enough: hosts may share a name, and containers a host.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> int:
    """Return when a process was started, in ticks since the boot; -1 if it is dead."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return -1 if facts[_STATE] in _DEAD else int(facts[_STARTED])
    except (OSError, LookupError, ValueError):
        return -1
