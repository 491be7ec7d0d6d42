"""Vectors in memory shared by the server and one worker on its node.

The memory is anonymous; its descriptor is sent over a local socket. So nothing remains when a
process dies, and the size of /dev/shm does not matter. Frames on the socket order the accesses:
each side writes its vector before it sends a frame, and reads the other vector after it receives
one.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.sockets.wire import VectorFormat, WireError


class SharedVectors:
    """One gradient and one snapshot, in shared memory.

    Attributes
    ----------
    gradient, snapshot
        Shape (d,), of the dtype on the wire.
    """

    def __init__(self, descriptor: int, vectors: VectorFormat) -> None:
        start, size = _layout(vectors)
        if os.fstat(descriptor).st_size != size:
            raise WireError("the shared memory has the wrong size")
        memory = mmap.mmap(descriptor, size)
        self.gradient: npt.NDArray[Any] = np.frombuffer(memory, vectors.numbers, vectors.dimension)
        self.snapshot: npt.NDArray[Any] = np.frombuffer(
            memory, vectors.numbers, vectors.dimension, start
        )


def create_memory(vectors: VectorFormat) -> int:
    """Return the descriptor of new memory for the vectors of one worker; the caller closes it.

    Raises
    ------
    OSError
        There is not enough memory.
    """
    size = _layout(vectors)[1]
    descriptor = os.memfd_create("asgd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Allocate and seal now, because access to missing pages would kill the process.
        os.posix_fallocate(descriptor, 0, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _layout(vectors: VectorFormat) -> tuple[int, int]:
    """Return the offset of the snapshot and the size of the memory, in bytes."""
    start = -(-vectors.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    return start, max(1, 2 * start)
