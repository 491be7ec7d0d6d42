"""Files of a run directory: written whole or not at all, and nothing outside it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from asgd.errors import InputError


def replace_file(path: Path, content: bytes, *, flush: bool = False) -> None:
    """Write a file under a temporary name and rename it: readers see the old one or the new.

    With `flush` the new one is on the disk before it takes the name, so that a machine that loses
    its power is not left with the name of the old one and the content of neither.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # hidden: pandas reads whole directories
    try:
        temporary.unlink(missing_ok=True)  # it might be a link, which writing would follow
        with open(temporary, "wb", opener=_without_links) as file:
            file.write(content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # The name that a reader knows, unless the other one is what is in the way.
        error.filename = os.fspath(temporary if temporary.is_dir() else path)
        raise


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def check_no_links(directory: Path) -> None:
    """Refuse a run directory, or one of repeats, that leads out of itself.

    A stranger's might, to have files elsewhere read into a report, written to or removed.

    Raises
    ------
    InputError
        Something in it, however deep, is a link, a pipe or the like, or cannot be read.
    """
    places = [os.fspath(directory)]
    try:
        while places:
            with contextlib.suppress(FileNotFoundError), os.scandir(places.pop()) as entries:
                for entry in entries:
                    _check_own(entry)
                    if entry.is_dir(follow_symlinks=False):
                        places.append(entry.path)
    except OSError as error:
        where = error.filename or directory
        raise InputError(f"{where}: cannot be read ({error.strerror or error})") from None


def _check_own(entry: os.DirEntry[str]) -> None:
    own = entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
    if not own and os.path.lexists(entry):  # a run at work removes files meanwhile
        raise InputError(
            f"{entry.path}: is neither a file nor a directory, which is all that a run directory "
            "holds"
        )


@contextmanager
def locked(
    path: Path, mode: str = "a+", *, shared: bool = False, wait: bool = True
) -> Iterator[IO[str]]:
    """Provide an open file whose lock is held in the block; the kernel releases it with a process.

    Parameters
    ----------
    path
        The file; a link is refused.
    mode
        As for `open`.
    shared
        Whether others may hold the lock shared as well.
    wait
        Whether to wait for the lock.

    Raises
    ------
    BlockingIOError
        Another process holds the lock, with `wait=False`.
    InputError
        The file system has no locks.
    OSError
        The file cannot be opened.
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    with open(path, mode, encoding="utf-8", errors="replace", opener=_without_links) as file:
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            raise
        except OSError as error:
            raise InputError(
                f"{path}: the file system gives no lock ({error.strerror or error}); put the run "
                "on a local disk, or on NFS version 4"
            ) from None
        yield file


def what_is_wrong(directory: Path, error: OSError) -> str:
    """Return in one line what a run in a directory met that was at work."""
    if not directory.is_dir():
        return f"{directory}: was removed or moved while the run was at work"
    return f"{error.filename or directory}: cannot be used ({error.strerror or error})"


def make_directory(path: Path) -> None:
    """Make a directory for new results.

    Raises
    ------
    InputError
        It cannot be made, holds something already, or its file system has no locks.
    """
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path}: exists and is not empty; choose another --out")
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".lock.tmp"  # before there is anything that would be in the way next time
        try:
            with locked(probe, "x", wait=False):
                pass
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
