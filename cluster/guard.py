"""A process that clears up behind a driver that could not: killed, crashed, its terminal closed.

Run as a program, it waits until its standard input ends or it has another parent, which happens
however the driver ends, then kills what is left of the driver's Ray and removes its directory. It
has a session of its own and ignores signals that are meant for the driver. Nothing but the
standard library is imported: it is there in 50 ms and takes 10 MB.
"""

from __future__ import annotations

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
from pathlib import Path

_MARK = "ASGD_RAY_DIRECTORY"
_TITLE = b"ray::"  # what Ray's Python processes call themselves
_SECONDS_TO_CLEAR = 10.0  # what is killed may have started something meanwhile
_SECONDS_TO_LOOK = 1.0  # for the driver itself: forked, a child would keep the input open
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


@contextmanager
def guarded(directory: str) -> Iterator[None]:
    """Have a directory and the processes of the Ray there removed should this process die here."""
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    assert guard.stdin is not None
    guard.stdin.write(json.dumps([directory, os.getpid()]).encode() + b"\n")
    guard.stdin.flush()
    try:
        yield
    finally:
        with suppress(BrokenPipeError):
            guard.stdin.close()
        try:
            guard.wait(_SECONDS_TO_CLEAR)
        except subprocess.TimeoutExpired:  # a child of the program keeps its standard input open
            guard.kill()
            guard.wait()


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


def _guard() -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    told = sys.stdin.readline()
    if not told:
        return
    directory, driver = json.loads(told)
    while not select.select([sys.stdin], [], [], _SECONDS_TO_LOOK)[0] and os.getppid() == driver:
        pass
    deadline = time.monotonic() + _SECONDS_TO_CLEAR
    while processes(directory) and time.monotonic() < deadline:
        end_processes(directory, 0.0)
        time.sleep(_POLL_SECONDS)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    _guard()
