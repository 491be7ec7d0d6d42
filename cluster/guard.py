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

_SECONDS_TO_CLEAR = 10.0  # what is killed may have started something meanwhile
_SECONDS_TO_LOOK = 1.0  # for the driver itself: forked, a child would keep the input open
_POLL_SECONDS = 0.02


@contextmanager
def guarded(token: str, directory: str) -> Iterator[None]:
    """Have the processes of a Ray and its directory removed should this process die in the block.

    Parameters
    ----------
    token
        In the environment of each of its processes; not yet in this one's.
    directory
        Where they have their files.
    """
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    assert guard.stdin is not None
    guard.stdin.write(json.dumps([token, directory, os.getpid()]).encode() + b"\n")
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


def end_processes(token: str, directory: str, patience: float, driver: int) -> None:
    """Wait up to `patience` seconds for the processes of a Ray to exit; kill what stays."""
    deadline = time.monotonic() + patience
    while (left := processes(token, directory, driver)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes(token: str, directory: str, driver: int) -> list[int]:
    """Return the processes with a token in their environment or files open in a directory.

    Without the driver, which has such files, too.

    A process that gives itself a title overwrites its environment, but keeps its log files.
    """
    return [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if int(process.name) != driver
        and (_environment_has(process, token) or _has_open(process, directory))
    ]


def _environment_has(process: Path, token: str) -> bool:
    try:
        return token.encode() in (process / "environ").read_bytes()
    except OSError:  # gone meanwhile, or somebody else's
        return False


def _has_open(process: Path, directory: str) -> bool:
    try:
        files = list((process / "fd").iterdir())
    except OSError:
        return False
    for file in files:
        with suppress(OSError):  # closed meanwhile
            if os.readlink(file).startswith(directory):
                return True
    return False


def _guard() -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    told = sys.stdin.readline()
    if not told:
        return
    token, directory, driver = json.loads(told)
    while not select.select([sys.stdin], [], [], _SECONDS_TO_LOOK)[0] and os.getppid() == driver:
        pass
    deadline = time.monotonic() + _SECONDS_TO_CLEAR
    while processes(token, directory, driver) and time.monotonic() < deadline:
        end_processes(token, directory, 0.0, driver)
        time.sleep(_POLL_SECONDS)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    _guard()
