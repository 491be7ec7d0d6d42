"""Updates and incidents, as the server applies, logs and records them."""

from __future__ import annotations

import math
from collections.abc import Mapping
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


class Update(msgspec.Struct, frozen=True, eq=False):
    """Everything needed to apply an update again.

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
    """

    row: Row
    members: tuple[Member, ...]
    gradient: Array
    order: OrderState | None = None

    def numbers(self) -> list[tuple[int, int]]:
        """Return (worker, sequence) of each gradient."""
        if not self.members:
            return [(self.row[1], self.row[2])]
        return [(worker, sequence) for _, worker, sequence, *_ in self.members]


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
    group: list[Gradient],
    seats: Mapping[int, Seat],
    number: int,
    shared_updates: int,
    seconds: float,
    order: OrderState | None,
) -> Update:
    """Build the update that applies the mean of a group of gradients, usually of one.

    Parameters
    ----------
    group
        Gradients of different workers.
    seats
        Seats by worker; at least those of the group.
    number
        Number of the update: 0, 1, ...
    shared_updates
        Number of earlier updates by means.
    seconds
        From the start of the run.
    order
        Stored in the update.
    """
    if len(group) == 1:
        one = group[0]
        seat, staleness = seats[one.worker], number - one.read_version
        head = (number, one.worker, one.sequence, one.read_version, staleness)
        row = (*head, seat.batch_size, one.compute_seconds, seconds, seat.norm)
        return Update(row, (), one.gradient, order)
    mean = np.sum([gradient.gradient for gradient in group], axis=0) / len(group)
    members = tuple(
        (
            number,
            gradient.worker,
            gradient.sequence,
            gradient.read_version,
            seats[gradient.worker].batch_size,
            gradient.compute_seconds,
        )
        for gradient in group
    )
    _, _, _, read_versions, batch_sizes, compute_seconds = zip(*members, strict=True)
    read_version = min(read_versions)
    head = (number, SHARED, shared_updates, read_version, number - read_version)
    row = (*head, sum(batch_sizes), max(compute_seconds), seconds, euclidean_norm(mean))
    return Update(row, members, mean, order)


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
