"""What a run needs besides its own actors: the processes of our own Ray, and its guard.

There is one Ray in a process, so this is kept for the process. A Ray that is not ours has no
processes here, and its nodes are Ray's own business.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from asgd.errors import RunFailedError
from cluster.local_ray.guard import Guard

SECONDS_TO_DIE = 2.0  # of a raylet one of whose agents died, after it has ended its actors

_NAMES = ("gcs_server", "raylet")  # without either of them, Ray ends this process sooner or later
_AGENT = re.compile(r"one Ray agent failed, agent_name = (\w+)")
_POLL_SECONDS = 0.25


@dataclass
class Vitals:
    """Of one Ray.

    Attributes
    ----------
    guard
        Who clears up behind this process.
    directory
        Where this Ray has its files; None where it is not our own.
    parts
        Its processes that this process started.
    """

    guard: Guard
    directory: str | None = None
    parts: list[subprocess.Popen[Any]] = field(default_factory=list)

    def add(self, process: subprocess.Popen[Any]) -> None:
        """Watch a process that was started for Ray."""
        if _name(process) in _NAMES:
            self.parts.append(process)
            self.guard.tell(part=_name(process), pid=process.pid)

    def death(self) -> str | None:
        """Return which process of Ray is dead and how it died, None while all are alive."""
        for process in self.parts:
            status = process.poll()
            if status is not None:
                return f"Ray's {_name(process)} {self._manner(status)}"
        return None

    def _manner(self, status: int) -> str:
        for log in Path(self.directory or "").glob("*/session_*/logs/raylet.err"):
            found = _AGENT.search(log.read_text(errors="replace"))
            if found is not None and status >= 0:
                return f"ended because its {found[1]} died"
        if status >= 0:
            return f"ended with status {status}"
        number = -status
        limit = "; see `ulimit -f`" if number == signal.SIGXFSZ else ""
        return f"was killed ({signal.strsignal(number)}{limit})"


def _name(process: subprocess.Popen[Any]) -> str:
    arguments = process.args
    return Path(str(arguments[0])).name if isinstance(arguments, list | tuple) else ""


@dataclass
class _Ours:
    """Of this process: the Ray it has, and the run it is at."""

    vitals: Vitals | None = None
    run: str | None = None


_ours = _Ours()


@contextmanager
def vitals_of(guard: Guard, directory: str | None = None) -> Iterator[Vitals]:
    """Keep what there is to know of the Ray of this process during the block."""
    guard.tell(run=_ours.run)
    _ours.vitals = Vitals(guard, directory)
    try:
        yield _ours.vitals
    finally:
        _ours.vitals = None


@contextmanager
def witnessed(run: Path) -> Iterator[None]:
    """Have the run in a directory noted as failed should this process die with Ray in the block."""
    _at(str(run.resolve()))
    try:
        yield
    finally:
        _at(None)


def _at(run: str | None) -> None:
    _ours.run = run
    if _ours.vitals is not None:
        _ours.vitals.guard.tell(run=run)


def ray_death() -> str | None:
    """Return how our own Ray died, None while it lives."""
    return None if _ours.vitals is None else _ours.vitals.death()


def check_ray(patience: float = 0.0) -> None:
    """Refuse to go on without Ray.

    Parameters
    ----------
    patience
        Seconds to wait for it to die, where that is to be expected.

    Raises
    ------
    RunFailedError
        One of its processes is dead.
    """
    deadline = time.monotonic() + patience
    while (death := ray_death()) is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    if death is not None:
        raise RunFailedError(death)


def answer(call: ray.ObjectRef[Any]) -> Any:
    """Return the answer to a call of an actor, which without Ray would never come.

    Raises
    ------
    RunFailedError
        Our own Ray is dead.
    """
    while not ray.wait([call], timeout=_POLL_SECONDS)[0]:
        check_ray()
    return ray.get(call)
