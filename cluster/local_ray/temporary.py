"""A directory for the time that this process has use of it.

Its owner holds the lock of a file in it, which the kernel lets go of however the owner ends. What
has such a file that nobody holds was abandoned, and the next one to need a directory removes it.
Nothing is removed for its name alone: anyone can give that to something else, and a process
identifier means another process in another container that shares the disk.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from asgd.errors import InputError
from asgd.rundir.files import locked

_PREFIX = "asgd-ray-"
_OWNER = ".asgd-ray-owner"


@contextmanager
def private_directory(parent: str) -> Iterator[str]:
    """Provide a directory in `parent` that nobody else can read; it is gone after the block."""
    for old in Path(parent).glob(f"{_PREFIX}*"):
        with suppress(OSError, InputError):  # in use, not ours, or gone meanwhile
            _remove_abandoned(old)
    directory = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
    try:
        unlocked = Path(directory, f"{_OWNER}.tmp")
        with locked(unlocked, "x"):
            unlocked.rename(Path(directory, _OWNER))
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _remove_abandoned(directory: Path) -> None:
    """Remove the directory of an owner that was killed before it could.

    Raises
    ------
    OSError
        It is none, or not abandoned.
    """
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return
    with locked(directory / _OWNER, "r+", wait=False):
        shutil.rmtree(directory, ignore_errors=True)
