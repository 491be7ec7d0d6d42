"""The state of a server, from which another one can continue."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from asgd.arrays import Array


class OrderState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The position of the stream that draws whose turn it is.

    Attributes
    ----------
    words
        The state of the SFC64 generator.
    buffered, buffer
        Half a word not used yet.
    turn
        The worker drawn whose gradient is awaited.
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
        """Put a generator there."""
        generator.bit_generator.state = {
            "bit_generator": "SFC64",
            "state": {"state": np.array(self.words, np.uint64)},
            "has_uint32": self.buffered,
            "uinteger": self.buffer,
        }


class Counts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The state of the server without vectors.

    Attributes
    ----------
    version
        Updates applied.
    epoch
        Incarnation of the server that saved this.
    seconds
        From the start of the run to the last update.
    sequence
        By worker: number of its gradient that is next to be applied or refused.
    received
        By worker: gradients received.
    order
        Whose turn it is.
    staleness_sum
        Over all updates.
    shared_updates
        Updates that were means.
    rejected
        Gradients refused because they cannot be applied.
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


@dataclass(frozen=True, eq=False)
class State:
    """Everything that another server needs to continue.

    Gradients in flight are not part of it: a worker computes the same gradient number again, from a
    snapshot of the restored version.

    Attributes
    ----------
    counts
        Versions, numbers, streams.
    parameters
        Shape (d,).
    rule
        The state of the update rule.
    """

    counts: Counts
    parameters: Array
    rule: tuple[Array, ...]

    @property
    def version(self) -> int:
        """Updates applied."""
        return self.counts.version
