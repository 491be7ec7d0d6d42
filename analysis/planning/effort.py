"""The effort of a plan for a choice: paths by work or by time, curvatures exact or probed (ours).

Where a gradient of all samples is cheap, the number of paths depends on the choice alone, and the
curvatures are those of all samples. Otherwise, as with networks, a few paths judge each choice: as
many as fit into a stated time; and curvatures come from the probe, for the cost of a path at most.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from analysis.planning.paths import PathSetting, PlannedPaths, path_count, planned_paths
from analysis.prediction.duration import in_words
from analysis.prediction.probe import affordable_samples, leading_curvature
from analysis.prediction.run_stability import DENSE_DIM, leading_curvatures
from asgd.arrays import Array, Integers
from asgd.errors import InputError
from asgd.problems.base import Problem
from asgd.streams import stream

Stage = Literal["first", "more"]
Share = Callable[[int, int], None]

SECONDS = 300.0  # of a plan for a network
FIRST_SHARE = 0.8  # of the progress, and of that time, for the first paths of all choices

# Numbers to process for the first paths of a choice, and for more paths of a leading one (see
# `path_count`); then the fewest and the most paths.
_NUMBERS = {"first": 3e8, "more": 2e9}
_FEWEST, _MOST = {"first": 16, "more": 64}, {"first": 64, "more": 448}
# The same by time. A block advances together.
_SMALLEST_BLOCK, _TIMED = 4, {"first": 16, "more": 48}

_EVEN, _EARLY = 40, 120  # points of a predicted curve, even in updates and in their logarithm
_FEWEST_POINTS = 24
_LOSS = 1 / 3  # cost of the loss of a sample, in gradients
_LOSSES = 2.0  # largest cost of the losses of a path over that of its gradients


class Effort(ABC):
    """How many paths a choice gets, where their losses are recorded, and how curvatures are found.

    Parameters
    ----------
    problem, seed
        The problem, and the seed of all random draws.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem, self._seed = problem, seed

    @abstractmethod
    def curvature(self, x: Array) -> float:
        """Return the largest eigenvalue of the Hessian at x, shape (d,)."""

    @abstractmethod
    def record(self, batch: Integers) -> Integers:
        """Return the updates to record, ascending from 0, given the samples of each update."""

    @abstractmethod
    def paths(
        self, setting: PathSetting, workers: int, stage: Stage, name: str, progress: Share
    ) -> PlannedPaths | None:
        """Simulate the first paths of the choice called `name`, or more; None if time is up."""

    @property
    @abstractmethod
    def note(self) -> str:
        """How curvatures and paths were limited, as sentences; "" if they were not."""


def effort_for(problem: Problem, seed: int, gradients: int, choices: int, seconds: float) -> Effort:
    """Return the effort that suits a problem.

    Parameters
    ----------
    gradients
        Gradients of one sample in one path, on average over the choices.
    choices
        Number of choices of the plan.
    seconds
        Time for the paths where a gradient of all samples is costly.
    """
    if problem.gives_noise or problem.dim <= DENSE_DIM:
        return ByWork(problem, seed)
    return ByTime(problem, seed, gradients, choices, seconds)


class ByWork(Effort):
    """Paths by the work they make, so that their number does not depend on the machine."""

    note = ""

    def curvature(self, x: Array) -> float:
        """Return the largest eigenvalue of the Hessian at x, shape (d,)."""
        return float(leading_curvatures(self._problem, x)[0])

    def record(self, batch: Integers) -> Integers:
        """Return the updates to record, ascending from 0."""
        return _points(len(batch), _EVEN + _EARLY)

    def paths(
        self, setting: PathSetting, workers: int, stage: Stage, name: str, progress: Share
    ) -> PlannedPaths:
        """Simulate the first paths of the choice called `name`, or more."""
        size = {"fewest": _FEWEST[stage], "most": _MOST[stage]}
        count = path_count(setting, workers, numbers=_NUMBERS[stage], **size)
        rng = stream(self._seed, f"plan/{stage}/{name}")
        return planned_paths(setting, count, rng, progress)


class ByTime(Effort):
    """Blocks of paths while there is time: at least one of each choice.

    The paths of a block do not depend on the time, only the number of blocks does.

    Parameters
    ----------
    problem, seed, gradients, choices, seconds
        As for `effort_for`.
    clock
        A monotonic clock, in seconds.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int,
        gradients: int,
        choices: int,
        seconds: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(problem, seed)
        self._choices, self._left, self._seconds = choices, choices, seconds
        self._clock, self._started = clock, clock()
        self._samples = affordable_samples(problem, gradients, 1, share=1.0)
        self._rng = stream(seed, "plan/probe")
        self._gradients = gradients
        self._block: int | None = None
        self._lasted: dict[str, float] = {}  # seconds of the last block of each choice

    @property
    def note(self) -> str:
        """How curvatures and paths were limited, as sentences."""
        of = self._problem.n_samples
        on = "all samples" if self._samples >= of else f"{self._samples:,} of {of:,} samples"
        return (
            f"Curvatures: probed, on {on}. Paths: up to {_TIMED['first']} of each choice and "
            f"{_TIMED['more']} more of the best, within {self._seconds:g} s. "
        )

    def curvature(self, x: Array) -> float:
        """Return the upper end of the largest eigenvalue of the Hessian at x, shape (d,)."""
        return leading_curvature(self._problem, x, self._samples, self._rng).high

    def record(self, batch: Integers) -> Integers:
        """Return the updates to record; losses there cost at most twice as much as the gradients.

        About 24 are recorded at any cost.
        """
        affordable = _LOSSES * float(batch.sum()) / (_LOSS * self._problem.n_samples)
        count = int(min(max(affordable, _FEWEST_POINTS), _EVEN + _EARLY))
        return _points(len(batch), count)

    def paths(
        self, setting: PathSetting, workers: int, stage: Stage, name: str, progress: Share
    ) -> PlannedPaths | None:
        """Simulate the first paths of the choice called `name`, or more if there is time."""
        if self._block is None:
            self._block = self._largest_block(setting)
        size = path_count(setting, workers, numbers=0, fewest=self._block, most=self._block)
        most = -(-_TIMED[stage] // size)
        until = self._deadline(stage)
        found: PlannedPaths | None = None
        for block in range(most):
            begun = self._clock()
            if begun + self._lasted.get(name, 0.0) > until and (found or stage == "more"):
                break
            rng = stream(self._seed, f"plan/{stage}/{name}/{block}")
            share = partial(_share_of, progress, block, most)
            new = planned_paths(setting, size, rng, share)
            found = new if found is None else found.joined(new)
            self._lasted[name] = self._clock() - begun
        return found

    def _deadline(self, stage: Stage) -> float:
        """Return the time by which the next paths must end."""
        now = self._clock()
        if stage == "more":  # of an unknown number of leading choices
            return now + (self._started + self._seconds - now) / 2
        left = self._started + FIRST_SHARE * self._seconds - now
        self._left -= 1
        return now + left / (self._left + 1)

    def _largest_block(self, setting: PathSetting) -> int:
        """Return the number of paths of a block: the efficient one, or the least if time is short.

        Raises
        ------
        InputError
            The smallest block of every choice takes too long.
        """
        size = max(_SMALLEST_BLOCK, min(self._problem.points_at_once, _TIMED["first"]))
        for paths in (size, _SMALLEST_BLOCK):
            each = self._seconds_of_block(setting, paths) * (1.0 + 1.0 / paths)  # and a curvature
            if self._choices * each <= FIRST_SHARE * self._seconds:
                return paths
        raise InputError(
            f"seconds = {self._seconds:g}: {paths} paths of each of {self._choices} choices take "
            f"about {in_words(self._choices * each / FIRST_SHARE)}: expected more seconds, fewer "
            "choices or updates"
        )

    def _seconds_of_block(self, setting: PathSetting, paths: int) -> float:
        """Return how long a block of paths takes, by its gradients and losses."""
        points = np.tile(setting.initial.astype(setting.dtype), (paths, 1))
        size = (paths, int(setting.batch_size[0]))
        batches = stream(self._seed, "plan/pace").integers(self._problem.n_samples, size=size)
        with threadpool_limits(1, user_api="blas"):
            loss = self._seconds_of(lambda: self._problem.loss(points))
            gradient = self._seconds_of(lambda: self._problem.gradient(points, batches))
        updates = self._gradients / size[1]  # of all choices on average
        return loss * len(setting.record) + gradient * updates

    def _seconds_of(self, call: Callable[[], object]) -> float:
        """Return the shortest time of a call of three; the first may compile code."""
        call()
        taken = []
        for _ in range(3):
            begun = self._clock()
            call()
            taken.append(self._clock() - begun)
        return min(taken)


def _share_of(progress: Share, block: int, blocks: int, done: int, total: int) -> None:
    """Report the progress of one of some blocks."""
    progress(block * total + done, blocks * total)


def _points(updates: int, count: int) -> Integers:
    """Return about `count` updates, a quarter of them evenly spaced, the others mostly early."""
    even = np.linspace(0, updates, count * _EVEN // (_EVEN + _EARLY) + 1)
    early = np.geomspace(1, updates, count * _EARLY // (_EVEN + _EARLY))
    return np.unique(np.concatenate([even, early]).round().astype(np.int64))
