"""Compressed gradients with error feedback (`cluster.compression`).

A worker that would push v = g + e pushes C(v) and keeps the rest,

    e <- v - C(v),                                                                           (K1)

for its next push (Stich, Cordonnier, Jaggi, *Sparsified SGD with memory*, 2018; Karimireddy,
Rebjock, Stich, Jaggi, *Error feedback fixes SignSGD and other gradient compression schemes*, 2019).
Here g is the gradient, or the difference by local steps. C(v) is what the message contains, so it
includes the rounding to `cluster.wire_dtype`. Both compressions give v - C(v) without rounding.

The residual e belongs to the worker. Push s continues from push s - 1; a missing number means that
a gradient or a residual was lost, and e is then 0. So a replay needs only the recorded numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array
from asgd.config.tables import ClusterConfig

BLOCK = 256  # numbers with a common scale
LARGEST = 127  # times its scale, the largest number of a block
SCRATCH = 5  # vectors held, besides gradients and residuals, while one is compressed, at most


@dataclass(frozen=True)
class TopK:
    """Keeps the entries of largest absolute value; of equal ones the first.

    Attributes
    ----------
    share
        Of the entries that are kept, at least one.
    """

    share: float

    def kept(self, dimension: int) -> int:
        """Return the number of entries of a vector that are kept."""
        return min(dimension, max(1, round(self.share * dimension)))

    def compressed(self, vectors: Array) -> Array:
        """Return C(v) of each vector, shape (..., d); zero where an entry is not kept."""
        dimension = vectors.shape[-1]
        kept = self.kept(dimension)
        if kept == dimension:
            return vectors + 0.0  # new memory, as of the others
        size = np.abs(vectors)
        size[np.isnan(size)] = np.inf  # the server must see it
        least = np.partition(size, dimension - kept, axis=-1)[..., dimension - kept, np.newaxis]
        chosen, equal = size > least, size == least
        room = kept - chosen.sum(axis=-1, keepdims=True)
        chosen |= equal & (np.cumsum(equal, axis=-1, dtype=np.uint32) <= room)
        found: Array = np.where(chosen, vectors, np.zeros_like(least))
        found += 0.0  # no negative zeros
        return found


@dataclass(frozen=True)
class Int8:
    """Rounds each block of `BLOCK` numbers to whole multiples of its scale, at most 127 of them.

    The scale is the smallest power of two that allows this, as in Rouhani et al., *Microscaling
    data formats for deep learning*, 2023; so no product with it is rounded, and a compressed vector
    is its own compression.
    """

    def exponents(self, vectors: Array) -> npt.NDArray[np.int32]:
        """Return the binary logarithm of the scale of each block, shape (..., blocks)."""
        starts = np.arange(0, vectors.shape[-1], BLOCK)
        largest = np.maximum.reduceat(np.abs(vectors), starts, axis=-1)
        limits = np.finfo(vectors.dtype)
        # Beside what is not finite, the scale is the largest: 127 of it are infinite.
        fraction, exponent = np.frexp(np.where(np.isfinite(largest), largest, limits.max))
        exponent += np.where(fraction > LARGEST / 128, -6, -7).astype(exponent.dtype)
        # The scale and its inverse are normal numbers.
        found: npt.NDArray[np.int32] = np.maximum(exponent, limits.minexp)
        return found

    def multiples(self, vectors: Array, exponents: npt.NDArray[np.int32]) -> Array:
        """Return the multiples of the scales, whole or not finite; to the even one from a half."""
        return np.rint(vectors * _scales(-exponents, vectors))

    def compressed(self, vectors: Array) -> Array:
        """Return C(v) of each vector, shape (..., d)."""
        exponents = self.exponents(vectors)
        with np.errstate(invalid="ignore", over="ignore"):
            return self.multiples(vectors, exponents) * _scales(exponents, vectors) + 0.0


def _scales(exponents: npt.NDArray[np.int32], like: Array) -> Array:
    """Return the scale of each number of vectors, in their precision."""
    powers: Array = np.ldexp(like.dtype.type(1.0), exponents)
    return np.repeat(powers, BLOCK, axis=-1)[..., : like.shape[-1]]


Compression = TopK | Int8


def compression_of(cluster: ClusterConfig) -> Compression | None:
    """Return the compression of a run; None if it has none."""
    if cluster.compression == "top_k":
        assert cluster.compression_share is not None
        return TopK(cluster.compression_share)
    return Int8() if cluster.compression == "int8" else None


def _exactly(vectors: Array) -> Array:
    return vectors


class ErrorFeedback:
    """The residuals of workers, (K1).

    Parameters
    ----------
    compression
        C.
    rounded
        Rounds a vector as a message does; by default not at all.
    """

    def __init__(
        self, compression: Compression, rounded: Callable[[Array], Array] = _exactly
    ) -> None:
        self._compression, self._rounded = compression, rounded
        self._residuals: dict[int, tuple[int, Array]] = {}  # and the number of the push to take it

    def sent(self, worker: int, sequence: int, vector: Array) -> Array:
        """Return C(g + e) for the gradient g of a worker, and keep the rest.

        Parameters
        ----------
        worker, sequence
            The worker, and the number of its push; pushes of a worker come in order.
        vector
            g, shape (d,), or (paths, d) for as many paths.
        """
        following, residual = self._residuals.get(worker, (None, vector))
        with np.errstate(invalid="ignore", over="ignore"):  # the server refuses what is not finite
            whole = vector + residual if following == sequence else vector
            sent = self._rounded(self._compression.compressed(whole))
            self._residuals[worker] = sequence + 1, whole - sent
        return sent
