"""Turns by clocks: finds compute times of independent workers that have given staleness laws (P2).

Which worker pushes next depends on how long each has been computing. Ages in updates, as in
`analysis.models.turns`, lose part of this: for laws wider than the geometric one the error of E x^2
is up to 8 %. Most laws of a server have such compute times. A law that switches between a fixed and
a random order, or comes from a pipeline, has none; then `pool_turns` uses the hazards of
`analysis.models.turns`. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from analysis.models.pool import TurnMaker
from analysis.models.turns import START_UP, TURNS, Turns, memoryless_rates, pool_hazards
from asgd.arrays import Array, Integers
from asgd.staleness.law import StalenessLaw

# Levels of the quantiles of a compute time: even in logit to resolve both tails, then 0 and 1 at
# the ends.
_LOGIT = 1 / (1 + np.exp(-np.linspace(-12.0, 12.0, 600)))
LEVELS: Array = np.concatenate([[0.0], _LOGIT, [1.0]])
# Largest number of corrections of the quantiles, and the power of each: full corrections overshoot
# if all times are nearly equal.
CORRECTIONS, DAMPING = 10, 0.8
# Difference of the distribution functions at which the iteration stops, and from which on the
# clocks are rejected.
NEAR, FAR = 0.005, 0.03


class ClockTurns:
    """Workers on many paths; the worker whose clock rings first has the turn.

    Parameters
    ----------
    quantiles
        Quantiles of each worker's compute time at `LEVELS`, shape (P, L).
    paths
        Number of independent servers. All workers of a server start together.
    """

    def __init__(self, quantiles: Array, paths: int, rng: np.random.Generator) -> None:
        self.rng, self.workers = rng, len(quantiles)
        self._quantiles = np.array(quantiles, order="C")
        drawn = [np.interp(rng.random(paths), LEVELS, own) for own in quantiles]
        self.due = np.stack(drawn, axis=1)

    def next(self) -> Integers:
        """Return the next worker of each path, shape (paths,), and restart its clock."""
        from analysis.models.compiled import first_due

        slot = np.empty(len(self.due), dtype=np.int64)
        first_due(self.due, self._quantiles, LEVELS, self.rng.random(len(slot)), slot)
        return slot


@dataclass(frozen=True)
class WorkerClocks:
    """Compute times fitted to staleness laws.

    Attributes
    ----------
    quantiles
        Quantiles of each worker's compute time at `LEVELS`, in units of the mean time per update,
        shape (P, L).
    distance
        Largest difference between the distribution functions of the simulated staleness and of the
        law, averaged over updates.
    """

    quantiles: Array
    distance: float


def pool_turns(laws: Sequence[StalenessLaw], rng: np.random.Generator) -> TurnMaker:
    """Return turns of workers with these staleness laws, one law per worker (P2).

    Memoryless workers draw at fixed rates. Others have clocks, or hazards of age if no clocks fit.
    """
    rates = memoryless_rates(laws)
    if rates is not None:
        return partial(Turns, rates)
    clocks = worker_clocks(laws, rng)
    if clocks.distance < FAR:
        return partial(ClockTurns, clocks.quantiles)
    return partial(Turns, pool_hazards(laws, rng))


def worker_clocks(laws: Sequence[StalenessLaw], rng: np.random.Generator) -> WorkerClocks:
    """Return compute times of independent workers that nearly have these staleness laws.

    Fixed-point iteration: simulate the workers, then multiply each quantile of a compute time by
    the law's over the simulated quantile at the same level. A worker's mean time is 1 + E tau.

    Parameters
    ----------
    laws
        One per worker. A server can have them if the rates 1 / (1 + E tau) sum to one.
    """
    alike = all(law == laws[0] for law in laws)
    lengths = [law.support_length() for law in laws]
    weights = [law.weights(length) for law, length in zip(laws, lengths, strict=True)]
    wanted = np.stack([_quantiles(own) for own in weights])
    mean = np.array([[1.0 + law.mean()] for law in laws])
    quantiles = _of_mean(wanted, mean)
    best = WorkerClocks(quantiles, np.inf)
    for _ in range(CORRECTIONS):
        counts = _staleness(quantiles, max(lengths), rng)
        if alike:
            counts[:] = counts.sum(axis=0)
        distance = _distance(weights, counts)
        if distance < best.distance:
            best = WorkerClocks(quantiles, distance)
        if distance < NEAR:
            break
        seen = np.stack([_quantiles(own / own.sum()) for own in counts])
        quantiles = _of_mean(quantiles * (wanted / seen) ** DAMPING, mean)
    return best


def _quantiles(weights: Array) -> Array:
    """Return quantiles of tau + 1/2 + U at `LEVELS`, U uniform in [0, 1)."""
    below = np.concatenate([[0.0], np.cumsum(weights)])
    # Strictly increasing; otherwise a level in a gap of the law has no quantile.
    below += 1e-12 * np.arange(len(below))
    return np.asarray(np.interp(LEVELS, below / below[-1], np.arange(len(below)) + 0.5))


def _of_mean(quantiles: Array, mean: Array) -> Array:
    quantiles = np.maximum.accumulate(quantiles, axis=1)
    middle = (quantiles[:, 1:] + quantiles[:, :-1]) / 2
    return np.asarray(quantiles * (mean / (middle @ np.diff(LEVELS))[:, None]))


def _staleness(quantiles: Array, length: int, rng: np.random.Generator) -> Array:
    """Return counts of each worker's staleness 0, 1, ..., in steady state, shape (P, length).

    Values from `length` on count as `length` - 1.
    """
    workers = len(quantiles)
    start_up = START_UP * workers
    steps = max(2 * start_up, 200)
    paths = -(-TURNS // steps)
    turns = ClockTurns(quantiles, paths, rng)
    read = np.empty((paths, workers), dtype=np.int64)
    for worker, own in enumerate(quantiles):
        # In steady state the running time is length-biased, and its age is uniform.
        share = np.concatenate([[0.0], np.cumsum(np.diff(LEVELS) * (own[1:] + own[:-1]))])
        level = np.interp(rng.random(paths), share / share[-1], LEVELS)
        whole = np.interp(level, LEVELS, own)
        passed = whole * rng.random(paths)
        turns.due[:, worker] = whole - passed
        # One update per unit of time.
        read[:, worker] = -start_up - np.rint(passed)
    path, cells = np.arange(paths), np.empty((steps, paths), dtype=np.int64)
    for step in range(-start_up, steps):
        slot = turns.next()
        if step >= 0:
            cells[step] = slot * length + np.minimum(step - read[path, slot], length - 1)
        read[path, slot] = step + 1
    counts = np.bincount(cells.ravel(), minlength=workers * length)
    return counts.reshape(workers, length).astype(float)


def _distance(weights: Sequence[Array], counts: Array) -> float:
    """Return the largest difference of the distribution functions, averaged over updates."""
    total = 0.0
    for law, own in zip(weights, counts, strict=True):
        expected = np.zeros(len(own))
        expected[: len(law)] = law
        total += float(np.abs(np.cumsum(own - own.sum() * expected)).max())
    return total / float(counts.sum())
