"""The part of the samples that each worker draws from.

The samples are divided among the P workers at the start: n/P for each, rounded up for the first
parts. Together the parts hold every sample once, so workers of equal speed still minimise f,
whatever the parts are. Worker w has part w mod P. So a restarted worker keeps its part, and an
added worker shares the part of another one (see `cluster.team`). Samples of a part without workers
are no longer drawn.

The parts depend on the seed of the run alone, so all workers, a simulation and a replay agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from asgd.arrays import Array, Integers
from asgd.config.tables import DataConfig, RunConfig
from asgd.errors import InputError, message_of
from asgd.streams import stream


class Samples(Protocol):
    """The members of a problem that the division needs."""

    n_samples: int

    @property
    def labels(self) -> Any:
        """Class of each sample, whole numbers of shape (n,), or None."""


@dataclass(frozen=True, eq=False)
class Shards:
    """The parts of the samples.

    Attributes
    ----------
    n_samples
        Number of samples n.
    parts
        The sample numbers of each part, in random order; None if all workers share all samples.
    """

    n_samples: int
    parts: tuple[Integers, ...] | None = None

    @classmethod
    def of(cls, config: RunConfig, problem: Samples) -> Shards:
        """Divide the samples of a problem as a run does.

        Raises
        ------
        InputError
            There are more workers than samples, or the parts need labels and there are none.
        """
        data, workers, n_samples = config.data, config.cluster.workers, problem.n_samples
        if data.shards == "shared":
            return cls(n_samples)
        if n_samples < workers:
            raise InputError(
                f"data.shards = {data.shards!r}: cannot divide {n_samples} samples among "
                f"cluster.workers = {workers}: expected at most {n_samples} workers, or shared"
            )
        rng = stream(config.run.seed, "shards")
        order, sizes = rng.permutation(n_samples), part_sizes(n_samples, workers)
        if data.shards != "partition":
            classes = _classes(config, problem)[order]
            if data.shards == "by_label":
                order = order[np.argsort(classes, kind="stable")]
            else:
                assert data.alpha is not None
                order = order[_mixed(classes, data.alpha, sizes, rng)]
        return cls(n_samples, tuple(np.split(order, np.cumsum(sizes)[:-1])))

    def part_of(self, worker: int) -> int:
        """Return the number of a worker's part; 0 if all workers share the samples."""
        return 0 if self.parts is None else worker % len(self.parts)

    def size(self, part: int) -> int:
        """Return the number of samples of a part."""
        return self.n_samples if self.parts is None else len(self.parts[part])

    def samples(self, part: int) -> Integers:
        """Return the sample numbers of a part, shape (n,)."""
        return np.arange(self.n_samples) if self.parts is None else self.parts[part]

    def choose(self, worker: int, size: Any, rng: np.random.Generator) -> Integers:
        """Draw samples of a worker with replacement, an array of shape `size`."""
        if self.parts is None:
            everyone: Integers = rng.integers(self.n_samples, size=size)
            return everyone
        part = self.parts[self.part_of(worker)]
        chosen: Integers = part[rng.integers(len(part), size=size)]
        return chosen


def part_sizes(n_samples: int, parts: int) -> Integers:
    """Return the sizes of equal parts; the first ones have one sample more, if any do."""
    least, more = divmod(n_samples, parts)
    return least + (np.arange(parts) < more)


def all_part_sizes(config: RunConfig, n_samples: int) -> list[int]:
    """Return the size of each part; of one part if all workers share the samples."""
    parts = config.cluster.workers if has_own_parts(config.data) else 1
    sizes: list[int] = part_sizes(n_samples, parts).tolist()
    return sizes


def has_own_parts(data: DataConfig) -> bool:
    """Whether each worker draws from a part of its own."""
    return data.shards != "shared"


def dependence(config: RunConfig) -> str | None:
    """Return the key by which batches are not independent draws from all samples, or None.

    The theory of noise assumes such draws: the noise of a gradient has covariance S/b, whichever
    worker computes it, and is independent of that of all others.
    """
    if has_own_parts(config.data):
        return f"data.shards = {config.data.shards!r}"
    by_epochs = config.data.sampling == "epoch"
    return f"data.sampling = {config.data.sampling!r}" if by_epochs else None


def _classes(config: RunConfig, problem: Samples) -> Integers:
    """Return the class of each sample, 0, 1, ..., in the order of the labels.

    Raises
    ------
    InputError
        The problem has no labels, or they are not whole numbers, one per sample.
    """
    expected = f"data.shards = {config.data.shards!r}: expected a problem with labels"
    kind = f"problem.kind = {config.problem.kind!r}"
    try:
        labels = problem.labels
        found = np.asarray(labels)
    except Exception as error:  # the user's code may raise anything
        reason = f"{type(error).__name__}: {message_of(error)}"
        raise InputError(f"{expected}, but those of {kind} cannot be read ({reason})") from error
    if labels is None:
        raise InputError(f"{expected}, shared or partition, because {kind} has none")
    if found.shape != (problem.n_samples,) or found.dtype.kind not in "iub":
        raise InputError(
            f"{expected} that are whole numbers of shape ({problem.n_samples},), "
            f"but {kind} has {found.dtype} of shape {found.shape}"
        )
    return np.unique(found, return_inverse=True)[1]


def _mixed(classes: Integers, alpha: float, sizes: Integers, rng: np.random.Generator) -> Integers:
    """Return an order of the samples whose parts differ in their classes.

    Hsu, Qi and Brown 2019, arXiv:1909.06335: each worker draws the shares of its classes from the
    Dirichlet law of the parameter alpha p, with p the shares in the data, and fills its part with
    classes of these shares, one worker after another, while there are samples of them.

    Parameters
    ----------
    classes
        Class of each sample, shape (n,).
    alpha
        Towards infinity, all parts have equal shares; towards 0, each part has one class, as long
        as there are samples of it.
    sizes
        Of the parts; their sum is n.
    """
    queues = np.argsort(classes, kind="stable")  # one class after another
    left = np.bincount(classes)
    ends = np.cumsum(left)
    laws = rng.dirichlet(alpha * left / len(classes), len(sizes))
    order = []
    for size, law in zip(sizes.tolist(), laws, strict=True):
        while size:
            weights = np.where(left > 0, law, 0.0)
            if not weights.sum() > 0.0:  # its classes are used up
                weights = left / 1.0
            taken = np.minimum(_rounded(size * weights / weights.sum(), size, rng), left)
            starts = ends - left
            order += [queues[first : first + k] for first, k in zip(starts, taken, strict=True)]
            left = left - taken
            size -= int(taken.sum())
    return np.concatenate(order)


def _rounded(values: Array, total: int, rng: np.random.Generator) -> Integers:
    """Round values of a given sum to whole numbers of the same sum, without bias."""
    edges = np.floor(np.cumsum(values) + rng.random()).astype(np.int64)
    edges[-1] = total
    return np.diff(edges, prepend=0)
