"""A vector in memory shared by the server and one worker on its node.

The memory is anonymous; its descriptor is sent over a local socket. So nothing remains when a
process dies, and the size of /dev/shm does not matter. Frames on the socket order the accesses:
the vector is in turn the server's snapshot and the worker's gradient, written before a frame is
sent and read after one is received.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.sockets.wire import VectorFormat, WireError


def shared_vector(descriptor: int, vectors: VectorFormat) -> npt.NDArray[Any]:
    """Return the vector in shared memory, shape (d,), of the dtype on the wire.

    Raises
    ------
    WireError
        The memory has another size.
    """
    size = _size(vectors)
    if os.fstat(descriptor).st_size != size:
        raise WireError("the shared memory has the wrong size")
    return np.frombuffer(mmap.mmap(descriptor, size), vectors.numbers, vectors.dimension)


def create_memory(vectors: VectorFormat) -> int:
    """Return the descriptor of new memory for a vector; the caller closes it.

    Raises
    ------
    OSError
        There is not enough memory.
    """
    size = _size(vectors)
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


def _size(vectors: VectorFormat) -> int:
    """Return the size of the memory in bytes, whole pages."""
    return max(1, -(-vectors.nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
