"""Turns by age: which of its P snapshots a server uses next (ours).

The staleness laws of P workers do not determine how their turns depend on each other. Here an
update uses snapshot i with probability proportional to a hazard of its age, P(used at age l | not
used before). With the laws' own hazards the ages at use follow the laws only approximately, because
each hazard is divided by the sum over the pool; `pool_hazards` corrects them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asgd.arrays import Array, Integers
from asgd.errors import InputError
from asgd.staleness.law import StalenessLaw

# Turns simulated for one correction of the hazards, turns of each worker in the start-up before it,
# and the number of corrections.
TURNS = 200_000
START_UP = 8
CORRECTIONS = 6
# Weight, in turns, of the law's own hazard at an age that the simulation rarely visits.
PRIOR_TURNS = 20.0
_OFF = 0.1  # tolerance in workers for the mean of a measured law


class Turns:
    """The ages of P snapshots on many paths; the snapshot used becomes new.

    Parameters
    ----------
    hazard
        Shape (P, L), a row per worker; ages from L - 1 on use the last column.
    paths
        Number of independent pools.
    """

    def __init__(self, hazard: Array, paths: int, rng: np.random.Generator) -> None:
        self.rng = rng
        self.workers, self.length = hazard.shape
        self.uniform = self.length == 1 and bool(np.all(hazard == hazard[0]))
        self._hazard = np.array(hazard, order="C")
        self._path = np.arange(paths)
        # All workers start together, and none pushes before a push is due: start at the first
        # age at which the pool makes one update per step.
        due = hazard.sum(axis=0) >= 1
        start = int(np.argmax(due)) if due.any() else self.length - 1
        self.ages = np.full((paths, self.workers), start, dtype=np.int64)

    def next(self) -> Integers:
        """Return the snapshot each path uses next, shape (paths,), and age the others."""
        return self.several(1)[:, 0]

    def several(self, updates: int) -> Integers:
        """Return the snapshots each path uses in the next updates, shape (paths, updates)."""
        paths = len(self.ages)
        if self.uniform:
            drawn = self.rng.integers(self.workers, size=(updates, paths), dtype=np.int64)
            self.ages += updates
            for k, used in enumerate(drawn):
                self.ages[self._path, used] = updates - 1 - k
            return np.ascontiguousarray(drawn.T)
        from analysis.models.compiled import choose

        slot = np.empty((paths, updates), dtype=np.int64)
        # Laws with gaps can give every age hazard zero: the oldest snapshot is then due.
        choose(self.ages, self._hazard, self.rng.random((updates, paths)), slot)
        return slot

    def keep(self, index: Integers) -> None:
        """Replace the pools by those at `index`, shape (paths,)."""
        self.ages = self.ages[index]


def workers_of(law: StalenessLaw, key: str = "law", remedy: str = "the argument `workers`") -> int:
    """Return the number P of workers whose mean staleness, P - 1, is that of the law.

    Raises
    ------
    InputError
        There is none, by more than sampling error; `key` names the law, and `remedy` what to pass.
    """
    wanted = 1.0 + law.mean()
    if abs(wanted - round(wanted)) > _OFF:
        raise InputError(
            f"{key} = a law of mean {wanted - 1.0:.4g}: expected P - 1 for a whole number P of "
            f"workers, or {remedy}"
        )
    return round(wanted)


def pool_hazards(laws: Sequence[StalenessLaw], rng: np.random.Generator) -> Array:
    """Return hazards under which each worker's age at use follows its law, shape (P, L).

    Fixed-point iteration: simulate the turns, then multiply each hazard by the law's over the
    simulated frequency. Constant hazards that sum to one (memoryless workers) are exact and stay.
    A server can have these laws if the rates 1 / (1 + E tau) sum to one.
    """
    target = _hazards(laws)
    if _constant(target):
        return target[:, :1]
    alike = all(law == laws[0] for law in laws)
    hazard = target.copy()
    for correction in range(CORRECTIONS):
        used, visited = _count(hazard, rng)
        if alike:
            used[:], visited[:] = used.sum(axis=0), visited.sum(axis=0)
        gain = 1 / max(correction - 1, 1)  # later corrections average the simulation noise
        hazard *= ((target * visited + PRIOR_TURNS) / (used + PRIOR_TURNS)) ** gain
    return hazard


def memoryless_rates(laws: Sequence[StalenessLaw]) -> Array | None:
    """Return the constant hazard of each law, shape (P, 1); None if one varies with age."""
    hazard = _hazards(laws)
    return hazard[:, :1] if _constant(hazard) else None


def _hazards(laws: Sequence[StalenessLaw]) -> Array:
    """Return the hazard of each law by age, shape (P, L)."""
    different = list(dict.fromkeys(laws))  # workers often share one law
    length = max(law.support_length() for law in different)
    rows = {law: law.hazard(length) for law in different}
    return np.stack([rows[law] for law in laws])


def _constant(hazard: Array) -> bool:
    return bool(np.ptp(hazard, axis=1).max() < 1e-9)


def _count(hazard: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return counts by worker and age of used snapshots and of all snapshots, (P, L) each."""
    from analysis.models.compiled import tally

    workers, length = hazard.shape
    start_up = START_UP * workers
    steps = max(2 * start_up, 200)
    turns = Turns(hazard, -(-TURNS // steps), rng)
    used, visited = np.zeros((workers, length)), np.zeros((workers, length))
    turns.several(start_up)
    ages = turns.ages.copy()
    tally(ages, turns.several(steps), used, visited)
    return used, visited
