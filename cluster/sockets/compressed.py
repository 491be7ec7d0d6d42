"""The payload of a PUSH with a compressed gradient (`asgd.compression`).

    top_k   k numbers, then their k indices, ascending, 4 bytes each
    int8    the exponent of each block of 256 numbers, 2 bytes each, signed; then d multiples of
            2^exponent from -127 to 127, one byte each; -128 is nan

k is part of the format, so payloads of a run have one length. What is packed is compressed already:
packing rounds nothing, and the server gets the vector that the worker subtracted from its residual.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array
from asgd.compression import BLOCK, LARGEST, Int8, TopK
from cluster.sockets.wire import Memory, VectorFormat, WireError, copy_vector

_INDEX, _EXPONENT = np.dtype("<u4"), np.dtype("<i2")
_NAN = -128


class Packing(Protocol):
    """Packs compressed vectors.

    Attributes
    ----------
    nbytes
        Size of the payload.
    """

    nbytes: int

    def pack(self, vector: Array, payload: Memory) -> None:
        """Write a compressed vector, shape (d,), into a payload."""

    def unpack(self, payload: Memory, out: Array) -> None:
        """Read a payload into a vector, shape (d,); raises `WireError` if it is impossible."""


def packing_of(vectors: VectorFormat) -> Packing | None:
    """Return the packing of gradients; None if they are sent whole."""
    if isinstance(vectors.compression, TopK):
        return _Largest(vectors, vectors.compression)
    return _Bytes(vectors.dimension, vectors.compression) if vectors.compression else None


def gradient_nbytes(vectors: VectorFormat) -> int:
    """Return the size of a gradient in a frame, in bytes."""
    packing = packing_of(vectors)
    return vectors.nbytes if packing is None else packing.nbytes


class _Largest:
    """Packs the entries that top-k keeps."""

    def __init__(self, vectors: VectorFormat, compression: TopK) -> None:
        self._dimension = vectors.dimension
        self._kept = compression.kept(vectors.dimension)
        self._numbers = vectors.numbers
        self._places = self._kept * self._numbers.itemsize  # bytes before the indices
        self.nbytes = self._places + self._kept * _INDEX.itemsize

    def _parts(self, payload: Memory) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        numbers = np.frombuffer(payload, self._numbers, self._kept)
        return numbers, np.frombuffer(payload, _INDEX, self._kept, self._places)

    def pack(self, vector: Array, payload: Memory) -> None:
        numbers, indices = self._parts(payload)
        chosen = np.flatnonzero(vector)
        if missing := self._kept - len(chosen):
            zeros = np.flatnonzero(vector == 0.0)[:missing]
            chosen = np.sort(np.concatenate([chosen, zeros]))
        indices[:] = chosen
        copy_vector(numbers, vector[chosen])

    def unpack(self, payload: Memory, out: Array) -> None:
        numbers, indices = self._parts(payload)
        if not (indices[-1] < self._dimension and (indices[1:] > indices[:-1]).all()):
            raise WireError("a gradient whose indices do not ascend within its length")
        out.fill(0.0)
        out[indices] = numbers


class _Bytes:
    """Packs a byte for each number."""

    def __init__(self, dimension: int, compression: Int8) -> None:
        self._dimension, self._compression = dimension, compression
        self._blocks = -(-dimension // BLOCK)
        self.nbytes = self._blocks * _EXPONENT.itemsize + dimension

    def _parts(self, payload: Memory) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        exponents = np.frombuffer(payload, _EXPONENT, self._blocks)
        return exponents, np.frombuffer(payload, np.int8, self._dimension, exponents.nbytes)

    def pack(self, vector: Array, payload: Memory) -> None:
        exponents, multiples = self._parts(payload)
        found = self._compression.exponents(vector)
        whole = self._compression.multiples(vector, found)
        np.clip(whole, -LARGEST, LARGEST, out=whole)  # infinite ones stay so: their scale is large
        whole[np.isnan(whole)] = _NAN
        exponents[:], multiples[:] = found, whole

    def unpack(self, payload: Memory, out: Array) -> None:
        exponents, multiples = self._parts(payload)
        limits = np.finfo(out.dtype)
        if not limits.minexp <= exponents.min() <= exponents.max() <= limits.maxexp - 6:
            raise WireError("a gradient with a scale that its numbers cannot have")
        scales = np.ldexp(out.dtype.type(1.0), exponents)
        whole = self._dimension - self._dimension % BLOCK
        out[:] = multiples
        with np.errstate(over="ignore"):
            out[:whole].reshape(-1, BLOCK)[:] *= scales[: whole // BLOCK, np.newaxis]
            out[whole:] *= scales[-1]
        if multiples.min() == _NAN:
            out[multiples == _NAN] = np.nan
