"""The snapshots that workers have read, for rules that need them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from asgd.arrays import Array
from cluster.core.update import Entry, Update

# Snapshots kept per worker: the one granted first, and the newest sent in answer to a duplicate
# message. The worker may use either.
_KEPT = 2


class Reads:
    """The snapshots whose gradients may still arrive; the arrays of released ones are reused.

    Parameters
    ----------
    dtype
        Precision of the parameters.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._held: dict[int, dict[int, Array]] = {}
        self._spare: list[Array] = []

    def grant(self, worker: int, version: int, parameters: Array) -> None:
        """Keep a copy of a snapshot that is sent to a worker."""
        held = self._held.setdefault(worker, {})
        if version in held:
            return
        if len(held) == _KEPT:
            self._spare.append(held.pop(max(held)))
        array = self._spare.pop() if self._spare else np.empty_like(parameters, self._dtype)
        np.copyto(array, parameters)
        held[version] = array

    def of(self, worker: int, version: int) -> Array | None:
        """Return a worker's snapshot of a version, shape (d,); None if it is not kept."""
        return self._held.get(worker, {}).get(version)

    def release(self, worker: int) -> None:
        """Forget the snapshots of a worker after its gradient is applied or lost."""
        self._spare += self._held.pop(worker, {}).values()

    def state(self) -> tuple[list[tuple[int, int]], tuple[Array, ...]]:
        """Return worker and version of each snapshot, and copies of the snapshots."""
        rows = [(worker, version) for worker, held in self._held.items() for version in held]
        return rows, tuple(self._held[worker][version].copy() for worker, version in rows)

    def restore(self, rows: Sequence[tuple[int, int]], snapshots: Sequence[Array]) -> None:
        """Keep copies of the snapshots of a state."""
        for (worker, version), snapshot in zip(rows, snapshots, strict=True):
            self.grant(worker, version, snapshot)


def readers(entries: Iterable[Entry]) -> dict[int, list[int]]:
    """Return the workers that read each version, by the gradients of a log."""
    found: dict[int, list[int]] = {}
    for entry in entries:
        if isinstance(entry, Update):
            _, worker, _, version, *_ = entry.row
            found.setdefault(version, []).append(worker)
    return found
