"""Atomic writes, locks, and checks of the files of a run directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from asgd.errors import InputError, written


def replace_file(path: Path, content: bytes, *, flush: bool = False) -> None:
    """Replace a file atomically by `content`; `flush` as in `replacing`."""
    with replacing(path, flush=flush) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, *, flush: bool = False) -> Iterator[BinaryIO]:
    """Yield a new temporary file, which atomically replaces `path` when the block succeeds.

    `flush` writes the content to the disk before the rename. Without it, the file may be empty
    after a power failure.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # hidden: pandas reads whole directories
    try:
        temporary.unlink(missing_ok=True)  # if it is a link, writing would follow it
        with open(temporary, "w+b", opener=_without_links) as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # Report the final name, unless a directory has the temporary name.
        error.filename = os.fspath(temporary if temporary.is_dir() else path)
        raise


def sync_directory(directory: Path) -> None:
    """Flush the entries of a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def check_no_links(directory: Path) -> None:
    """Refuse a directory of runs that contains links.

    In an untrusted directory, a link could make us read, write or remove files elsewhere.

    Raises
    ------
    InputError
        An entry at any depth is a link, a pipe or another special file, or cannot be read.
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
    if not own and os.path.lexists(entry):  # a running run may have removed the file
        raise InputError(
            f"{entry.path}: is neither a file nor a directory, so it does not belong to a run"
        )


class NoLocksError(InputError):
    """The file system of a directory has no locks.

    Attributes
    ----------
    reason
        The message of the operating system.
    """

    def __init__(self, directory: Path, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f'cluster.lease = "flock": {directory} is on a file system without locks ({reason}): '
            'expected cluster.lease = "file", a local disk, or NFS version 4'
        )


@contextmanager
def locked(
    path: Path, mode: str = "a+", *, shared: bool = False, wait: bool = True
) -> Iterator[IO[str]]:
    """Open a file and hold its lock during the block; the kernel releases it if the process ends.

    Parameters
    ----------
    path
        The file; a link is refused.
    mode
        As for `open`.
    shared
        Take the lock shared instead of exclusively.
    wait
        Whether to wait for the lock.

    Raises
    ------
    BlockingIOError
        Another process holds the lock, with `wait=False`.
    NoLocksError
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
            raise NoLocksError(path.parent, error.strerror or str(error)) from None
        yield file


def is_gone(directory: Path) -> bool:
    """Whether the directory of a run was removed, or unmounted, which leaves it empty."""
    return not os.path.exists(directory / "config.json")


def describe_os_error(directory: Path, error: OSError) -> str:
    """Describe in one line an I/O error of a running run."""
    if is_gone(directory):
        return f"{directory}: was removed, moved or unmounted during the run"
    return f"{error.filename or directory}: cannot be used ({error.strerror or error})"


def make_directory(path: Path) -> None:
    """Create a directory for new results.

    Raises
    ------
    InputError
        It cannot be created, or is not empty.
    """
    with written(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path}: exists and is not empty; choose another --out")
        path.mkdir(parents=True, exist_ok=True)
