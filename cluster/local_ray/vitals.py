"""Monitors Ray's own processes, and holds the guard of this process.

A process has at most one Ray, so this state is global. A joined cluster has none of its processes
here; Ray itself handles its nodes.
"""

from __future__ import annotations

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
from cluster.local_ray.guard import Guard, dead_agent, guarded

SECONDS_TO_DIE = 2.0  # time for a raylet whose agent died to end its actors and itself

_NAMES = ("gcs_server", "raylet")  # without one of them, Ray ends this process sooner or later
_POLL_SECONDS = 0.25


@dataclass
class Vitals:
    """The processes of one Ray, and the guard.

    Attributes
    ----------
    guard
        Cleans up after this process.
    directory
        Directory of Ray's files; None for a joined cluster.
    parts
        Ray's processes, if this process started them.
    """

    guard: Guard
    directory: str | None = None
    parts: list[subprocess.Popen[Any]] = field(default_factory=list)

    def add(self, process: subprocess.Popen[Any]) -> None:
        """Watch a new process of Ray."""
        if _name(process) in _NAMES:
            self.parts.append(process)
            self.guard.tell(part=_name(process), pid=process.pid)

    def death(self) -> str | None:
        """Describe the death of a process of Ray, None while all are alive."""
        for process in self.parts:
            status = process.poll()
            if status is not None:
                return f"Ray's {_name(process)} {self._manner(status)}"
        return None

    def _manner(self, status: int) -> str:
        if status >= 0:
            agent = dead_agent(self.directory) if self.directory else None
            if agent is not None:
                return f"ended because its {agent} died"
            return f"ended with status {status}"
        number = -status
        limit = "; see `ulimit -f`" if number == signal.SIGXFSZ else ""
        return f"was killed ({signal.strsignal(number)}{limit})"


def _name(process: subprocess.Popen[Any]) -> str:
    arguments = process.args
    return Path(str(arguments[0])).name if isinstance(arguments, list | tuple) else ""


@dataclass
class _Ours:
    """The guard and the Ray of this process."""

    guard: Guard | None = None
    vitals: Vitals | None = None


_ours = _Ours()


@contextmanager
def guard_of_process() -> Iterator[Guard]:
    """Provide the guard of this process during the block: the present one, or a new one."""
    if _ours.guard is not None:
        yield _ours.guard
        return
    with guarded() as guard:
        _ours.guard = guard
        try:
            yield guard
        finally:
            _ours.guard = None


@contextmanager
def vitals_of(guard: Guard, directory: str | None = None) -> Iterator[Vitals]:
    """Provide the vitals of the Ray of this process during the block."""
    guard.tell(directory=directory)
    _ours.vitals = Vitals(guard, directory)
    try:
        yield _ours.vitals
    finally:
        _ours.vitals = None
        guard.tell(directory=None)


@contextmanager
def failure_recorded(run: Path, *, new: bool = False) -> Iterator[None]:
    """If this process dies in the block, its guard records that the run failed.

    The directory of a `new` run need not exist yet.
    """
    now = time.time()
    _tell_run(str(run.resolve()), began=now if new else 0.0, since=now)
    try:
        yield
    finally:
        _tell_run(None)


def _tell_run(run: str | None, *, began: float = 0.0, since: float = 0.0) -> None:
    if _ours.guard is not None:
        _ours.guard.tell(run=run, began=began, since=since)


def ray_death() -> str | None:
    """Describe how our private Ray died, None while it is alive; replace a guard that has died."""
    if _ours.guard is not None:
        _ours.guard.renew()
    return None if _ours.vitals is None else _ours.vitals.death()


def check_ray(patience: float = 0.0) -> None:
    """Check that Ray is alive.

    Parameters
    ----------
    patience
        Seconds to wait for an expected death.

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
    """Return the result of an actor call, or fail if Ray dies first.

    Raises
    ------
    RunFailedError
        The private Ray is dead.
    """
    while not ray.wait([call], timeout=_POLL_SECONDS)[0]:
        check_ray()
    return ray.get(call)
