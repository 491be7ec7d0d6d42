"""Resampled turns of recorded runs (P3), ours.

A server holds P snapshots. The rank by age of the snapshot that each update uses, 0 for the newest,
determines all reads, because the new point replaces the one used. Memoryless workers draw ranks
independently and uniformly, workers in a fixed order always use the oldest, and real workers
alternate between both in spells. Turns drawn from a staleness law miss these spells, the start, and
differences between repeats; blocks of recorded ranks keep all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from analysis.models.clocks import pool_turns
from asgd.arrays import Integers
from asgd.staleness.law import StalenessLaw

# A block lasts this many turns of each worker on average. The next one begins in any run, displaced
# by at most this share of the run, because laws drift.
BLOCK_TURNS = 8
DRIFT_SHARE = 0.125

# Spells: turns of each worker in a block, number of simulated records, updates of each.
_SPELL_TURNS = 4
_RECORDS = 40
_LONGEST = 1000


@dataclass(frozen=True)
class RecordedTurns:
    """Ranks by age of the snapshots used in recorded runs.

    Attributes
    ----------
    ranks
        Ranks of each run, shape (updates,), in 0, ..., workers - 1; 0 is the newest snapshot.
    start_up
        Updates of each run until every worker delivered twice; they are replayed, not resampled.
    workers
        P.
    """

    ranks: tuple[Integers, ...]
    start_up: tuple[int, ...]
    workers: int

    @classmethod
    def of(cls, turns: Sequence[npt.ArrayLike]) -> RecordedTurns:
        """Compute the ranks from the turns of some runs.

        Parameters
        ----------
        turns
            For each run the worker of each update, shape (updates,).
        """
        workers, flat = np.unique(np.concatenate(turns), return_inverse=True)
        numbers = np.split(flat, np.cumsum([len(np.asarray(one)) for one in turns])[:-1])
        pairs = [_ranks(one.tolist(), len(workers)) for one in numbers]
        return cls(
            tuple(ranks for ranks, _ in pairs), tuple(start for _, start in pairs), len(workers)
        )

    @cached_property
    def _flat(self) -> Integers:
        return np.concatenate(self.ranks)

    @cached_property
    def _begin(self) -> Integers:
        return np.cumsum([0, *(len(ranks) for ranks in self.ranks)])


class ResampledTurns:
    """Turns on many paths: each starts as one of the runs and continues in blocks of any run.

    Parameters
    ----------
    recorded
        The turns.
    paths
        Number of independent pools.
    """

    def __init__(self, recorded: RecordedTurns, paths: int, rng: np.random.Generator) -> None:
        self.rng, self.workers = rng, recorded.workers
        self._ranks, self._begin = recorded._flat, recorded._begin
        self._shortest = min(len(ranks) for ranks in recorded.ranks)
        self._window = int(DRIFT_SHARE * self._shortest)
        self._stop = 1.0 / (BLOCK_TURNS * self.workers)
        runs = len(recorded.ranks)
        run = rng.permutation(np.arange(paths) % runs)
        self._at, self._last = self._begin[run], self._begin[run + 1] - 1
        self._start_up = np.array(recorded.start_up)
        self._free = self._start_up[run]
        self._order = np.tile(np.arange(self.workers), (paths, 1))
        self._k = 0

    def next(self) -> Integers:
        """Return the snapshot each path uses next, shape (paths,), and make it the newest."""
        return self.several(1)[:, 0]

    def several(self, updates: int) -> Integers:
        """Return the snapshots each path uses in the next updates, shape (paths, updates)."""
        from analysis.models.compiled import use_ranks

        rank = np.empty((len(self._at), updates), dtype=np.int64)
        for k in range(updates):
            rank[:, k] = self._ranks[self._at]
            self._k += 1
            self._move()
        slot = np.empty_like(rank)
        use_ranks(self._order, rank, slot)
        return slot

    def keep(self, index: Integers) -> None:
        """Replace the pools by those at `index`, shape (paths,)."""
        self._at, self._last, self._free = self._at[index], self._last[index], self._free[index]
        self._order = self._order[index]

    def _move(self) -> None:
        ended = self.rng.random(len(self._at)) < self._stop
        jump = (ended & (self._k >= self._free)) | (self._at == self._last)
        self._at += 1
        count = int(np.count_nonzero(jump))
        if not count:
            return
        run = self.rng.integers(len(self._begin) - 1, size=count)
        near = self.rng.integers(-self._window, self._window + 1, size=count) + self._k
        near = np.clip(near, self._start_up[run], self._shortest - 1)
        self._at[jump] = self._begin[run] + near
        self._last[jump] = self._begin[run + 1] - 1


def has_spells(
    staleness: Sequence[Integers],
    recorded: RecordedTurns,
    law: StalenessLaw,
    rng: np.random.Generator,
) -> bool:
    """Return whether the turns come in spells that independent workers of the law do not show.

    The statistic is the variance, over blocks and runs, of min(|tau - P + 1|, P) averaged over
    blocks of four turns of each worker. Spells are found if it exceeds the largest of 40 records
    simulated by (P2). Only the first 1000 updates of each run count.

    Parameters
    ----------
    staleness
        tau_0, tau_1, ... of each run.
    law
        The law of all runs.
    """
    workers, length = recorded.workers, min(_LONGEST, *(len(tau) for tau in staleness))
    dropped = min(max(recorded.start_up), length // 2)
    observed = _unevenness(np.stack([tau[dropped:length] for tau in staleness], axis=1), workers)
    read = np.zeros((_RECORDS * len(staleness), workers), dtype=np.int64)
    turns = pool_turns([law] * workers, rng)(len(read), rng)
    path = np.arange(len(read))
    simulated = np.empty((length, len(read)), dtype=np.int64)
    for k in range(length):
        slot = turns.next()
        simulated[k] = k - read[path, slot]
        read[path, slot] = k + 1
    records = np.split(simulated[dropped:], _RECORDS, axis=1)
    return observed > max(_unevenness(record, workers) for record in records)


def _unevenness(staleness: Integers, workers: int) -> float:
    """Return the variance of the block means of min(|tau - P + 1|, P), of shape (updates, runs)."""
    size = _SPELL_TURNS * workers
    blocks = len(staleness) // size
    off = np.minimum(np.abs(staleness[: blocks * size] - (workers - 1.0)), workers)
    return float(off.reshape(blocks, size, -1).mean(axis=1).var()) if blocks else 0.0


def _ranks(turns: list[int], workers: int) -> tuple[Integers, int]:
    """Return the rank by age of the snapshot each update uses, and the start-up."""
    # All hold x_0 at first, so whichever comes next counts as the oldest.
    came = list(dict.fromkeys(turns))
    newest_first = [worker for worker in range(workers) if worker not in came] + came[::-1]
    ranks = np.empty(len(turns), dtype=np.int64)
    delivered = [0] * workers
    start_up = 0
    for k, worker in enumerate(turns):
        ranks[k] = rank = newest_first.index(worker)
        newest_first.insert(0, newest_first.pop(rank))
        delivered[worker] += 1
        if delivered[worker] <= 2:
            start_up = k + 1
    return ranks, min(start_up, len(turns) // 2)
