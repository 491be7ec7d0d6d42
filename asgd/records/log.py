"""A log of staleness for a training loop of one's own.

Logging needs the standard library only. Each item is one line of `log.jsonl`, appended in one
write. All processes map the file `published`, which contains the version that readers get now.
"""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import threading
import time
import weakref
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from asgd.arguments import count
from asgd.errors import InputError, written
from asgd.records.names import LOG, PUBLISHED
from asgd.rundir.alive import heartbeat
from asgd.rundir.files import make_directory, replace_file

UNITS = ("updates", "versions", "steps")
FORMAT = "staleness log"

_CLOSED = -1  # stored instead of the version


class Read(NamedTuple):
    """The versions of one read, as plain numbers, which any queue can carry.

    Attributes
    ----------
    version
        Version of the parameters.
    started
        Version that was published when the computation began.
    finished
        Version that was published when it ended; -1 if that was not logged.
    """

    version: int
    started: int
    finished: int = -1


class StalenessLog:
    """Logs the staleness of a loop into a record, from any number of threads and processes.

    >>> log = asgd.StalenessLog("runs/mine")
    >>> log.published(0)
    >>> read = log.read()  # before a worker computes
    >>> log.applied("worker 0", read, loss=0.5)  # its staleness
    0
    >>> log.published(1)  # after the update
    >>> log.close()

    Staleness is the published version when an item is applied, less the one that was read. The
    record can be read while it grows. A log can be pickled and sent to other processes.

    Parameters
    ----------
    path
        The record's directory, empty or missing.
    unit
        What a version counts: "updates" if each one is published, "versions" if only some are, or
        "steps".

    Raises
    ------
    InputError
        The unit is unknown, or the directory cannot be used.
    """

    def __init__(self, path: str | Path, *, unit: str = "updates") -> None:
        if unit not in UNITS:
            raise InputError(f"unit = {unit!r}: expected one of {', '.join(UNITS)}")
        path = Path(path).absolute()
        make_directory(path)
        with written(path):
            (path / PUBLISHED).write_bytes(bytes(8))
            about = {"kind": "logged", "format": FORMAT, "source": "a loop", "unit": unit}
            replace_file(path / "record.json", (json.dumps(about, indent=2) + "\n").encode())
            (path / "events.jsonl").write_text(
                json.dumps({"event": "start", "time": time.time()}) + "\n", encoding="utf-8"
            )
        self._open(path)
        self._alive = ExitStack()
        self._alive.enter_context(heartbeat(path))
        self._owner = os.getpid()

    @classmethod
    def join(cls, path: str | Path) -> StalenessLog:
        """Return the log that another process has opened at `path`.

        Raises
        ------
        InputError
            No log is open there.
        """
        log, path = cls.__new__(cls), Path(path).absolute()
        if not (path / PUBLISHED).is_file():
            raise InputError(f"{path}: no open log")
        log._open(path)
        log._alive, log._owner = ExitStack(), -1
        return log

    def _open(self, path: Path) -> None:
        self.path = path
        with written(path):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._lines = os.open(path / LOG, flags, 0o666)
            self._shared = os.open(path / PUBLISHED, os.O_RDWR | os.O_CLOEXEC)
            self._version = memoryview(mmap.mmap(self._shared, 8)).cast("q")
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=partial(_unlock, weakref.ref(self)))

    def published(self, version: int) -> None:
        """Note that readers get this version from now on.

        Raises
        ------
        InputError
            It is not a whole number >= 0, or the log is closed.
        """
        number = count(version, "version", 0)
        self._current()
        self._version[0] = number

    def read(self, worker: object = None, *, version: int | None = None) -> Read:
        """Return the read of a worker now; pass it to `applied`.

        Parameters
        ----------
        worker
            Unused; it only makes the call readable.
        version
            The version that the worker has, if it is not the one published last. The versions
            published since then count as staleness in publication.

        Raises
        ------
        InputError
            The log is closed.
        """
        now = self._current()
        have = now if version is None else count(version, "version", 0)
        # A worker may have a version before `published` is called.
        return Read(have, max(have, now))

    def computed(self, read: Read) -> Read:
        """Note that an item is computed and now waits until it is applied."""
        return read._replace(finished=max(read.started, self._current()))

    def applied(
        self,
        worker: object,
        read: Read,
        *,
        loss: float | None = None,
        samples: int | None = None,
        item: object = None,
    ) -> int:
        """Log an item that is part of the next update, and return its staleness.

        Parameters
        ----------
        worker
            Name or number of the worker that computed it.
        read
            The read of that worker.
        loss
            Its loss, or that of the update.
        samples
            Its number of samples.
        item
            Its name; a second item of the same name in one update is left out.

        Raises
        ------
        InputError
            The version that was read is not published yet, or the log is closed.
        """
        line: dict[str, Any] = {
            "read_version": read.version,
            "start_version": read.started,
            "end_version": read.finished if read.finished >= 0 else None,
            "worker": str(worker),
            "item": None if item is None else str(item),
            "samples": None if samples is None else count(samples, "samples", 0),
            "loss": float(loss) if loss is not None and math.isfinite(loss) else None,
        }
        with self._lock:
            # A lock of the process, not of the file descriptor, which a forked process shares.
            fcntl.lockf(self._shared, fcntl.LOCK_EX)
            try:
                update = self._current()
                if read.version > update:
                    raise InputError(
                        f"read.version = {read.version}: expected one published, up to {update}"
                    )
                line |= {"update": update, "seconds": time.time()}
                content = (json.dumps(line) + "\n").encode()
                done = os.write(self._lines, content)
                if done != len(content):  # the disk is full: remove the torn line
                    os.ftruncate(self._lines, os.fstat(self._lines).st_size - done)
                    raise InputError(f"{self.path / LOG}: cannot be written (disk full)")
            finally:
                fcntl.lockf(self._shared, fcntl.LOCK_UN)
        return update - read.version

    def close(self) -> None:
        """End the record: tables of columns replace the lines.

        Only the process that made the log can do this; the log is then closed for all processes.

        Raises
        ------
        InputError
            The tables cannot be written; the lines are kept.
        """
        if os.getpid() != self._owner or self._version[0] == _CLOSED:
            return
        with self._lock:
            fcntl.lockf(self._shared, fcntl.LOCK_EX)
            try:
                self._version[0] = _CLOSED
            finally:
                fcntl.lockf(self._shared, fcntl.LOCK_UN)
        self._alive.close()
        from asgd.records.importing import close_log  # only now: it needs Arrow

        close_log(self.path)

    def _current(self) -> int:
        version = self._version[0]
        if version == _CLOSED:
            raise InputError(f"{self.path}: the log is closed")
        return version

    def __enter__(self) -> StalenessLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return StalenessLog.join, (self.path,)

    def __del__(self) -> None:
        for name in ("_lines", "_shared"):
            descriptor = self.__dict__.pop(name, None)
            if descriptor is not None:
                os.close(descriptor)


def _unlock(log: weakref.ref[StalenessLog]) -> None:
    """Replace the lock in a forked process, which lacks the thread that may hold it."""
    found = log()
    if found is not None:
        found._lock = threading.Lock()
