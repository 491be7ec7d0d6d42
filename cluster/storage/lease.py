"""The right to write a run directory: one launcher at a time, and only its newest server."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import IO

from asgd.errors import InputError, RunFailedError, written
from asgd.rundir.files import locked, sync_directory

LOG_FILES = "log-*.bin"  # segments of the write-ahead log: log-<epoch>-<version>.bin
_NUMBER, _LONGEST = re.compile(r"[0-9]{12}\n"), 32


class LeaseLostError(RunFailedError):
    """A newer incarnation of the server has taken over the run directory."""


class Lease:
    """A file with the number of the incarnation that may write the run directory.

    Every incarnation of the server takes the next number under the exclusive lock of the file.
    Before writing, an incarnation takes the shared lock and compares its number, so an old server
    that is still alive stops writing. Checking the lease on every update would double its cost, so
    the write-ahead log checks it when a segment is created. The old server still holds its segment
    open: before releasing the lock, `take` replaces the file by a copy, so later writes of the old
    server go to an unlinked file and are lost.

    Parameters
    ----------
    directory
        Directory of the file; created by the first `take`.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lease"

    def take(self) -> int:
        """Return the number of a new incarnation, 0, 1, ...; it is on disk and never reused.

        Raises
        ------
        InputError
            The file is damaged.
        """
        self._path.parent.mkdir(exist_ok=True)
        self._path.touch()
        with self._locked(shared=False) as file:
            epoch = _number(file) + 1
            file.seek(0)
            file.write(f"{epoch:012d}\n")  # overwritten in place, so the file is never empty
            file.flush()
            os.fsync(file.fileno())
            self._take_segments()
            sync_directory(self._path.parent)
        return epoch

    def _take_segments(self) -> None:
        paths = sorted(self._path.parent.glob(LOG_FILES))
        newest = {path.name.split("-")[1]: path for path in paths}  # by epoch: the open segment
        for path in newest.values():
            copy = path.with_name(f"{path.name}.tmp")
            try:
                with path.open("rb") as source, copy.open("wb") as target:
                    shutil.copyfileobj(source, target)
                    target.flush()
                    os.fsync(target.fileno())  # the original may be on the disk already
                os.replace(copy, path)
            finally:
                copy.unlink(missing_ok=True)  # free the space on a full disk

    @contextmanager
    def held(self, epoch: int) -> Iterator[None]:
        """Hold the lease of an incarnation during the block; its writers share the lock.

        Raises
        ------
        LeaseLostError
            There is a newer incarnation.
        """
        with self._locked(shared=True) as file:
            if _number(file) != epoch:
                raise LeaseLostError(f"{self._path.parents[1]}: another server has taken over")
            yield

    def _locked(self, *, shared: bool) -> AbstractContextManager[IO[str]]:
        # Over NFS, a lock needs a file that is open for writing. Closing writes, then unlocks.
        return locked(self._path, "r+", shared=shared)


def check_lease(directory: Path) -> None:
    """Check that the lease file is missing or valid.

    Raises
    ------
    InputError
        The file is damaged.
    """
    path = directory / "lease"
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            _number(file)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _number(file: IO[str]) -> int:
    """Return the number in a lease file, -1 if the file is empty.

    Raises
    ------
    InputError
        The file is damaged. Starting over at 0 would reuse the numbers of older servers.
    """
    file.seek(0)
    text = file.read(_LONGEST)
    if text and not _NUMBER.fullmatch(text):
        raise InputError(f"{file.name}: is damaged: expected the number of a server, got {text!r}")
    return int(text) if text else -1


@contextmanager
def only_launcher(directory: Path) -> Iterator[None]:
    """Lock the run directory that contains `directory` against other launchers.

    Raises
    ------
    InputError
        Another launcher holds the lock.
    """
    with ExitStack() as stack:
        with written(directory):
            try:
                directory.mkdir(exist_ok=True)
                stack.enter_context(locked(directory / "lock", wait=False))
            except BlockingIOError:
                raise InputError(f"{directory.parent}: the run is still running") from None
        yield
