"""Averages over the last L points of a path under any staleness law, and the matching noise."""

from __future__ import annotations

import math

import numpy as np

from analysis.models.noise import SNAPSHOTS, outer, psd_factor, standard_increments
from asgd.arrays import Array, Integers
from asgd.problems.base import Problem


class History:
    """A ring of the last L values of an array, with weights from newest to oldest.

    The past before the first value is constant: x_{-l} = x_0.

    Parameters
    ----------
    weights
        w_0, ..., w_{L-1}; w_l is the weight of the value l steps old.
    first
        The first value, any shape.
    """

    def __init__(self, weights: Array, first: Array) -> None:
        self.length = len(weights)
        self.ring = np.tile(first, (self.length, *([1] * first.ndim)))
        self.newest = 0
        # Row `newest` of the ring is `newest` steps before the end of one period of this table.
        self._table = np.tile(weights[::-1], 2).astype(first.dtype)

    def push(self, value: Array) -> None:
        """Append `value` and drop the oldest value."""
        self.newest = (self.newest + 1) % self.length
        self.ring[self.newest] = value

    def average(self) -> Array:
        """Return sum_l w_l value_{k-l}, the shape of one value."""
        start = self.length - 1 - self.newest
        flat = self.ring.reshape(self.length, -1)
        return (self._table[start : start + self.length] @ flat).reshape(self.ring.shape[1:])

    def pick(self, lag: Integers) -> Array:
        """Return for path p the values lag[..., p] steps old, shape (..., paths, d)."""
        path = np.arange(self.ring.shape[1])
        return self.ring[(self.newest - lag) % self.length, path]


class ReadPoints:
    """The past points of paths whose reads are known beforehand.

    A point leaves its slot after its last read, so there are about as many slots as snapshots
    in use, not as many as the largest lag.

    Parameters
    ----------
    version
        The version that each update reads, at most its own number; shape (updates, paths).
    first
        x_0 of each path, shape (paths, d).
    """

    def __init__(self, version: Integers, first: Array) -> None:
        updates, paths = version.shape
        self._path = np.arange(paths)
        self._version = version
        self._last_read = np.full((updates + 1, paths), -1)
        for update, read in enumerate(version):
            self._last_read[read, self._path] = update
        self._slot = np.zeros((updates + 1, paths), dtype=np.int32)  # of each version
        self._free_after = np.full((1, paths), -1)  # the last read of the point in each slot
        self._points = np.empty((1, *first.shape), first.dtype)
        self.keep(0, first)

    def read(self, update: int) -> Array:
        """Return the point that an update reads on each path, shape (paths, d); until `keep`."""
        slot = self._slot[self._version[update], self._path]
        one = len(slot) == 1  # without a copy
        points: Array = self._points[slot[0]] if one else self._points[slot, self._path]
        return points

    def keep(self, version: int, points: Array) -> None:
        """Store x_version of each path, shape (paths, d), before update `version`."""
        last = self._last_read[version]
        read_later = last >= version
        slot = self._free_after.argmin(axis=0)
        if np.any(self._free_after[slot, self._path][read_later] >= version):  # all in use
            self._free_after = np.pad(self._free_after, ((0, 1), (0, 0)), constant_values=-1)
            self._points = np.concatenate([self._points, np.empty_like(self._points[:1])])
            slot = self._free_after.argmin(axis=0)
        path, slot = self._path[read_later], slot[read_later]
        self._points[slot, path] = points[read_later]
        self._free_after[slot, path] = last[read_later]
        self._slot[version, path] = slot


class HistoryMatrixNoise:
    """Sigma of (G1) from (d, d) matrices: h = E_l grad f grad f^T and s = E_l S over the law."""

    def __init__(
        self,
        problem: Problem,
        x: Array,
        gradient: Array,
        rng: np.random.Generator,
        weights: Array,
        lag_noise: bool,
    ) -> None:
        self.problem, self.rng = problem, rng
        self.h = History(weights, outer(gradient)) if lag_noise else None
        self.s = History(weights, problem.gradient_covariance(x).astype(x.dtype))
        self._z = np.empty_like(x)

    def draw(self, g: Array, batch: float) -> Array:
        """Return Sigma^{1/2} z."""
        covariance = self.s.average() / batch
        if self.h is not None:
            covariance += self.h.average()
            covariance -= outer(g)
        z = standard_increments(self._z, self.rng, two_point=False)
        if z.shape[1] == 1:
            return np.sqrt(np.maximum(covariance[:, 0], 0)) * z
        return np.asarray(np.einsum("pij,pj->pi", psd_factor(covariance), z))

    def absorb(self, x: Array) -> Array:
        """Append x and return grad f(x)."""
        gradient = self.problem.gradient(x)
        if self.h is not None:
            self.h.push(outer(gradient))
        self.s.push(self.problem.gradient_covariance(x))
        return gradient


class HistorySnapshotNoise:
    """Sigma of (G1) without matrices, the counterpart of `SnapshotNoise` for any law (ours).

    The signed sum runs over R points whose lags are drawn from the law for each path and update.
    """

    def __init__(
        self,
        problem: Problem,
        x: Array,
        rng: np.random.Generator,
        weights: Array,
        gradients: History,
        lag_noise: bool,
    ) -> None:
        self.problem, self.rng, self.lag_noise = problem, rng, lag_noise
        self.gradients = gradients
        self.noises = History(weights, np.zeros_like(x))
        # Reads of x_0 need independent draws; R are enough, because one update sums R of them.
        draws = [problem.gradient_and_noise(x, rng)[1] for _ in range(min(len(weights), SNAPSHOTS))]
        for lag in range(len(weights)):
            self.noises.push(draws[lag % len(draws)])
        self._cumulative = np.cumsum(weights)[:-1]

    def draw(self, g: Array, batch: float) -> Array:
        """Return the signed sum over R draws of the lag."""
        shape = (SNAPSHOTS, len(g))
        lag = np.searchsorted(self._cumulative, self.rng.random(shape), side="right")
        signs = standard_increments(np.empty(shape, g.dtype), self.rng, two_point=True)
        signs /= math.sqrt(SNAPSHOTS)
        noise: Array = np.einsum("rp,rpd->pd", signs, self.noises.pick(lag))
        noise *= 1 / math.sqrt(batch)
        if self.lag_noise:
            noise += np.einsum("rp,rpd->pd", signs, self.gradients.pick(lag))
            noise -= signs.sum(axis=0)[:, None] * g
        return noise

    def absorb(self, x: Array) -> Array:
        """Append the noise at x and return grad f(x); the caller appends the gradient."""
        gradient, noise = self.problem.gradient_and_noise(x, self.rng)
        self.noises.push(noise)
        return gradient
