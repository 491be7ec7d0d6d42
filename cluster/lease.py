"""Who may write a run directory: one launcher at a time, and the newest server's recorder alone."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from asgd.errors import InputError, RunFailedError
from cluster.checkpoint import sync_directory


class LeaseLostError(RunFailedError):
    """A newer incarnation of the server has taken over the run directory."""


class Lease:
    """The number of the incarnation that may write a run directory, in a file there.

    Every incarnation of the server takes the next number. Whoever writes for it holds the file's
    lock and looks at the number first, so an older one that is still alive somewhere writes
    nothing from the moment on at which the newer one was given its number. The log of updates is
    the exception: what an older server still appends to its own segment is ignored.

    Parameters
    ----------
    directory
        Where the file is; made by the first `take`.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lease"

    def take(self) -> int:
        """Return the number of a new incarnation: 0, 1, ...; on disk, it is never given again."""
        self._path.parent.mkdir(exist_ok=True)
        self._path.touch()
        with self._locked() as file:
            epoch = _number(file) + 1
            file.seek(0)
            file.write(f"{epoch:012d}\n")  # always as long: never empty in between
            file.flush()
            os.fsync(file.fileno())
            sync_directory(self._path.parent)
        return epoch

    def newest(self) -> int:
        """Return the number given last, -1 before the first, without waiting for the lock."""
        try:
            with self._path.open(encoding="utf-8") as file:
                return _number(file)
        except FileNotFoundError:
            return -1

    @contextmanager
    def held(self, epoch: int) -> Iterator[None]:
        """Write in the block what belongs to an incarnation.

        Raises
        ------
        LeaseLostError
            There is a newer one.
        """
        with self._locked() as file:
            if _number(file) != epoch:
                raise LeaseLostError(f"{self._path.parents[1]}: another server has taken over")
            yield

    @contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        with self._path.open("r+") as file:  # over NFS, the lock is for those who may write
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file  # closing the file writes it, then lets go of the lock


def _number(file: IO[str]) -> int:
    file.seek(0)
    text = file.read().strip()
    return int(text) if text.isdigit() else -1


@contextmanager
def only_launcher(directory: Path) -> Iterator[None]:
    """Keep any other launcher from the run directory that `directory` is in.

    Raises
    ------
    InputError
        One is at work there.
    """
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{directory.parent}: a run is at work there") from None
        yield
