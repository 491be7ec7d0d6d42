"""The messages between a worker and the server, for every transport.

Structs instead of dataclasses: each update makes two, and a struct takes a ninth of the time.
"""

from __future__ import annotations

import msgspec

from asgd.arrays import Array


class Gradient(msgspec.Struct, frozen=True, eq=False):
    """A gradient on its way to the server, identified by (worker, sequence).

    Attributes
    ----------
    worker
        Number of the worker that computed it.
    sequence
        Number of the gradient among those of its worker, as sent with the snapshot.
    read_version
        Version of the snapshot.
    epoch
        Incarnation of the server that sent the snapshot.
    gradient
        Or the pseudo-gradient of local steps, shape (d,).
    compute_seconds
        From snapshot received to gradient ready. Includes the waits for a core and for the other
        workers of its process.
    """

    worker: int
    sequence: int
    read_version: int
    epoch: int
    gradient: Array
    compute_seconds: float


class Snapshot(msgspec.Struct, frozen=True, eq=False):
    """Parameters and instructions for a worker's next gradient.

    Attributes
    ----------
    parameters
        Shape (d,). On the server this is the live array, so the transport must encode it before it
        calls the server again.
    version
        Updates applied so far.
    epoch
        Incarnation of the server.
    sequence
        Number of the gradient to compute.
    batch_size
        Number of samples, in the batches of all local steps together.
    position
        Of the first sample in the epochs of the worker's part (`asgd.epochs`); 0 for samples that
        are drawn with replacement.
    """

    parameters: Array
    version: int
    epoch: int
    sequence: int
    batch_size: int
    position: int = 0


class Stop(msgspec.Struct, frozen=True):
    """The server wants no more gradients from this worker.

    Attributes
    ----------
    reason
        "finished", "interrupted" or a description of the failure.
    """

    reason: str


Reply = Snapshot | Stop
