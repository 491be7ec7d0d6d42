"""The checkpoint file: vectors and a header, saved atomically and read back.

    offset  bytes  field
         0     18  magic "ASGD checkpoint 1\\n"
        18     32  SHA-256 of everything after it
        50      8  length of the header, little-endian
        58         header, JSON
                   arrays in NumPy's own format, one after another: the parameters, the rule's state

A checkpoint is written under a temporary name, flushed to the disk, read back and renamed. The
previous checkpoint is kept in case the newest one is damaged later. A simulated run saves its last
state in the same format, as `parameters.bin`.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asgd.arrays import Array
from asgd.errors import AsgdError
from asgd.rundir.files import sync_directory

CHECKPOINTS = "checkpoints"  # in the run directory
PARAMETERS = "parameters.bin"  # in that of a simulated run

_MAGIC = b"ASGD checkpoint 1\n"
_DIGEST_BYTES = 32
_LENGTH_BYTES = 8
_KEPT = 2


class DamagedCheckpointError(AsgdError):
    """A checkpoint file is damaged."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes
    ----------
    header
        JSON.
    arrays
        Vectors, float64 or float32; the first holds the parameters, shape (d,).
    """

    header: bytes
    arrays: tuple[Array, ...]

    def pack(self) -> bytes:
        """Return the bytes of the file."""
        body = io.BytesIO()
        body.write(len(self.header).to_bytes(_LENGTH_BYTES, "little") + self.header)
        for array in self.arrays:
            np.lib.format.write_array(body, array, allow_pickle=False)
        content = body.getvalue()
        return _MAGIC + hashlib.sha256(content).digest() + content

    @classmethod
    def unpack(cls, data: bytes) -> Checkpoint:
        """Return the content of the bytes of a file.

        Raises
        ------
        DamagedCheckpointError
            They are damaged.
        """
        start = len(_MAGIC) + _DIGEST_BYTES
        content = data[start:]
        if not data.startswith(_MAGIC):
            raise DamagedCheckpointError("is not a checkpoint: its first bytes are wrong")
        if hashlib.sha256(content).digest() != data[len(_MAGIC) : start]:
            raise DamagedCheckpointError("its checksum does not match its content")
        end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
        try:
            arrays = tuple(_arrays(content[end:]))
        except ValueError as error:
            raise DamagedCheckpointError(f"its content cannot be used ({error})") from None
        if not arrays:
            raise DamagedCheckpointError("its content cannot be used (no parameters)")
        return cls(content[_LENGTH_BYTES:end], arrays)


def _arrays(content: bytes) -> Iterator[Array]:
    source = io.BytesIO(content)
    while source.tell() < len(content):
        array = np.lib.format.read_array(source, allow_pickle=False)
        if array.ndim != 1 or array.dtype not in (np.float64, np.float32):
            raise ValueError(f"an array of {array.dtype}, shape {array.shape}")
        yield array


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises
    ------
    DamagedCheckpointError
        It cannot be read or is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(f"cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise DamagedCheckpointError("cannot be read (not enough memory)") from None
    return Checkpoint.unpack(data)


def save(directory: Path, version: int, checkpoint: Checkpoint) -> Path:
    """Write the checkpoint of a version, read it back, then remove all but the two newest.

    Raises
    ------
    OSError
        It cannot be written; the older checkpoints are unchanged.
    DamagedCheckpointError
        Reading it back gave other content; the older checkpoints are unchanged.
    """
    directory.mkdir(exist_ok=True)
    path = directory / f"checkpoint-{version:012d}.bin"
    data = checkpoint.pack()
    # A checkpoint of the same version may exist; it stays until the new one has been read back.
    with _temporary(path) as temporary:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            # What is read back must come from the disk, not from the page cache.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if temporary.read_bytes() != data:
            raise DamagedCheckpointError(f"{path.name}: reads differently from what was written")
        os.replace(temporary, path)
    sync_directory(directory)
    for older in paths(directory)[_KEPT:]:
        older.unlink()
    return path


def paths(directory: Path) -> list[Path]:
    """Return the checkpoints in a directory, the newest first."""
    return sorted(directory.glob(f"checkpoint-{'[0-9]' * 12}.bin"), reverse=True)


def version_of(path: Path) -> int:
    """Return the version of a checkpoint, from its file name."""
    return int(path.stem.removeprefix("checkpoint-"))


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
