"""The parts of a record's staleness: in publication, in flight, and in the queue."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from asgd.counted import counted
from asgd.records.columns import ITEMS, STEPS, UNKNOWN
from asgd.records.reader import Record


@dataclass(frozen=True, kw_only=True)
class Split:
    """Mean staleness and its parts, over the items with known parts.

    Attributes
    ----------
    unit
        Unit of the staleness.
    staleness
        The sum of the parts.
    publication
        How far the parameters were behind the newest ones when the computation began; None if the
        log does not say.
    flight
        How many updates passed while the item was computed, and before, if `publication` is None.
        None if the log does not say.
    queue
        How many updates passed from then until it was used; None if the log does not say.
    items, known
        Number of all items, and of those in these means.
    """

    unit: str
    staleness: float
    publication: float | None
    flight: float | None
    queue: float | None
    items: int
    known: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [
            f"{mean:.3g} {name}"
            for mean, name in (
                (self.publication, "in publication (before an item was begun)"),
                (self.flight, "in flight (while it was computed)"),
                (self.queue, "in the queue (until it was used)"),
            )
            if mean is not None
        ]
        if self.flight is None and self.publication is not None:
            parts.append(f"{self.staleness - self.publication:.3g} in flight or in the queue")
        some = "all" if self.known == self.items else f"{self.known:,} of"
        mean = counted(f"{self.staleness:.3g}", self.unit)
        items = counted(self.items, "items")
        return f"Mean staleness of {some} {items}, {mean}: {', '.join(parts)}."


def split_of(record: Record) -> Split | None:
    """Return the parts of the staleness; None if the log has none of them."""
    if record.about.rows == STEPS:
        return None
    found = record.columns(ITEMS, "staleness", "in_publication", "in_flight")
    there = {name for name, values in found.items() if np.any(values != UNKNOWN)}
    if not there & {"in_publication", "in_flight"}:
        return None
    known = np.all([found[name] != UNKNOWN for name in there], axis=0)
    if not known.any():
        return None
    means = {name: float(found[name][known].mean()) for name in there}
    before, flight = means.get("in_publication"), means.get("in_flight")
    queue = None
    if flight is not None and not record.about.in_flight_only:
        rest = found["staleness"] - np.maximum(found["in_publication"], 0) - found["in_flight"]
        queue = float(rest[known].mean())
    return Split(
        unit=record.about.unit,
        staleness=means["staleness"],
        publication=before,
        flight=flight,
        queue=queue,
        items=len(known),
        known=int(known.sum()),
    )
