"""The right to write a run directory: one launcher at a time, and only its newest server."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import IO

from asgd.config.tables import LeaseKind
from asgd.errors import InputError, written
from asgd.rundir.claims import HeldError, LeaseLostError, claimed, held_alone, settle
from asgd.rundir.files import locked, sync_directory

LOG_FILES = "log-*.bin"  # segments of the write-ahead log: log-<epoch>-<version>.bin
_NUMBER, _LONGEST = re.compile(r"[0-9]{12}\n"), 32


class Lease:
    """A file with the number of the incarnation that may write the run directory.

    Every incarnation of the server takes the next number under the exclusive lock of the file.
    Before writing, an incarnation takes the shared lock and compares its number, so an old server
    that is still alive stops writing. Checking the lease on every update would double its cost, so
    the write-ahead log checks it when a segment is created. The old server still holds its segment
    open: before releasing the lock, `take` replaces the file by a copy, so later writes of the old
    server go to an unlinked file and are lost.

    Where there are no locks, a writer first claims the lease and then compares the number; `take`
    first writes its number and then waits until no claim is left. The promise is weaker, see
    `asgd.rundir.claims`: a process that stops for 30 s in the middle of a write may complete this
    write when it continues.

    Parameters
    ----------
    directory
        Directory of the file; created by the first `take`.
    kind
        "flock" for locks, "file" for claims.
    """

    def __init__(self, directory: Path, kind: LeaseKind = "flock") -> None:
        self._path = directory / "lease"
        self._kind = kind

    def take(self) -> int:
        """Return the number of a new incarnation, 0, 1, ...; it is on disk and never reused.

        Only the launcher may call this, see `only_launcher`.

        Raises
        ------
        InputError
            The file is damaged.
        """
        self._path.parent.mkdir(exist_ok=True)
        self._path.touch()
        with self._opened(shared=False) as file:
            epoch = _number(file) + 1
            file.seek(0)
            # Overwritten in place, so the file is never empty, and NFS shows it when it is opened.
            file.write(f"{epoch:012d}\n")
            file.flush()
            os.fsync(file.fileno())
            if self._kind == "file":
                settle(self._path, wait=True)
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
        with self._opened(shared=True) as file:
            if _number(file) != epoch:
                raise LeaseLostError(f"{self._path.parents[1]}: another server has taken over")
            yield

    @contextmanager
    def _opened(self, *, shared: bool) -> Iterator[IO[str]]:
        if self._kind == "flock":
            # Over NFS, a lock needs a file that is open for writing. Closing writes, then unlocks.
            with locked(self._path, "r+", shared=shared) as file:
                yield file
        else:
            with claimed(self._path) if shared else nullcontext(), self._path.open("r+") as file:
                yield file


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
def only_launcher(directory: Path, kind: LeaseKind = "flock") -> Iterator[Callable[[], None]]:
    """Hold the run directory that contains `directory` against other launchers.

    Yields
    ------
    Callable
        Raises `LeaseLostError` if another launcher has taken over, which locks prevent.

    Raises
    ------
    InputError
        Another launcher is at work, or the directory cannot be written.
    """
    with ExitStack() as stack:
        with written(directory):
            directory.mkdir(exist_ok=True)
            try:
                check = stack.enter_context(held_alone(directory / "lock", kind))
            except HeldError as error:
                holder = error.holder and f" ({error.holder})"
                raise InputError(f"{directory.parent}: the run is still running{holder}") from None
        yield check
