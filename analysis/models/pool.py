"""The pool closure: P workers hold P snapshots, and each is used exactly once (ours)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from analysis.models.descent import Descent, DescentBlock, SampledDescent
from analysis.models.noise import outer, psd_factor, standard_increments
from asgd.arrays import Array, Integers


class PoolTurns(Protocol):
    """The order of turns on many paths."""

    workers: int

    def next(self) -> Integers:
        """Return the snapshot each path uses next, shape (paths,), and make it the newest."""


class TurnMaker(Protocol):
    """Makes the turns of one block of paths."""

    def __call__(self, paths: int, rng: np.random.Generator) -> PoolTurns:
        """Return the turns, at update 0."""


class Pool(SampledDescent):
    """A block of paths of (P2), with the P snapshots of each path.

    An update uses one snapshot, x' = x - eta (grad f + xi)(snapshot) with xi ~ N(0, S/b) or of a
    mini-batch (`sampled_gradient`), and replaces it by x'. The turns choose the snapshot:
    `pool_turns` by the law, (P2), `ResampledTurns` as recorded, (P3). Uniform turns give exactly
    the server of memoryless workers, but for Gaussian noise. At the start all workers hold x_0. The
    pool keeps points, not gradients, so every use draws its own noise. This is a recursion with one
    step per update; it has no order.
    """

    def __init__(
        self, descent: Descent, turns: TurnMaker, x: Array, rng: np.random.Generator
    ) -> None:
        super().__init__(descent, x, rng)
        self.turns = turns(len(x), rng)
        self.snapshots = np.repeat(x[:, None], self.turns.workers, axis=1)
        self._path = np.arange(len(x))

    def read(self, k: int) -> list[Array]:
        """Return the snapshot of each path whose turn it is."""
        self._slot = slot = self.turns.next()
        one = len(slot) == 1  # then without a copy
        return [self.snapshots[:, slot[0]] if one else self.snapshots[self._path, slot]]

    def apply(self, gradients: Iterator[Array], k: int) -> None:
        """Apply the gradient and replace the snapshot by the new point."""
        super().apply(gradients, k)
        self.snapshots[self._path, self._slot] = self.x


class PoolMoments(DescentBlock):
    """A block of paths of (P1): mean and second moment of the pool instead of its members.

    O(1) memory, geometric law, (d, d) matrices. One lag noise e enters both lines:

        x' = x - eta (g + e + xi),   g' = mu g + (1-mu) (grad f(x') - e),
        h' = mu h + (1-mu) grad f(x') grad f(x')^T,   e ~ N(0, h - g g^T),   xi ~ N(0, S_w / b)

    This is a recursion with one step per update; it has no order. A Gaussian e can push h - g g^T
    below zero on single paths, where it is taken as zero. E x^2 is then up to 1 % too large; `Pool`
    and the recursion of the moments have no such error.
    """

    def __init__(self, descent: Descent, mu: float, x: Array, rng: np.random.Generator) -> None:
        super().__init__(descent, x, rng)
        self.mu, self.g = mu, self.problem.gradient(x).astype(x.dtype)
        self.h = outer(self.g)
        self.s = self.problem.gradient_covariance(x).astype(x.dtype)

    def step(self, k: int) -> None:
        """Advance one update."""
        eta, mu = self.learning_rate[k], self.mu
        e = self._normal(self.h - outer(self.g))
        xi = self._normal(self.s / self.batch_size[k])
        self.x -= eta * (self.g + e + xi)
        gradient = self.problem.gradient(self.x)
        self.g = mu * self.g + (1 - mu) * (gradient - e)
        self.h = mu * self.h + (1 - mu) * outer(gradient)
        self.s = mu * self.s + (1 - mu) * self.problem.gradient_covariance(self.x)

    def _normal(self, covariance: Array) -> Array:
        z = standard_increments(np.empty_like(self.x), self.rng, two_point=False)
        return np.asarray(np.einsum("pij,pj->pi", psd_factor(covariance), z))
