"""Blocks: paths of a model that advance together, alone or with the blocks of other models.

A model implements `Block`. A `BlockMaker` builds one from its initial points and its own random
generator:

    class Heun:                                       # a Block
        def __init__(self, problem, ..., x, rng): ...
        def step(self, k): ...                        # from update k to update k + 1, in place
        def position(self): ...                       # x now, shape (paths, d)

    heun = PathModel(partial(Heun, problem, ...), "heun")

Where a call for a few points costs nearly as much as one for many, as with networks, blocks of
several models share it. Such a block, a `SampledBlock`, divides its step into three:

    points = block.read(k)                            # where it takes gradients of mini-batches
    gradients = problem.gradient(points, batches)     # one call for the points of all blocks
    block.apply(gradients, k)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np

from asgd.arrays import Array, Integers
from asgd.problems.base import Indices, Problem


class Block(Protocol):
    """Some paths of a model that advance together."""

    def step(self, k: int) -> None:
        """Advance every path from update k to update k + 1, in place."""

    def position(self) -> Array:
        """Return the current x, shape (paths, d); valid until the next step."""


@runtime_checkable
class SampledBlock(Block, Protocol):
    """A block whose step needs only mini-batch gradients of the problem."""

    problem: Problem

    def read(self, k: int) -> list[Array]:
        """Return the points of update k, shape (paths, d) for each gradient of its mean.

        They are valid until `apply`.
        """

    def draw_batches(self, points: Array, k: int) -> Indices:
        """Return the samples of one mini-batch for each of the points, shape (paths, b)."""

    def apply(self, gradients: Iterator[Array], k: int) -> None:
        """Apply update k from the gradients at its points, each of shape (paths, d)."""


class BlockMaker(Protocol):
    """Builds the block that starts at `x`, shape (paths, d); the block may overwrite `x`."""

    def __call__(self, x: Array, rng: np.random.Generator) -> Block:
        """Return the block, at update 0."""


@dataclass(frozen=True)
class PathModel:
    """A model of paths, ready to be simulated.

    Attributes
    ----------
    make_block
        Builds its blocks, as a `BlockMaker`; for several recorded runs it also takes the run of
        each path, see `shared`.
    name
        Names the random streams: two models under one seed draw independent numbers.
    state_copies
        Vectors of length d that it holds for each path; bounds the size of a block.
    runs
        Recorded runs that share its paths.
    """

    make_block: Callable[..., Block]
    name: str
    state_copies: int = 4
    runs: int = 1


def shared(rows: slice, paths: int, among: int) -> Integers:
    """Return the index of the run or point, `among` in all, of each path in `rows`, ascending.

    Each gets neighbouring paths, in shares of all `paths` that differ by one at most.
    """
    return np.arange(rows.start, rows.stop) * among // paths


def share_calls(problem: Problem) -> bool:
    """Return whether blocks of several models are faster with one call for all their gradients.

    They are if updates take the gradients of mini-batches, and these cost less together.
    """
    return not problem.gives_noise and problem.points_at_once > 1


class Together:
    """The blocks of several models on one problem, which share the calls for their gradients.

    Each draws the same random numbers as alone, so its paths are those of its own `step`. A block
    that does not sample advances by itself.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        sampled = [block for block in blocks if isinstance(block, SampledBlock)]
        shared = len(sampled) > 1 and share_calls(sampled[0].problem)
        self._sampled = sampled if shared else []
        self._others = [block for block in blocks if block not in self._sampled]

    def step(self, k: int) -> None:
        """Advance all blocks from update k to update k + 1."""
        for block in self._others:
            block.step(k)
        if self._sampled:
            self._step_sampled(k)

    def _step_sampled(self, k: int) -> None:
        blocks = self._sampled
        reads = [block.read(k) for block in blocks]
        points = [x for read in reads for x in read]
        of_blocks = list(zip(blocks, reads, strict=True))
        batches = [block.draw_batches(x, k) for block, read in of_blocks for x in read]
        gradient = blocks[0].problem.gradient(np.concatenate(points), np.concatenate(batches))
        ends = np.cumsum([len(x) for x in points])
        parts = iter(np.split(gradient.astype(points[0].dtype, copy=False), ends[:-1]))
        for block, read in of_blocks:
            block.apply(islice(parts, len(read)), k)
