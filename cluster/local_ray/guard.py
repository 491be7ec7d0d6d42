"""A process that clears up behind a driver that could not: killed, crashed, its terminal closed.

Run as a program, it waits until its standard input ends or it has another parent, which happens
however the driver ends, then kills what is left of the driver's Ray and removes its directory. Of
a run that the driver was at, it says that it failed, in the run's events and on standard error. It
has a session of its own and ignores signals that are meant for the driver. Nothing but the
standard library is imported: it is there in 50 ms and takes 10 MB.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

_MARK = "ASGD_RAY_DIRECTORY"
_TITLE = b"ray::"  # what Ray's Python processes call themselves
_SECONDS_TO_CLEAR = 10.0  # what is killed may have started something meanwhile
_SECONDS_TO_LOOK = 0.2  # for the driver itself: forked, a child would keep the input open
_POLL_SECONDS = 0.02


def mark(directory: str) -> dict[str, str]:
    """Return what is to be in the environment of the processes that make up a Ray, and in no other.

    The driver's own environment is no place for it: its other children would inherit it.

    Parameters
    ----------
    directory
        Where this Ray has its files.
    """
    return {_MARK: directory}


@dataclass(frozen=True)
class Guard:
    """The driver's end of the line to its guard.

    Attributes
    ----------
    line
        The guard's standard input.
    """

    line: IO[bytes]

    def tell(self, **facts: Any) -> None:
        """Tell the guard a fact: of `run`, what the driver is at, of `part`, a process of Ray."""
        with suppress(BrokenPipeError):  # it was killed: then there is nobody to tell
            self.line.write(json.dumps(facts).encode() + b"\n")
            self.line.flush()


@contextmanager
def guarded(directory: str | None = None) -> Iterator[Guard]:
    """Have a directory and the processes of the Ray there removed should this process die here."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    assert process.stdin is not None
    guard = Guard(process.stdin)
    guard.tell(directory=directory, driver=os.getpid())
    try:
        yield guard
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_SECONDS_TO_CLEAR)
        except subprocess.TimeoutExpired:  # a child of the program keeps its standard input open
            process.kill()
            process.wait()


def end_processes(directory: str, patience: float) -> None:
    """Wait up to `patience` seconds for the processes of a Ray to exit; kill what stays."""
    deadline = time.monotonic() + patience
    while (left := processes(directory)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes(directory: str) -> list[int]:
    """Return the processes of the Ray that has its files in a directory, and theirs.

    Each has the mark in its environment but for those that give themselves a title, which
    overwrites the environment, and those that exit; they keep their log files. Others that look
    into the directory, as `tail` on a log does, and the children of the driver are not among them.
    """
    return [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if _is_marked(process, directory)
        or (_has_no_environment(process) and _has_open(process, directory))
    ]


def _is_marked(process: Path, directory: str) -> bool:
    try:
        variables = (process / "environ").read_bytes().split(b"\0")
    except OSError:  # gone meanwhile, or somebody else's
        return False
    return f"{_MARK}={directory}".encode() in variables


def _has_no_environment(process: Path) -> bool:
    try:
        line = (process / "cmdline").read_bytes()
    except OSError:
        return False
    # A process that exits loses its command line with its memory, and its files after that.
    return not line or line.startswith(_TITLE)


def _has_open(process: Path, directory: str) -> bool:
    try:
        files = list((process / "fd").iterdir())
    except OSError:
        return False
    for file in files:
        with suppress(OSError):  # closed meanwhile
            if os.readlink(file).startswith(f"{directory}/"):
                return True
    return False


@dataclass
class _Told:
    """What the driver has told its guard."""

    driver: int = 0
    directory: str | None = None
    run: str | None = None
    parts: dict[str, int] = field(default_factory=dict)
    dead: dict[str, float] = field(default_factory=dict)

    def hear(self, line: bytes) -> None:
        facts = json.loads(line)
        if "part" in facts:
            self.parts[facts["part"]] = facts["pid"]
            return
        for name, value in facts.items():
            setattr(self, name, value)

    def listen(self) -> None:
        """Return when the driver is gone."""
        heard = b""
        while True:
            if select.select([0], [], [], _SECONDS_TO_LOOK)[0]:
                received = os.read(0, 65536)
                if not received:
                    return
                *lines, heard = (heard + received).split(b"\n")
                for line in lines:
                    self.hear(line)
            elif self.driver and not self.look():
                return

    def look(self) -> bool:
        """Return whether the driver is alive; note when each dead part of Ray was first seen."""
        for name, pid in self.parts.items():
            if name not in self.dead and not _is_alive(pid):
                self.dead[name] = time.monotonic()
        return os.getppid() == self.driver

    def epitaph(self) -> str:
        """Return in words how the driver ended.

        What kills the driver may kill Ray's processes at the same moment, and the kernel ends them
        with the driver: only those that died a while before it are named.
        """
        latest = time.monotonic() - _SECONDS_TO_LOOK
        before = [name for name, seen in self.dead.items() if seen < latest]
        after = f" after Ray's {' and '.join(before)} had died" if before else ""
        return f"the launcher, process {self.driver}, was killed or crashed{after}"


def _is_alive(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def _note_failure(run: Path, reason: str) -> None:
    """Say in the events of a run that it failed, unless it ended or somebody else is at it."""
    with suppress(OSError), (run / "checkpoints" / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with (run / "events.jsonl").open("rb+") as file:
            content = file.read()
            if not content.rstrip().endswith(b"}") or not _is_end(content.splitlines()[-1]):
                torn = b"" if content.endswith(b"\n") or not content else b"\n"
                event = {"event": "failed", "time": time.time(), "reason": reason}
                file.write(torn + json.dumps(event).encode() + b"\n")
                print(f"asgd: {reason}", file=sys.stderr)  # noqa: T201
        (run / "alive").unlink(missing_ok=True)


def _is_end(line: bytes) -> bool:
    try:
        return json.loads(line)["event"] in ("finish", "failed", "interrupted")
    except (ValueError, LookupError, TypeError):
        return False


def _guard() -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    told = _Told()
    told.listen()
    reason = told.epitaph()
    if told.directory is not None:
        deadline = time.monotonic() + _SECONDS_TO_CLEAR
        while processes(told.directory) and time.monotonic() < deadline:
            end_processes(told.directory, 0.0)
            time.sleep(_POLL_SECONDS)
        shutil.rmtree(told.directory, ignore_errors=True)
    if told.run is not None:
        _note_failure(Path(told.run), reason)


if __name__ == "__main__":
    _guard()
