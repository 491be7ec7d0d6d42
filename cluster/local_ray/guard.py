"""The guard: a process that cleans up after a driver that was killed or crashed.

Run as a program, it waits until its standard input closes or its parent changes, which happens
however the driver ends. Then it kills the remaining processes of the driver's Ray and removes its
directory. If a run was running, it writes the failure to the run's events and to standard error. If
the driver itself had recorded a failure, the guard prints that one. It has its own session and
ignores signals for the driver. It imports only the standard library (so it has its own file locks):
it starts in 50 ms and uses 10 MB.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OWNER = ".asgd-ray-owner"  # in the directory of a Ray, locked by its driver

_MARK = "ASGD_RAY_DIRECTORY"
_AGENT = re.compile(r"one Ray agent failed, agent_name = (\w+)")
_TITLE = b"ray::"  # process title of Ray's Python processes
_EXIT_CODE = 49  # its place in /proc/PID/stat after the name
_PENDING = re.compile(r"^(?:Sig|Shd)Pnd:\s*(\w+)", re.MULTILINE)
_KILL = 1 << signal.SIGKILL - 1
_SECONDS_TO_CLEAR = 10.0  # of repeated kills, as a process may start another before it dies
_SECONDS_BETWEEN_POLLS = 0.2  # between polls of the driver; a forked child may keep the input open
_POLL_SECONDS = 0.02


def mark(directory: str) -> dict[str, str]:
    """Return the environment variable that marks the processes of a Ray.

    The driver does not set it in its own environment, because all its children would inherit it.

    Parameters
    ----------
    directory
        Directory of the Ray's files.
    """
    return {_MARK: directory}


class Guard:
    """The driver's connection to its guard."""

    def __init__(self) -> None:
        self._facts: dict[str, Any] = {"driver": os.getpid()}
        self._parts: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        for facts in (self._facts, *self._parts):
            self._send(facts)

    def _send(self, facts: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the guard was killed
            self.process.stdin.write(json.dumps(facts).encode() + b"\n")
            self.process.stdin.flush()

    def tell(self, **facts: Any) -> None:
        """Tell a fact: the current `run`, Ray's `directory`, or a `part` of it with its pid.

        A `run` comes with two times: a run in this directory that started before `began` is another
        one, and a failure before `since` is an old one.
        """
        with self._lock:
            if "part" in facts:
                self._parts.append(facts)
            else:
                self._facts |= facts
                if "directory" in facts:  # another Ray, or none
                    self._parts.clear()
            self._send(facts)

    def renew(self) -> None:
        """Replace the guard if it has died; repeat all facts to the new one."""
        with self._lock:
            if self.process.poll() is not None:
                self._hang_up()
                self._start()

    def end(self) -> None:
        """End the guard; it does nothing, because its driver is alive."""
        self._hang_up()
        try:
            self.process.wait(_SECONDS_TO_CLEAR)
        except subprocess.TimeoutExpired:  # a child of the caller keeps its input open
            self.process.kill()
            self.process.wait()

    def _hang_up(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()


@contextmanager
def guarded() -> Iterator[Guard]:
    """Start a guard that cleans up, by the facts told to it, if this process dies in the block."""
    guard = Guard()
    try:
        yield guard
    finally:
        guard.end()


def end_processes(directory: str, patience: float = 0.0) -> None:
    """Wait up to `patience` seconds for the processes of a Ray to exit, then kill the rest."""
    exited = time.monotonic() + patience
    gone = exited + _SECONDS_TO_CLEAR
    while (left := processes(directory)) and time.monotonic() < gone:
        for pid in left if time.monotonic() >= exited else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def dead_agent(directory: str) -> str | None:
    """Return the agent whose death ended the raylet of a Ray, None if there was none."""
    for log in Path(directory).glob("*/session_*/logs/raylet.err"):
        found = _AGENT.search(log.read_text(errors="replace"))
        if found is not None:
            return found[1]
    return None


def remove(directory: str) -> None:
    """Remove the directory of a Ray, the owner's file last.

    If a process still writes there, files remain; the next driver finds the owner's file and
    removes them.
    """
    with suppress(OSError):
        for entry in list(os.scandir(directory)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != OWNER:
                os.unlink(entry.path)
        if os.listdir(directory) in ([], [OWNER]):
            shutil.rmtree(directory)


def processes(directory: str) -> list[int]:
    """Return the process ids, with children, of the Ray with its files in `directory`.

    They are recognised by the mark in their environment, or by their open log files if the mark is
    lost: a process title overwrites the environment, and an exiting process has none. Other readers
    of the directory, such as `tail` on a log, do not count.
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
    except OSError:  # exited, or of another user
        return False
    return f"{_MARK}={directory}".encode() in variables


def _has_no_environment(process: Path) -> bool:
    try:
        line = (process / "cmdline").read_bytes()
    except OSError:
        return False
    # An exiting process loses its memory, including the command line, before its open files.
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
class _Facts:
    """The facts that the driver has told the guard."""

    driver: int = 0
    directory: str | None = None
    run: str | None = None
    began: float = 0.0
    since: float = 0.0
    parts: dict[int, str] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)

    def hear(self, line: bytes) -> None:
        facts = json.loads(line)
        if "part" in facts:
            with suppress(OSError):  # it has died already, or the kernel is old
                self.parts[os.pidfd_open(facts["pid"])] = facts["part"]
            return
        if "directory" in facts:  # another Ray, or none
            for end in self.parts:
                os.close(end)
            self.parts, self.dead = {}, []
        for name, value in facts.items():
            setattr(self, name, value)

    def listen(self) -> None:
        """Return when the driver is gone."""
        heard = b""
        while True:
            ready = select.select([0, *self.parts], [], [], _SECONDS_BETWEEN_POLLS)[0]
            alive = self.poll()
            if 0 in ready:
                received = os.read(0, 65536)
                if not received:
                    return
                *lines, heard = (heard + received).split(b"\n")
                for line in lines:
                    self.hear(line)
            elif self.driver and not alive:
                return

    def poll(self) -> bool:
        """Return whether the driver is alive; record the parts of Ray that died before it.

        Ray ends a driver after its raylet has died. If the driver is killed first, Ray's processes
        die after it and do not count: by then this process has another parent.
        """
        ended = select.select([*self.parts], [], [], 0)[0]
        alive = os.getppid() == self.driver
        for end in ended:
            os.close(end)
            name = self.parts.pop(end)
            if alive and not _is_killed(self.driver):  # one cause may kill the driver and Ray
                self.dead.append(name)
        return alive

    def describe_end(self) -> str:
        """Describe how the driver ended, and the parts of Ray that died before it."""
        agent = dead_agent(self.directory) if self.dead and self.directory else None
        before = [agent, *self.dead] if agent else self.dead
        after = f" after Ray's {' and '.join(before)} had died" if before else ""
        return f"the launcher, process {self.driver}, was killed or crashed{after}"


def _is_killed(pid: int) -> bool:
    """Whether a process is being killed by a signal, or no longer exists."""
    try:
        code = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_EXIT_CODE])
        status = Path(f"/proc/{pid}/status").read_text()
    except (OSError, ValueError):
        return True
    pending = [int(mask, 16) for mask in _PENDING.findall(status)]
    return bool(code & 0x7F) or (not code and any(mask & _KILL for mask in pending))


def _wait_for_end(driver: int) -> None:
    """Wait until the driver, this process's parent, is gone with its locks.

    The kernel closes its files one by one, and may close this process's input before the locks.
    """
    end = time.monotonic() + _SECONDS_TO_CLEAR
    while os.getppid() == driver and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)


def _note_failure(told: _Facts, run: Path, reason: str) -> None:
    """Print that a run failed, unless it has ended or another process has taken it over.

    Also write the event `failed`, if the directory can still be written. If the driver itself had
    recorded a failure, print only that one.
    """
    try:
        if not _is_going(run, told.began):
            recorded = _recorded(run, told.since)
            if recorded is not None:
                print(f"asgd: {recorded}", file=sys.stderr)  # noqa: T201
            return
        (run / "checkpoints").mkdir(exist_ok=True)  # the driver may have died before it made it
        with _locked(run / "checkpoints" / "lock", told.driver):
            if not _is_going(run, told.began):
                return
            with (run / "events.jsonl").open("rb+") as file:
                content = file.read()
                torn = b"" if content.endswith(b"\n") or not content else b"\n"
                event = {"event": "failed", "time": time.time(), "reason": reason}
                body = json.dumps(event).encode()[:-1]  # a line with its check, as in `asgd.seals`
                file.write(torn + body + b', "check": "%08x"}\n' % zlib.crc32(body))
            (run / "alive").unlink(missing_ok=True)
    except (BlockingIOError, FileNotFoundError):  # taken over, or it never began
        return
    except (OSError, ValueError, LookupError, TypeError):
        pass
    print(f"asgd: {reason}", file=sys.stderr)  # noqa: T201


@contextmanager
def _locked(path: Path, driver: int) -> Iterator[None]:
    """Take the place of a driver: its lock or, where there are no locks, its claim.

    Raises
    ------
    BlockingIOError
        Another launcher has it.
    OSError
        The file of the lock cannot be opened.
    """
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # no locks
            pass
        claims = list(path.parent.glob(f"{path.name}-*"))  # see `asgd.rundir.claims`
        if any(json.loads(claim.read_bytes())["pid"] != driver for claim in claims):
            raise BlockingIOError
        yield
        for claim in claims:
            claim.unlink(missing_ok=True)  # or launchers on other hosts would wait for its expiry


def _is_going(run: Path, began: float) -> bool:
    """Whether a run began at `began` or later and has no end yet; an earlier one is another run."""
    content = (run / "events.jsonl").read_bytes()
    if _start(content) < began:
        return False
    return not content.rstrip().endswith(b"}") or not _is_end(content.splitlines()[-1])


def _recorded(run: Path, since: float) -> str | None:
    """Return the reason if the last event is a failure since that time, else None."""
    try:
        event = json.loads((run / "events.jsonl").read_bytes().splitlines()[-1])
        if event["event"] == "failed" and event["time"] >= since:
            return str(event["reason"])
    except (ValueError, LookupError, TypeError):
        pass
    return None


def _start(content: bytes) -> float:
    """Return the time of the first event, 0 if it cannot be read."""
    try:
        return float(json.loads(content.splitlines()[0])["time"])
    except (ValueError, LookupError, TypeError):
        return 0.0


def _is_end(line: bytes) -> bool:
    try:
        return json.loads(line)["event"] in ("finish", "failed", "interrupted")
    except (ValueError, LookupError, TypeError):
        return False


def _guard() -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    told = _Facts()
    told.listen()
    reason = told.describe_end()
    if told.directory is not None:
        end_processes(told.directory)
        remove(told.directory)
    if told.run is not None:
        _wait_for_end(told.driver)
        _note_failure(told, Path(told.run), reason)


if __name__ == "__main__":
    _guard()
