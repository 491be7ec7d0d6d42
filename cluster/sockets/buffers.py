"""The server's memory for vectors on the wire: in turn a worker's gradient and its next snapshot.

Short vectors, and those in shared memory, have a buffer per connection. Long ones share a pool: a
connection takes a buffer when the header of a gradient has arrived, and gives it back when the
answer has been sent. If the pool is exhausted, the connection is not read until a buffer is free:
the gradient stays with its worker and in the kernel. So a run with many workers takes no more
memory than one with few.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array
from cluster.sockets.compressed import packing_of
from cluster.sockets.wire import HEADER, LONGEST_SHAPE, VectorFormat, copy_vector

_POOL_BYTES = 64_000_000
_FEWEST = 2  # one arrives while another is sent


class Buffer:
    """Memory for one frame with a vector.

    Attributes
    ----------
    frame, push
        Header and payload of a snapshot and of a gradient; empty if the vector is in shared memory.
    vector
        The vector, shape (d,), of the dtype on the wire.
    users
        Connections that use it; several send the same snapshot.
    """

    def __init__(self, vectors: VectorFormat, shared: npt.NDArray[Any] | None = None) -> None:
        inline = 0 if shared is not None else vectors.nbytes
        self._packing = packing_of(vectors) if shared is None else None
        pushed = inline if self._packing is None else self._packing.nbytes
        size = HEADER.size + max(inline, pushed, 8 * LONGEST_SHAPE)
        self.memory = memory = np.empty(size, np.uint8).data
        self.frame = memory[: HEADER.size + inline]
        self.push = memory[: HEADER.size + pushed]
        self.vector: npt.NDArray[Any] = vectors.view(memory) if shared is None else shared
        if self._packing is None:
            self._gradient = vectors.arrival(self.vector)
        else:
            self._gradient = np.empty(vectors.dimension, vectors.precision)
        self.users = 1

    def gradient(self) -> Array:
        """Return the gradient that has arrived, in the precision of the parameters, shape (d,).

        Raises
        ------
        WireError
            It is compressed, and no worker compresses a gradient to this.
        """
        if self._packing is not None:
            self._packing.unpack(self.push[HEADER.size :], self._gradient)
        elif self._gradient is not self.vector:
            copy_vector(self._gradient, self.vector)
        return self._gradient


def _held_bytes(vectors: VectorFormat) -> int:
    """Return the memory of a buffer: a frame, and the gradient if it has to be converted."""
    whole = vectors.compression is None and vectors.dtype == vectors.precision
    converted = 0 if whole else vectors.dimension * np.dtype(vectors.precision).itemsize
    return max(1, vectors.nbytes + converted)


class BufferPool:
    """Buffers for long vectors.

    Parameters
    ----------
    vectors
        Format of the vectors.
    bounded
        Whether the pool is limited, so that connections wait for each other's buffers. It must not
        be if an update needs the gradients of several given workers.
    """

    def __init__(self, vectors: VectorFormat, bounded: bool) -> None:
        self._vectors = vectors
        self._most = max(_FEWEST, _POOL_BYTES // _held_bytes(vectors)) if bounded else None
        self._free: list[Buffer] = []
        self._used = 0

    def take(self) -> Buffer | None:
        """Return a buffer; None if the pool is exhausted."""
        if self._most is not None and self._used >= self._most:
            return None
        return self.take_one_more()

    def take_one_more(self) -> Buffer:
        """Return a buffer even if the pool is exhausted."""
        self._used += 1
        buffer = self._free.pop() if self._free else Buffer(self._vectors)
        buffer.users = 1
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        """End one use of a buffer; after the last one others may take it."""
        buffer.users -= 1
        if not buffer.users:
            self._used -= 1
            if self._most is None or self._used + len(self._free) < self._most:
                self._free.append(buffer)

    def forget(self) -> None:
        """Stop counting a buffer that the parameter server still reads."""
        self._used -= 1
