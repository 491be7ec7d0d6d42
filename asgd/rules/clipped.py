"""Clipping of the gradient before any rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asgd.arrays import Array
from asgd.rules.base import Rule, State, apply_rule


class Clipped(Rule):
    """Another rule on the gradient g min(1, c / |g|) (Pascanu, Mikolov, Bengio, 2013).

    Parameters
    ----------
    rule
        The other rule.
    clip_norm
        c, the largest length of a gradient.
    """

    blockwise = False

    def __init__(self, rule: Rule, clip_norm: float) -> None:
        self.rule = rule
        self.clip_norm = clip_norm
        self.state = rule.state
        self.scratch = rule.scratch + 1
        self.reads = rule.reads

    def init(self, x: Array) -> State:
        """Return the state of the other rule."""
        return self.rule.init(x)

    def update(
        self,
        x: Array,
        gradient: Array,
        state: Sequence[Array],
        eta: float,
        count: int,
        staleness: int | Array,
        read: Array | None = None,
    ) -> None:
        """Clip a gradient and apply it by the other rule, in place."""
        *arrays, clipped = state
        length = _lengths(gradient, clipped)
        if np.any(length > self.clip_norm):
            factor = self.clip_norm / np.maximum(length, self.clip_norm)
            gradient = np.multiply(gradient, factor, out=clipped)
        apply_rule(self.rule, x, gradient, arrays, eta, count, staleness, read)


def _lengths(gradient: Array, squares: Array) -> Array:
    """Return |g|, shape (..., 1), as `np.linalg.norm` does but without allocation.

    If the squares overflow (in float32 from 1.8e19 on), it is computed from g / max |g| in float64.
    """
    with np.errstate(all="ignore"):
        np.multiply(gradient, gradient, out=squares)
        length = np.sqrt(np.add.reduce(squares, axis=-1, keepdims=True))
        finite = np.isfinite(length)
        if np.all(finite):
            return np.asarray(length)
        largest = np.abs(gradient).max(axis=-1, keepdims=True).astype(float)
        scaled = np.linalg.norm(gradient / largest, axis=-1, keepdims=True)
        return np.where(finite, length, largest * scaled)
