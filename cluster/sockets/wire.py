"""The socket protocol between workers and the server, version 2.

Every frame is a header of 64 bytes, little-endian, and `length` bytes of payload:

    offset  bytes  field
         0      4  magic "ASGD"
         4      1  protocol version, 2
         5      1  kind, below
         6      2  zero
         8      4  worker            unsigned
        12      4  batch_size        unsigned; SNAPSHOT
        16      8  length            unsigned; bytes of payload
        24      8  sequence          signed; PUSH, MISFIT, SNAPSHOT
        32      8  version           signed; read version in PUSH and MISFIT, version in SNAPSHOT
        40      8  epoch             signed; PUSH, MISFIT, SNAPSHOT
        48      8  compute_seconds   float64; PUSH, MISFIT
        56      8  position          unsigned; SNAPSHOT

    kind          from    payload
    1 HELLO       worker  nonce (32 bytes), dimension d (8), bytes per number (1), shared (1)
    2 CHALLENGE   server  nonce (32), proof of the server (32)
    3 PROOF       worker  proof of the worker (32)
    4 WELCOME     server  none; with `shared`, the descriptor of the shared memory is attached
    5 JOIN        worker  none
    6 PUSH        worker  the gradient, or a compressed one (`cluster.sockets.compressed`)
    7 MISFIT      worker  shape of a gradient that is not (d,): 8 bytes each, at most 32 of them
    8 SNAPSHOT    server  the parameters
    9 STOP        server  reason, UTF-8
    10 ERROR      server  reason, UTF-8; the connection is closed

The handshake is HELLO, CHALLENGE, PROOF, WELCOME. A proof is the HMAC-SHA-256, keyed with the
secret of the run, of the side's name, the HELLO frame and the server's nonce. So each side proves
that it knows the secret without sending it, and the proof covers the dimension and the number
format. Then the worker sends requests (JOIN, PUSH or MISFIT). The server answers each request once
(SNAPSHOT, STOP or ERROR), possibly much later; a second request before the answer is an error.

Frames after the handshake are neither authenticated nor encrypted. The secret keeps out attackers
that can only open connections; injecting data into a TCP stream blindly is not feasible. But an
attacker that can read the network sees the vectors, and one that can modify packets can change
gradients and parameters unnoticed. So the sockets listen only on loopback or on the address of the
node; between nodes, use a trusted network or a tunnel.

Vectors are d raw little-endian numbers: float64, float32 or bfloat16. With `shared` they are in
the shared memory, one at a time, and the payload of PUSH and SNAPSHOT is empty. Without, gradients
may be compressed. Every length is
checked against the kind of frame before it is used; nothing is unpickled.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array, number_type, sent_as
from asgd.compression import Compression, compression_of
from asgd.config.tables import ClusterConfig
from cluster.core.messages import Gradient, Snapshot

MAGIC = b"ASGD"
PROTOCOL = 2
HELLO, CHALLENGE, PROOF, WELCOME, JOIN, PUSH, MISFIT, SNAPSHOT, STOP, ERROR = range(1, 11)

HEADER = struct.Struct("<4sBBHIIQqqqdQ")
# The bytes before these fields are constant for a worker's pushes and for its snapshots, so they
# are packed once.
_PUSH_START, _SNAPSHOT_START = 24, 12  # bytes
PUSH_FIELDS = struct.Struct(f"<{_PUSH_START}sqqqd8x")  # sequence, version, epoch, compute_seconds
# batch_size, length, sequence, version, epoch, position
SNAPSHOT_FIELDS = struct.Struct(f"<{_SNAPSHOT_START}sIQqqq8xQ")
HELLO_PAYLOAD = struct.Struct("<32sQBB")
NONCE_BYTES = 32
PROOF_BYTES = 32
LONGEST_TEXT = 1024
LONGEST_SHAPE = 32

Memory = bytearray | memoryview


class WireError(ConnectionError):
    """The other side violated the protocol."""


class Frame(NamedTuple):
    """The header of a frame."""

    magic: bytes
    protocol: int
    kind: int
    zero: int
    worker: int
    batch_size: int
    length: int
    sequence: int
    version: int
    epoch: int
    compute_seconds: float
    position: int


@dataclass(frozen=True)
class VectorFormat:
    """The format of gradients and parameters on the wire.

    Attributes
    ----------
    dimension
        Length of a vector, d.
    dtype
        "float64", "float32" or "bfloat16".
    precision
        The dtype of the parameters; received vectors are converted to it.
    compression
        Of gradients over TCP; None if they are sent whole, as parameters are.
    """

    dimension: int
    dtype: str = "float64"
    precision: str = "float64"
    compression: Compression | None = None

    @classmethod
    def of(cls, dimension: int, precision: np.dtype[Any], cluster: ClusterConfig) -> VectorFormat:
        """Return the format for parameters of a precision in a run."""
        sent = sent_as(cluster.wire_dtype, precision)
        return cls(dimension, sent, precision.name, compression_of(cluster))

    @property
    def numbers(self) -> np.dtype[np.floating]:
        """The little-endian dtype on the wire."""
        return number_type(self.dtype).newbyteorder("<")

    @property
    def nbytes(self) -> int:
        """Size of a vector in bytes."""
        return self.dimension * self.numbers.itemsize

    def arrival(self, received: npt.NDArray[Any]) -> Array:
        """Return memory for a received vector in the precision of the parameters, shape (d,).

        It is the received vector itself if nothing has to be converted.
        """
        if self.dtype == self.precision:
            return received
        return np.empty(self.dimension, self.precision)

    def view(self, buffer: memoryview) -> npt.NDArray[Any]:
        """Return the vector in a frame, shape (d,), as a view of the frame's memory."""
        return np.frombuffer(buffer, self.numbers, self.dimension, HEADER.size)

    def hello(self, nonce: bytes, shared: bool) -> bytes:
        """Return the payload of HELLO."""
        return HELLO_PAYLOAD.pack(nonce, self.dimension, self.numbers.itemsize, shared)


def parse(buffer: Memory) -> Frame:
    """Return the header at the start of a buffer.

    Raises
    ------
    WireError
        It is not a header of this protocol.
    """
    frame = Frame._make(HEADER.unpack_from(buffer))
    if frame.magic != MAGIC:
        raise WireError("not a frame of this protocol")
    if frame.protocol != PROTOCOL:
        raise WireError(f"protocol version {frame.protocol}, expected {PROTOCOL}")
    return frame


def push_start(worker: int, length: int, kind: int = PUSH) -> bytes:
    """Return the constant first bytes of every PUSH (or MISFIT) of a worker with a given length."""
    return _start(kind, worker, length)[:_PUSH_START]


def snapshot_start(worker: int) -> bytes:
    """Return the constant first bytes of every SNAPSHOT for a worker."""
    return _start(SNAPSHOT, worker, 0)[:_SNAPSHOT_START]


def _start(kind: int, worker: int, length: int) -> bytes:
    return HEADER.pack(MAGIC, PROTOCOL, kind, 0, worker, 0, length, 0, 0, 0, 0.0, 0)


def pack(kind: int, worker: int = 0, payload: bytes = b"") -> bytes:
    """Return a frame that is neither a gradient nor a snapshot."""
    return _start(kind, worker, len(payload)) + payload


def pack_text(kind: int, text: str) -> bytes:
    """Return a STOP or ERROR frame; a long text is truncated."""
    return pack(kind, payload=text.encode()[:LONGEST_TEXT])


def text(payload: bytes | memoryview) -> str:
    """Return the text of a STOP or ERROR frame."""
    return bytes(payload).decode(errors="replace")


def pack_push(buffer: Memory, start: bytes, gradient: Gradient) -> None:
    """Write the header of a gradient at the start of a buffer."""
    PUSH_FIELDS.pack_into(
        buffer,
        0,
        start,
        gradient.sequence,
        gradient.read_version,
        gradient.epoch,
        gradient.compute_seconds,
    )


def pack_misfit(gradient: Gradient) -> bytes:
    """Return the frame that reports a gradient of the wrong shape."""
    shape = gradient.gradient.shape
    header = bytearray(HEADER.size)
    pack_push(header, push_start(gradient.worker, 8 * len(shape), MISFIT), gradient)
    return bytes(header) + struct.pack(f"<{len(shape)}Q", *shape)


def misfit(payload: memoryview) -> Array:
    """Return zeros of the shape in a MISFIT frame; they take no memory.

    Raises
    ------
    WireError
        No array has this shape.
    """
    shape = struct.unpack(f"<{len(payload) // 8}Q", payload)
    try:
        return np.broadcast_to(np.float64(0.0), shape)
    except ValueError:
        raise WireError(f"impossible shape {shape}") from None


def pack_snapshot(buffer: Memory, start: bytes, length: int, snapshot: Snapshot) -> None:
    """Write the header of a snapshot at the start of a buffer."""
    SNAPSHOT_FIELDS.pack_into(
        buffer,
        0,
        start,
        snapshot.batch_size,
        length,
        snapshot.sequence,
        snapshot.version,
        snapshot.epoch,
        snapshot.position,
    )


def copy_vector(destination: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """Copy between the parameters' dtype and that on the wire; overflows become infinite."""
    if destination.itemsize == source.itemsize:
        destination[:] = source
        return
    with np.errstate(over="ignore"):
        np.copyto(destination, source, casting="same_kind")


def proof(secret: bytes, side: bytes, hello: bytes, nonce: bytes) -> bytes:
    """Return the proof that `side`, b"server" or b"worker", knows the secret."""
    return hmac.digest(secret, side + hello + nonce, "sha256")
