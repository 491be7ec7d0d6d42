"""How many paths a block has, and how many blocks run at once, within memory."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from asgd.errors import InputError
from asgd.problems.base import POINTS_AT_ONCE

# Numbers in a block. Below the first, calls cost more than arithmetic. Up to the second, counted in
# (d, d) arrays, threads still compete for the interpreter lock.
BLOCK_SCALARS = 10_000
LARGE_BLOCK_SCALARS = 40_000
# Numbers in the state of one block: 2**26 doubles are 512 MB.
BLOCK_STATE = 2**26
# Bytes of statistics an ensemble may hold; memory limits the number of threads.
STATISTICS_BYTES = 4 * 2**30
# From this size on an ensemble logs its memory.
ANNOUNCED_BYTES = 2**27

_log = logging.getLogger(__name__)


def block_sizes(
    paths: int, dim: int, state_copies: int = 4, fewest: int = POINTS_AT_ONCE
) -> list[int]:
    """Return the number of paths of each block; it depends on the model, not on the machine.

    Parameters
    ----------
    state_copies
        Vectors of length d that a model holds for each path.
    fewest
        Least paths of a block, if there are as many and memory suffices.
    """
    smallest = max(-(-BLOCK_SCALARS // dim), fewest)
    size = min(max(smallest, paths // 2), max(smallest, LARGE_BLOCK_SCALARS // dim**2))
    size = min(size, max(BLOCK_STATE // (dim * state_copies), 1))
    blocks = max(paths // size, 1)
    least, more = divmod(paths, blocks)
    return [least + (i < more) for i in range(blocks)]


def blocks_in_flight(threads: int) -> int:
    """Return how many blocks may run or wait to be merged without idle threads."""
    return threads + (threads > 1)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The sizes that determine the memory of ensembles that advance together.

    Attributes
    ----------
    name
        Of the ensembles, for messages.
    models
        Number of ensembles.
    dim, itemsize
        Length of a vector, and bytes of each of its numbers.
    records, moments
        Number of recorded updates, and of those with moments.
    sizes
        Paths of each block.
    state_copies
        Vectors that all models together hold for each path.
    kept
        Number of paths whose losses are kept.
    """

    name: str
    models: int
    dim: int
    itemsize: int
    records: int
    moments: int
    sizes: list[int]
    state_copies: int
    kept: int

    @property
    def state(self) -> int:
        """Bytes that a thread needs for its block."""
        return self.itemsize * max(self.sizes) * self.dim * self.state_copies

    def statistics(self, threads: int) -> int:
        """Return the bytes of the statistics and the final points."""
        blocks = len(self.sizes)
        of_blocks = min(blocks, blocks_in_flight(threads)) + (blocks > 1)
        once = 8 * self.records * self.kept + self.itemsize * sum(self.sizes) * self.dim
        return self.models * (16 * self.moments * self.dim * of_blocks + once)


def paths_that_fit(paths: int, models: int, dim: int, itemsize: int, records: int) -> int:
    """Return how many paths of each of some models fit into memory; log it if not all do.

    Parameters
    ----------
    paths
        Paths that are asked for.
    models
        Number of models that advance together.
    dim, itemsize
        Length of a final point, and bytes of each of its numbers.
    records
        Recorded losses of a path.
    """
    most = STATISTICS_BYTES // (models * (itemsize * dim + 8 * records))
    fitting = min(paths, max(most, 1))
    if fitting < paths:
        _log.warning(
            "%d of %d paths: more, with %s parameters each, do not fit into %.2g GB",
            *(fitting, paths, f"{dim:,}", STATISTICS_BYTES / 2**30),
        )
    return fitting


def threads_that_fit(footprint: Footprint, asked: int | None) -> int:
    """Return how many threads fit into memory; log the memory if it is large.

    Parameters
    ----------
    asked
        Number of threads if they fit. Default: the processors this process may use.

    Raises
    ------
    InputError
        Not even one fits.
    """
    least = footprint.statistics(1)
    if least > STATISTICS_BYTES:
        raise InputError(
            f"record = {footprint.records} updates of {footprint.dim} parameters, with "
            f"{sum(footprint.sizes)} paths: expected less than {STATISTICS_BYTES / 2**30:.0f} GB, "
            f"not {least / 2**30:.1f}: record fewer updates or simulate fewer paths"
        )
    threads = min(asked or len(os.sched_getaffinity(0)), len(footprint.sizes))
    while footprint.statistics(threads) > STATISTICS_BYTES:
        threads -= 1
    needed = footprint.statistics(threads) + threads * footprint.state
    if needed > ANNOUNCED_BYTES:
        _log.warning("%s: its paths take up to %.2g GB of memory", footprint.name, needed / 2**30)
    return threads
