"""The state of a server, from which another server can continue."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from asgd.arrays import Array
from asgd.epochs import PartState


class OrderState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The position of the stream that draws the next worker.

    Attributes
    ----------
    words
        The state of the SFC64 generator.
    buffered, buffer
        Half a word that is not yet used.
    turn
        The worker drawn last, if its gradient has not yet been applied.
    """

    words: list[int]
    buffered: int
    buffer: int
    turn: int | None

    @classmethod
    def of(cls, generator: np.random.Generator, turn: int | None) -> OrderState:
        """Return the position of a generator."""
        state = dict(generator.bit_generator.state)
        words = [int(word) for word in state["state"]["state"]]
        return cls(words, int(state["has_uint32"]), int(state["uinteger"]), turn)

    def set(self, generator: np.random.Generator) -> None:
        """Set a generator to this position."""
        generator.bit_generator.state = {
            "bit_generator": "SFC64",
            "state": {"state": np.array(self.words, np.uint64)},
            "has_uint32": self.buffered,
            "uinteger": self.buffer,
        }


class ServerCounts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The state of the server without vectors.

    Attributes
    ----------
    version
        Updates applied.
    epoch
        Incarnation of the server that saved the state.
    seconds
        From the start of the run to the last update.
    sequence
        By worker: number of the next gradient to apply or refuse.
    received
        By worker: gradients received.
    order
        Position of the stream that draws the next worker.
    staleness_sum
        Over all updates.
    shared_updates
        Updates by means of several gradients.
    rejected
        Gradients refused as invalid.
    rule
        Names of the arrays of the update rule; empty in a file of version 0.1.0.
    reads
        Worker and version of each snapshot in `State.reads`.
    parts
        The used positions of each part of the samples; empty if they are drawn with replacement.
    """

    version: int
    epoch: int
    seconds: float
    sequence: dict[int, int]
    received: dict[int, int]
    order: OrderState
    staleness_sum: int
    shared_updates: int
    rejected: int
    rule: list[str] = []
    reads: list[tuple[int, int]] = []
    parts: list[PartState] = []


@dataclass(frozen=True, eq=False)
class State:
    """Everything that another server needs to continue.

    Gradients in flight are not included: a worker computes the gradient with the same number again,
    on a snapshot of the restored version.

    Attributes
    ----------
    counts
        Version, sequence numbers, streams.
    parameters
        Shape (d,).
    rule
        The state of the update rule.
    reads
        Snapshots that workers hold, shape (d,) each; empty unless the rule needs them and the run
        has a log.
    """

    counts: ServerCounts
    parameters: Array
    rule: tuple[Array, ...]
    reads: tuple[Array, ...] = ()

    @property
    def version(self) -> int:
        """Updates applied."""
        return self.counts.version
