"""The worker numbers of a run, and requests of other processes to resize it.

A request is a file in the run directory with the new number of workers. The launcher polls for it,
removes it and answers in `events.jsonl`. So a request needs write access to the run directory but
no port, and works from any machine that shares the directory.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from asgd.config.tables import MOST_WORKERS, RunConfig
from asgd.errors import InputError, written
from asgd.rundir.alive import is_at_work
from asgd.rundir.checkpoint import CHECKPOINTS
from asgd.rundir.files import replace_file
from asgd.rundir.reader import read_run
from asgd.shards import has_own_parts

_PREFIX = "request-"
_LONGEST_REQUEST = 1000  # bytes
_POLL_SECONDS = 0.05
_ANSWERS = ("workers_changed", "workers_refused")


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a request file."""

    workers: Annotated[int, msgspec.Meta(ge=1, le=MOST_WORKERS)]


@dataclass(frozen=True)
class Request:
    """A request to change the number of workers.

    Attributes
    ----------
    name
        Name of the request; the answer repeats it.
    workers
        Requested number of workers; None if the request is malformed.
    """

    name: str
    workers: int | None


@dataclass(frozen=True)
class Change:
    """A change of the workers of a run.

    Attributes
    ----------
    before, after
        Number of workers before and after.
    added, removed
        Numbers of the added or removed workers.
    """

    before: int
    after: int
    added: list[int]
    removed: list[int]

    def __str__(self) -> str:
        told = [
            f"{what} {', '.join(map(str, workers))}"
            for what, workers in (("added", self.added), ("removed", self.removed))
            if workers
        ]
        return f"{self.after} workers instead of {self.before}" + "".join(f"; {t}" for t in told)


class Team:
    """The worker numbers of a run. Numbers are never reused: an added worker gets a new one.

    Worker w has part w mod P of samples that are divided (`asgd.shards`), so an added worker gets
    a number whose part the fewest workers have.

    Parameters
    ----------
    config
        The run.
    events
        Events of a resumed run; its workers are those after the last change.
    """

    def __init__(self, config: RunConfig, events: Iterable[dict[str, Any]] = ()) -> None:
        self.members = list(range(config.cluster.workers))
        self._next = config.cluster.workers
        self._parts = config.cluster.workers if has_own_parts(config.data) else 1
        self._expandable = isinstance(config.cluster.compute_time.mean, float | int)
        for event in events:
            if event.get("event") == "workers_changed":
                self.members = sorted(map(int, event["workers"]))
                self._next = max([self._next, *(worker + 1 for worker in self.members)])

    def resize(self, workers: int) -> Change:
        """Add new workers, or remove the newest.

        Raises
        ------
        InputError
            The configuration has no compute time for an added worker.
        """
        before = len(self.members)
        if workers > before and not self._expandable:
            raise InputError(
                f"workers = {workers}: expected at most {before}, because compute_time.mean has "
                "one value per worker, so none can be added"
            )
        removed = self.members[workers:]
        self.members = self.members[:workers]
        added = [self._add() for _ in range(workers - before)]
        return Change(before, workers, added, removed)

    def _add(self) -> int:
        """Add a worker and return its number."""
        held = [0] * self._parts
        for member in self.members:
            held[member % self._parts] += 1
        following = range(self._next, self._next + self._parts)
        number = min(following, key=lambda number: held[number % self._parts])
        self._next = number + 1
        self.members.append(number)
        return number


def set_workers(path: str | Path, workers: int, timeout: float = 60.0) -> Change:
    """Change the number of workers of a run that another process is running.

    Added workers join with a fresh snapshot, a new number and their own random streams. The newest
    workers are removed first, after delivering the gradient they are computing. In synchronous
    mode, each mean is over the current workers.

    Do not call this from the run's own `progress` callback.

    Parameters
    ----------
    path
        The run directory.
    workers
        New number of workers, 1 to 512.
    timeout
        Seconds to wait for the answer.

    Raises
    ------
    InputError
        The number is not valid, no run is running there, or it did not answer in time.
    """
    path = Path(path)
    if not 1 <= workers <= MOST_WORKERS:
        raise InputError(f"workers = {workers}: expected 1 to {MOST_WORKERS}")
    run = read_run(path)
    if not (path / CHECKPOINTS).is_dir():
        raise InputError(f"{path}: a simulated run; only real runs can be resized")
    if not is_at_work(path):
        raise InputError(f"{path}: the run is not running; it is {run.state}")
    name = secrets.token_hex(8)
    request = path / f"{_PREFIX}{name}.json"
    with written(path):
        replace_file(request, msgspec.json.encode(_Content(workers)))
    try:
        return _answer(path, name, time.monotonic() + timeout)
    finally:
        request.unlink(missing_ok=True)


def _answer(path: Path, name: str, deadline: float) -> Change:
    while True:
        at_work = is_at_work(path)  # checked first: events written at the end count
        for event in reversed(read_run(path).events):
            if event.get("request") == name and event.get("event") in _ANSWERS:
                if event["event"] == "workers_refused":
                    raise InputError(str(event.get("reason")))
                return Change(event["before"], event["after"], event["added"], event["removed"])
        if not at_work:
            raise InputError(f"{path}: the run ended before its workers were changed")
        if time.monotonic() > deadline:
            raise InputError(f"{path}: the run did not answer; nothing was changed")
        time.sleep(_POLL_SECONDS)


def take_requests(path: Path) -> Iterator[Request]:
    """Remove and yield the pending requests in a run directory, ordered by name."""
    for file in sorted(path.glob(f"{_PREFIX}*.json")):
        try:
            with file.open("rb") as opened:
                content = opened.read(_LONGEST_REQUEST)
            file.unlink()
        except OSError:  # withdrawn
            continue
        try:
            workers = msgspec.json.decode(content, type=_Content).workers
        except msgspec.DecodeError:
            workers = None
        yield Request(file.stem.removeprefix(_PREFIX), workers)
