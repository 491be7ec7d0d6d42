"""Epochs: the workers together use every sample once, then again in a new random order.

The positions 0, 1, 2, ... of a part of n samples run through its epochs: position p is place p mod
n of the random order of epoch p // n. A batch is a range of positions of one epoch, so the last
batch of an epoch is shorter if the batch size does not divide n. With shared samples there is one
part.

The server hands out a range with each snapshot and records it with the gradient. A range is used
when its gradient is applied; that of a lost, refused or discarded gradient is handed out again,
before any other. So every position is used at most once, and every one if the run continues:
each sample once an epoch. Workers run ahead of each other, so an epoch begins while the last
gradients of the one before are still computed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from asgd.streams import KeyedStream

Range = tuple[int, int]  # first position and number of positions


class PartState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which positions of a part are used.

    Attributes
    ----------
    end
        The first position that was never handed out.
    open
        The ranges before it that are not known to be used.
    """

    end: int
    open: list[Range]


class Handout:
    """Hands out the positions of all parts, and records which are used.

    A range belongs to the gradient (worker, sequence) that it was handed out for.

    Parameters
    ----------
    sizes
        Number of samples of each part.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        self._sizes = list(sizes)
        self._parts = len(self._sizes)
        self._end = [0] * len(self._sizes)
        self._back: list[list[Range]] = [[] for _ in self._sizes]  # heaps
        self._held: dict[tuple[int, int], Range] = {}

    def take(self, worker: int, sequence: int, size: int) -> Range:
        """Hand out at most `size` positions; those that were given back come first."""
        part = worker % self._parts
        back = self._back[part]
        if back:
            position, length = heapq.heappop(back)
            if length > size:
                heapq.heappush(back, (position + size, length - size))
                length = size
        else:
            position, samples = self._end[part], self._sizes[part]
            length = samples - position % samples
            if length > size:
                length = size
            self._end[part] = position + length
        taken = self._held[worker, sequence] = position, length
        return taken

    def give_back(self, worker: int, sequence: int) -> None:
        """Take back the range of a gradient that will not be applied, if it has one."""
        taken = self._held.pop((worker, sequence), None)
        if taken is not None:
            heapq.heappush(self._back[worker % self._parts], taken)

    def use(self, worker: int, sequence: int, position: int, size: int) -> None:
        """Note that a gradient was applied, by this server or an earlier one.

        Raises
        ------
        ValueError
            A position was used before.
        """
        if self._held.pop((worker, sequence), None) is not None:
            return
        part, stop = worker % self._parts, position + size
        back = self._back[part]
        back += self._gap(part, stop)
        for one in back:
            if one[0] <= position and stop <= one[0] + one[1]:
                back.remove(one)
                rest = (one[0], position - one[0]), (stop, one[0] + one[1] - stop)
                back += [left for left in rest if left[1]]
                heapq.heapify(back)
                return
        raise ValueError(f"positions {position} to {stop - 1} of part {part} were used before")

    def _gap(self, part: int, stop: int) -> list[Range]:
        """Move the end of a part up to a position, and return the ranges in between."""
        size, found = self._sizes[part], []
        while self._end[part] < stop:
            start = self._end[part]
            length = min(stop - start, size - start % size)
            found.append((start, length))
            self._end[part] = start + length
        return found

    def state(self) -> list[PartState]:
        """Return which positions are used; those of gradients in flight are open."""
        found: list[list[Range]] = [list(back) for back in self._back]
        for (worker, _), taken in self._held.items():
            found[worker % self._parts].append(taken)
        return [PartState(end, sorted(one)) for end, one in zip(self._end, found, strict=True)]

    def restore(self, state: Sequence[PartState]) -> None:
        """Continue from a state; its open ranges are handed out first."""
        for part, one in enumerate(state):
            self._end[part], self._back[part] = one.end, sorted(one.open)


class EpochOrders:
    """The random orders of all epochs, which depend on the seed alone.

    Parameters
    ----------
    seed
        Of the run.
    parts
        The sample numbers of each part.
    """

    def __init__(self, seed: int, parts: Sequence[npt.NDArray[np.int64]]) -> None:
        self._parts = parts
        self._stream = KeyedStream(seed, "epoch")
        self._orders: list[dict[int, npt.NDArray[np.int64]]] = [{} for _ in parts]  # by epoch

    def batch(self, worker: int, position: int, size: int) -> npt.NDArray[np.int64]:
        """Return the samples at positions of a worker's part, shape (size,)."""
        part = worker % len(self._parts)
        epoch, first = divmod(position, len(self._parts[part]))
        return self._order(part, epoch)[first : first + size]

    def _order(self, part: int, epoch: int) -> npt.NDArray[np.int64]:
        orders = self._orders[part]
        order = orders.get(epoch)
        if order is None:
            if len(orders) > 2:  # two overlap, more only in short epochs
                del orders[next(iter(orders))]
            order = orders[epoch] = self._stream.at(part, epoch).permutation(self._parts[part])
        return order
