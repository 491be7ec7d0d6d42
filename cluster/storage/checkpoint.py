"""Checkpoints: the state of a run in one file, saved atomically and read back.

    offset  bytes  field
         0     18  magic "ASGD checkpoint 1\\n"
        18     32  SHA-256 of everything after it
        50      8  length of the header, little-endian
        58         header, JSON: `ServerCounts`
                   arrays in NumPy's own format, one after another: the parameters, the rule's state

A checkpoint is written under a temporary name, flushed to the disk, read back and renamed. The
previous checkpoint is kept in case the newest one is damaged later.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from asgd.arrays import Array
from asgd.errors import AsgdError
from cluster.core.state import ServerCounts, State

CHECKPOINTS = "checkpoints"  # in the run directory

_MAGIC = b"ASGD checkpoint 1\n"
_DIGEST_BYTES = 32
_LENGTH_BYTES = 8
_KEPT = 2


class DamagedCheckpointError(AsgdError):
    """A checkpoint file is damaged."""


def pack(state: State) -> bytes:
    """Return the content of a checkpoint file."""
    header = msgspec.json.encode(state.counts)
    body = io.BytesIO()
    body.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
    for array in (state.parameters, *state.rule):
        np.lib.format.write_array(body, array, allow_pickle=False)
    content = body.getvalue()
    return _MAGIC + hashlib.sha256(content).digest() + content


def unpack(data: bytes) -> State:
    """Return the state in the content of a checkpoint file.

    Raises
    ------
    DamagedCheckpointError
        The content is damaged.
    """
    start = len(_MAGIC) + _DIGEST_BYTES
    content = data[start:]
    if not data.startswith(_MAGIC):
        raise DamagedCheckpointError("is not a checkpoint: its first bytes are wrong")
    if hashlib.sha256(content).digest() != data[len(_MAGIC) : start]:
        raise DamagedCheckpointError("its checksum does not match its content")
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    try:
        counts = msgspec.json.decode(content[_LENGTH_BYTES:end], type=ServerCounts)
        arrays = list(_arrays(content[end:]))
        return State(counts, arrays[0], tuple(arrays[1:]))
    except (msgspec.DecodeError, ValueError, IndexError) as error:
        raise DamagedCheckpointError(f"its content cannot be used ({error})") from None


def _arrays(content: bytes) -> Iterator[Array]:
    source = io.BytesIO(content)
    while source.tell() < len(content):
        array = np.lib.format.read_array(source, allow_pickle=False)
        if array.ndim != 1 or array.dtype != np.float64:
            raise ValueError(f"an array of {array.dtype}, shape {array.shape}")
        yield array


def load(path: Path) -> State:
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
    return unpack(data)


def save(directory: Path, state: State) -> Path:
    """Write a checkpoint, read it back, then remove all but the two newest.

    Raises
    ------
    OSError
        It cannot be written; the older checkpoints are unchanged.
    DamagedCheckpointError
        Reading it back gave other content; the older checkpoints are unchanged.
    """
    directory.mkdir(exist_ok=True)
    path = directory / f"checkpoint-{state.version:012d}.bin"
    data = pack(state)
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


def sync_directory(directory: Path) -> None:
    """Flush the entries of a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
