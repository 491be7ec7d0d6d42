"""Samples of a model's stationary law: thinned paths, and the expected read of ASGD."""

from __future__ import annotations

import numpy as np

from analysis.models.blocks import Block
from asgd.arrays import Array


class ExpectedReadPaths:
    """A block of ASGD paths with position M = sum_l w_l x_{k-l}, geometric staleness.

    m' = mu m + (1 - mu) x', An, Lu, Ying, section 2.1.
    """

    def __init__(self, asgd: Block, mu: float) -> None:
        self.asgd, self.mu = asgd, mu
        self.m = asgd.position().copy()

    def step(self, k: int) -> None:
        """Advance the paths and their expected reads by one update."""
        self.asgd.step(k)
        self.m *= self.mu
        self.m += (1.0 - self.mu) * self.asgd.position()

    def position(self) -> Array:
        """Return M, shape (paths, d)."""
        return self.m


def thinned_samples(block: Block, burn_in: int, spacing: int, samples: int) -> Array:
    """Return positions `spacing` updates apart after a burn-in, shape (samples, paths, d)."""
    taken = []
    for k in range(burn_in + spacing * samples):
        block.step(k)
        if k >= burn_in and (k - burn_in + 1) % spacing == 0:
            taken.append(block.position().copy())
    return np.array(taken)


def decay_updates(curvature: float, learning_rate: float, mu: float) -> float:
    """Return the number of updates in which the slowest mode of the mean falls by e."""
    product = learning_rate * curvature
    roots = np.roots([1.0, -(1.0 + mu - (1.0 - mu) * product), mu])
    return float(-1.0 / np.log(np.abs(roots).max()))
