"""Whose turn it is: which of the P snapshots a server holds is used next (ours).

The staleness laws of P workers do not say how their turns depend on each other. Here an update
uses snapshot i with probability proportional to a hazard of its age, P(used at age l | not used
before). With the hazards of the laws themselves the ages at use have the laws only nearly, because
what matters is each hazard's share of the sum over the pool; `pool_hazards` corrects them until
they do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asgd.arrays import Array, Integers
from asgd.staleness import StalenessLaw

# Turns simulated for one correction of the hazards, after a start-up of so many turns of each
# worker, and the number of corrections.
TURNS = 200_000
START_UP = 8
CORRECTIONS = 6
# Weight, in turns, of the law's own hazard at an age that the simulation hardly visits.
PRIOR_TURNS = 20.0


class Turns:
    """The ages of P snapshots on many paths; each use makes one of them new.

    Parameters
    ----------
    hazard
        Shape (P, L), a row for each worker; ages of L - 1 and more use the last column.
    paths
        Number of independent pools.
    """

    def __init__(self, hazard: Array, paths: int, rng: np.random.Generator) -> None:
        self.rng = rng
        self.workers, self.length = hazard.shape
        self.uniform = self.length == 1 and bool(np.all(hazard == hazard[0]))
        self._hazard = np.array(hazard, order="C")
        self._path = np.arange(paths)
        # All workers start at once, and nothing is pushed until a push is due: the first age at
        # which the pool as a whole uses one snapshot for each update.
        due = hazard.sum(axis=0) >= 1
        start = int(np.argmax(due)) if due.any() else self.length - 1
        self.ages = np.full((paths, self.workers), start, dtype=np.int64)

    def next(self) -> Integers:
        """Return the snapshot each path uses, shape (paths,), and let the others age."""
        slot = self.draw()
        self.use(slot)
        return slot

    def draw(self) -> Integers:
        """Return the snapshot that each path is to use, shape (paths,)."""
        paths = len(self._path)
        if self.uniform:
            return self.rng.integers(self.workers, size=paths, dtype=np.int64)
        from analysis.models.compiled import choose

        slot = np.empty(paths, dtype=np.int64)
        # Laws with gaps can make every age impossible: then the oldest snapshot is due.
        choose(self.ages, self._hazard, self.rng.random(paths), slot)
        return slot

    def use(self, slot: Integers) -> None:
        """Make the snapshots that are used new and let the others age."""
        self.ages += 1
        self.ages[self._path, slot] = 0

    def keep(self, index: Integers) -> None:
        """Take the pools named in place of the present ones, shape (paths,)."""
        self.ages = self.ages[index]


def pool_hazards(laws: Sequence[StalenessLaw], rng: np.random.Generator) -> Array:
    """Return hazards with which the age at use of each worker's snapshot has its law, (P, L).

    Fixed-point iteration: simulate the turns, and multiply each hazard by what its law wants over
    what was seen. Constant hazards whose sum is one, the memoryless workers, are exact as they
    are. The laws are those of one server if the rates 1 / (1 + E tau) sum to one.
    """
    rates = memoryless_rates(laws)
    if rates is not None:
        return rates
    length = max(law.support_length() for law in laws)
    target = np.stack([law.hazard(length) for law in laws])
    alike = all(law == laws[0] for law in laws)
    hazard = target.copy()
    for correction in range(CORRECTIONS):
        used, visited = _count(hazard, rng)
        if alike:
            used[:], visited[:] = used.sum(axis=0), visited.sum(axis=0)
        gain = 1 / max(correction - 1, 1)  # the last ones average the noise of the simulation
        hazard *= ((target * visited + PRIOR_TURNS) / (used + PRIOR_TURNS)) ** gain
    return hazard


def memoryless_rates(laws: Sequence[StalenessLaw]) -> Array | None:
    """Return the constant hazard of each law, shape (P, 1), None if one of them varies with age."""
    length = max(law.support_length() for law in laws)
    hazard = np.stack([law.hazard(length) for law in laws])
    return hazard[:, :1] if np.ptp(hazard, axis=1).max() < 1e-9 else None


def _count(hazard: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return how often each worker's snapshot was used at each age, and how often it had it."""
    from analysis.models.compiled import tally

    workers, length = hazard.shape
    start_up = START_UP * workers
    steps = max(2 * start_up, 200)
    turns = Turns(hazard, -(-TURNS // steps), rng)
    used, visited = np.zeros((workers, length)), np.zeros((workers, length))
    for step in range(start_up + steps):
        slot = turns.draw()
        if step >= start_up:
            tally(turns.ages, slot, used, visited)
        turns.use(slot)
    return used, visited
