"""A private temporary directory that is removed even after its owner was killed.

The owner locks a file in the directory; the kernel releases the lock when the owner ends. The next
owner removes every directory with an unlocked file. The name of a directory is not enough to remove
it: anybody can use the name, and a process id may belong to another container.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from asgd.errors import InputError
from asgd.rundir.files import locked
from cluster.local_ray.guard import OWNER, remove

_PREFIX = "asgd-ray-"


@contextmanager
def private_directory(parent: str) -> Iterator[str]:
    """Create a directory in `parent` that only this user can read; remove it after the block."""
    for old in Path(parent).glob(f"{_PREFIX}*"):
        with suppress(OSError, InputError):  # in use, of another user, or already removed
            _remove_abandoned(old)
    directory = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
    try:
        unlocked = Path(directory, f"{OWNER}.tmp")
        with locked(unlocked, "x"):
            unlocked.rename(Path(directory, OWNER))
            yield directory
    finally:
        remove(directory)


def _remove_abandoned(directory: Path) -> None:
    """Remove a directory whose owner was killed.

    Raises
    ------
    OSError
        The owner is alive, or the directory has no lock file.
    """
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return
    with locked(directory / OWNER, "r+", wait=False):
        remove(str(directory))
