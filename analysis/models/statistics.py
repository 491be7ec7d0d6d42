"""Streaming statistics of a block of paths, and how those of two blocks combine."""

from __future__ import annotations

import numpy as np

from asgd.arrays import Array, Integers
from asgd.problems.base import Problem


class PathStatistics:
    """Means over some paths at the recorded updates.

    Quantiles cannot be streamed, so `losses`, shape (m, len(chosen)), keeps the losses of the paths
    at the positions `chosen` in this block.

    Attributes
    ----------
    mean, second_moment
        E x and E x^2 element by element, shape (m, d), or (0, d) if they are left out.
    loss_mean, loss_variance
        Of f(x) over the paths, shape (m,).
    """

    def __init__(
        self,
        problem: Problem,
        paths: int,
        chosen: Integers,
        losses: Array,
        moments: int,
    ) -> None:
        self.problem, self.paths = problem, paths
        self.losses, records = losses, len(losses)
        self._chosen = slice(None) if len(chosen) == paths else chosen
        self.mean = np.zeros((moments, problem.dim))
        self.second_moment = np.zeros((moments, problem.dim))
        self.loss_mean = np.zeros(records)
        self.loss_variance = np.zeros(records)

    def record(self, row: int, x: Array) -> None:
        """Take in the points at one recorded update, shape (paths, d)."""
        loss = np.asarray(self.problem.loss(x))
        self.losses[row] = loss[self._chosen]
        if x.shape[1] == 1:
            from analysis.models.compiled import moments

            loss = np.ascontiguousarray(loss, x.dtype)
            values = moments(x[:, 0], loss)
            if len(self.mean):
                self.mean[row], self.second_moment[row] = values[:2]
            self.loss_mean[row], self.loss_variance[row] = values[2:]
            return
        if len(self.mean):
            self.mean[row] = x.mean(axis=0)
            self.second_moment[row] = np.einsum("ij,ij->j", x, x) / self.paths
        mean = float(loss.sum()) / self.paths
        deviation = loss - mean
        self.loss_mean[row] = mean
        self.loss_variance[row] = np.dot(deviation, deviation) / self.paths

    def merge(self, other: PathStatistics) -> None:
        """Merge the statistics of another block."""
        self.paths += other.paths
        share = other.paths / self.paths
        between = share * (1 - share) * (other.loss_mean - self.loss_mean) ** 2
        for name in ("mean", "second_moment", "loss_mean", "loss_variance"):
            average = getattr(self, name)
            average *= 1 - share
            average += share * getattr(other, name)
        self.loss_variance += between
