"""Updates and incidents, as the server applies, logs and records them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from asgd.arrays import Array, euclidean_norm
from asgd.divergence import not_finite
from asgd.rundir.columns import SHARED
from cluster.core.messages import Gradient
from cluster.core.seat import Seat
from cluster.core.state import OrderState

Row = tuple[int, int, int, int, int, int, float, float, float]
Member = tuple[int, int, int, int, int, float]
Discarded = tuple[int, int, int, int, int, int, float, float]


class Arrival(msgspec.Struct, frozen=True, eq=False):
    """A valid gradient that has arrived.

    Attributes
    ----------
    gradient
        The gradient.
    batch_size
        Its samples.
    norm
        Its Euclidean norm.
    position
        Of its first sample in the epochs, 0 for samples that are drawn with replacement.
    """

    gradient: Gradient
    batch_size: int
    norm: float
    position: int = 0

    @property
    def address(self) -> tuple[int, int]:
        """Worker and sequence."""
        return self.gradient.worker, self.gradient.sequence

    def kept(self) -> Arrival:
        """Return a copy with its own memory, because the transport reuses that of a gradient."""
        own = np.array(self.gradient.gradient)
        gradient = msgspec.structs.replace(self.gradient, gradient=own)
        return msgspec.structs.replace(self, gradient=gradient)

    def discarded(self, version: int, seconds: float) -> Discarded:
        """Return its row of `DISCARDED_COLUMNS`, discarded at a version and time."""
        one = self.gradient
        head = (version, one.worker, one.sequence, one.read_version, version - one.read_version)
        return (*head, self.batch_size, one.compute_seconds, seconds)


class Update(msgspec.Struct, frozen=True, eq=False):
    """Everything needed to replay an update.

    Attributes
    ----------
    row
        Row of the trace, in the order of `TRACE_COLUMNS`.
    members
        A row of `MEMBER_COLUMNS` per gradient of a mean; empty for a single gradient.
    gradient
        Input of the update rule, shape (d,).
    order
        Position of the stream that draws the next worker, if there is one and a log needs it.
    discarded
        A row of `DISCARDED_COLUMNS` per gradient that was discarded since the update before. If
        this update is not logged, their numbers are used again.
    positions
        Of the first sample of each gradient of the update in the epochs, not of those that were
        discarded; empty if samples are drawn with replacement.
    """

    row: Row
    members: tuple[Member, ...]
    gradient: Array
    order: OrderState | None = None
    discarded: tuple[Discarded, ...] = ()
    positions: tuple[int, ...] = ()

    def places(self) -> list[tuple[int, int, int, int]]:
        """Return (worker, sequence, position, batch size) of each gradient of a mean, in epochs."""
        gradients = [(worker, number, size) for _, worker, number, _, size, _ in self.members]
        placed = zip(gradients, self.positions, strict=True)
        return [(worker, number, place, size) for (worker, number, size), place in placed]

    def numbers(self) -> list[tuple[int, int]]:
        """Return (worker, sequence) of each gradient, applied or discarded."""
        if not self.members and not self.discarded:
            return [(self.row[1], self.row[2])]
        rows = [*(self.members or [self.row]), *self.discarded]
        return [(worker, sequence) for _, worker, sequence, *_ in rows]


@dataclass(frozen=True, eq=False)
class Incident:
    """A gradient that was lost or refused.

    Attributes
    ----------
    event
        The event as in `events.jsonl`, with "worker" and "sequence".
    """

    event: dict[str, Any]

    def numbers(self) -> list[tuple[int, int]]:
        """Return (worker, sequence) of the gradient."""
        return [(self.event["worker"], self.event["sequence"])]


Entry = Update | Incident


class Log(Protocol):
    """A write-ahead log; gets each entry before the server applies it."""

    def append(self, entry: Entry) -> None:
        """Write an update or an incident; raises `OSError` if that fails."""


def make_update(
    group: list[Arrival],
    number: int,
    shared_updates: int,
    seconds: float,
    order: OrderState | None = None,
    discarded: tuple[Discarded, ...] = (),
    placed: bool = False,
) -> Update:
    """Build the update that applies the mean of a group of gradients, usually of one.

    Parameters
    ----------
    group
        The gradients.
    number
        Number of the update: 0, 1, ...
    shared_updates
        Number of earlier updates that applied a mean.
    seconds
        From the start of the run.
    order, discarded
        Stored in the update.
    placed
        Whether samples are drawn by epochs.
    """
    if len(group) == 1:
        arrival, one = group[0], group[0].gradient
        head = (number, one.worker, one.sequence, one.read_version, number - one.read_version)
        row = (*head, arrival.batch_size, one.compute_seconds, seconds, arrival.norm)
        positions = (arrival.position,) if placed else ()
        return Update(row, (), one.gradient, order, discarded, positions)
    mean = np.sum([arrival.gradient.gradient for arrival in group], axis=0) / len(group)
    members = tuple(
        (
            number,
            arrival.gradient.worker,
            arrival.gradient.sequence,
            arrival.gradient.read_version,
            arrival.batch_size,
            arrival.gradient.compute_seconds,
        )
        for arrival in group
    )
    _, _, _, read_versions, batch_sizes, compute_seconds = zip(*members, strict=True)
    read_version = min(read_versions)
    head = (number, SHARED, shared_updates, read_version, number - read_version)
    row = (*head, sum(batch_sizes), max(compute_seconds), seconds, euclidean_norm(mean))
    places = tuple(arrival.position for arrival in group) if placed else ()
    return Update(row, members, mean, order, discarded, places)


def find_defect(gradient: Gradient, seat: Seat, shape: tuple[int, ...], version: int) -> str | None:
    """Return the defect of a gradient at a version, None if it is valid; store its norm."""
    value = gradient.gradient
    if value.shape != shape:
        return f"shape {value.shape}, expected {shape}"
    seat.norm = euclidean_norm(value)
    # The norm is cheaper than checking every entry, but may overflow if all are finite.
    if not math.isfinite(seat.norm) and not np.isfinite(value).all():
        return not_finite(value)
    if not seat.read_version <= gradient.read_version <= version:
        return f"read version {gradient.read_version}, expected {seat.read_version}"
    if not 0.0 <= gradient.compute_seconds < math.inf:
        return f"compute_seconds {gradient.compute_seconds}, expected a time"
    return None
