"""Exact moments of ASGD with linear gradients, given the version that every update reads (ours).

Given the reads, an update is x' = x - eta (grad f(s) + xi) with a known snapshot s and xi of
covariance S(s)/b. For sample gradients linear in x, mean and covariance of x and of all live
snapshots follow a closed recursion, whatever law the reads come from. A recorded run supplies its
reads. For a law, reads are drawn, and a few sequences suffice, because only the staleness is
random, not the samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from analysis.exact.linear_gradients import LinearGradients
from analysis.models.clocks import pool_turns
from analysis.models.pool import PoolTurns
from asgd.arrays import Array, Integers
from asgd.errors import InputError
from asgd.simulation.gathering import snapshot_slots
from asgd.staleness.law import StalenessLaw

# Numbers in the covariances of all live snapshots: 2**26 doubles are 512 MB.
LARGEST_STATE = 2**26
# Updates whose independent lags are drawn in one call.
_DRAWN_AT_ONCE = 256


class Reads(NamedTuple):
    """The snapshot that each update reads, for one or several independent runs.

    Attributes
    ----------
    turns
        An iterator over the updates, usable once: the slot that update k reads and the slot that
        receives x_{k+1}, shape (runs,) each. All slots hold x_0 at first.
    slots
        Number of slots.
    runs
        Number of runs.
    """

    turns: Iterator[tuple[Integers, Integers]]
    slots: int
    runs: int


class PointMoments(NamedTuple):
    """Mean (runs, d) and covariance (runs, d, d) of x at one update.

    Both in the eigenbasis of the Hessian.
    """

    mean: Array
    covariance: Array


def live_snapshots(staleness: Integers) -> int:
    """Return the largest number of snapshots that are live at one update of a run.

    Parameters
    ----------
    staleness
        tau_0, tau_1, ..., with 0 <= tau_k <= k.
    """
    updates = len(staleness)
    last_read = np.full(updates, -1)
    last_read[np.arange(updates) - staleness] = np.arange(updates)
    (read,) = np.nonzero(last_read >= 0)
    ended = np.bincount(last_read[read] + 1, minlength=updates + 1)[:updates]
    return int(np.cumsum((last_read >= 0) - ended).max())


def recorded_reads(staleness: Sequence[Integers]) -> Reads:
    """Return the reads of recorded runs of equal length, with as few slots as possible.

    Parameters
    ----------
    staleness
        tau_0, tau_1, ... of each run, with 0 <= tau_k <= k.
    """
    updates = len(staleness[0])
    version = [np.arange(updates) - tau for tau in staleness]
    slots = [snapshot_slots(read[:, np.newaxis]) for read in version]
    read = np.stack([own[of] for own, of in zip(slots, version, strict=True)], axis=1)
    write = np.stack([own[1:] for own in slots], axis=1)
    most = 1 + max(int(own.max()) for own in slots)
    return Reads(zip(read, write, strict=True), most, len(staleness))


def turn_reads(turns: PoolTurns, runs: int) -> Reads:
    """Return the endless reads of servers with these turns."""

    def slots() -> Iterator[tuple[Integers, Integers]]:
        while True:
            slot = turns.next()
            yield slot, slot

    return Reads(slots(), turns.workers, runs)


def pool_reads(law: StalenessLaw, workers: int, runs: int, rng: np.random.Generator) -> Reads:
    """Draw the endless reads of servers with P workers, (P2).

    Each snapshot is used exactly once.
    """
    return turn_reads(pool_turns([law] * workers, rng)(runs, rng), runs)


def independent_reads(
    law: StalenessLaw, updates: int, runs: int, rng: np.random.Generator
) -> Reads:
    """Draw the reads of (A1): independent lags; versions before 0 are x_0."""
    length = min(law.support_length(), updates + 1)

    def slots() -> Iterator[tuple[Integers, Integers]]:
        for start in range(0, updates, _DRAWN_AT_ONCE):
            update = np.arange(start, min(start + _DRAWN_AT_ONCE, updates))[:, None]
            drawn = law.rvs((len(update), runs), rng)
            lag = np.minimum(drawn, np.minimum(update, length - 1))
            write = np.broadcast_to((update + 1) % length, lag.shape)
            yield from zip((update - lag) % length, write, strict=True)

    return Reads(slots(), length, runs)


def read_moments(
    gradients: LinearGradients,
    learning_rate: float,
    reads: Reads,
    *,
    batch_size: int,
    initial: Array,
    record: Integers,
) -> Iterator[PointMoments]:
    """Yield mean and covariance of x_k given the reads, at each recorded update.

    Parameters
    ----------
    gradients
        The problem's coefficients.
    initial
        x_0, shape (d,).
    record
        Updates to record, ascending, shape (m,).

    Raises
    ------
    InputError
        The covariances of the live snapshots do not fit into 512 MB.
    """
    if not fits(reads.slots, reads.runs, gradients.dim):
        raise InputError(
            f"reads = {reads.slots} live snapshots of dim {gradients.dim}: expected fewer for "
            "closed moments; simulate instead"
        )
    return _moments(gradients, learning_rate, reads, batch_size, initial, record)


def fits(slots: int, runs: int, dim: int) -> bool:
    """Return whether the covariances of all snapshots fit into 512 MB."""
    return runs * ((slots + 1) * dim) ** 2 <= LARGEST_STATE


def _moments(
    gradients: LinearGradients,
    learning_rate: float,
    reads: Reads,
    batch_size: int,
    initial: Array,
    record: Integers,
) -> Iterator[PointMoments]:
    from analysis.models.compiled import read_update

    d, runs, slots = gradients.dim, reads.runs, reads.slots
    curvature, basis = np.linalg.eigh(gradients.curvature)
    noise = _NoiseCovariance(gradients, basis)
    pull = learning_rate * curvature
    mean = np.tile(basis.T @ initial, (runs, slots + 1, 1))
    cov = np.zeros((runs, slots + 1, slots + 1, d, d))
    run = np.arange(runs)
    kick = learning_rate * basis.T @ gradients.offset
    wanted, last = set(record.tolist()), int(record[-1])
    if 0 in wanted:
        yield PointMoments(mean[:, 0].copy(), cov[:, 0, 0].copy())
    for k, (read, write) in enumerate(islice(reads.turns, last), start=1):
        with np.errstate(over="ignore", invalid="ignore"):
            s, w = read + 1, write + 1
            own = learning_rate**2 / batch_size * noise(mean[run, s], cov[run, s, s])
            read_update(mean, cov, s, w, pull, kick, own)
        if k in wanted:
            yield PointMoments(mean[:, 0].copy(), own)


class _NoiseCovariance:
    """E S(s) in the eigenbasis for a random point s, affine in E s and E s s^T."""

    def __init__(self, gradients: LinearGradients, basis: Array) -> None:
        d = gradients.dim

        def covariance(first: Array, second: Array, one: float) -> Array:
            arguments = first @ basis.T, basis @ second @ basis.T, one
            value = gradients.expected_second_moment(*arguments)
            value = value - gradients.expected_square(*arguments)
            return np.asarray(basis.T @ value @ basis)

        zero, identity = np.zeros(d), np.eye(d * d).reshape(-1, d, d)
        self._constant = covariance(zero, np.zeros((d, d)), 1.0)
        self._linear = covariance(np.eye(d), np.zeros((d, d)), 0.0).reshape(d, -1)
        self._quadratic = covariance(zero, identity, 0.0).reshape(d * d, -1)

    def __call__(self, mean: Array, covariance: Array) -> Array:
        second = covariance + mean[:, :, None] * mean[:, None, :]
        value = mean @ self._linear + second.reshape(len(mean), -1) @ self._quadratic
        return np.asarray(value.reshape(covariance.shape) + self._constant)
