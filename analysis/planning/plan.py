"""What-if plans: more workers, another learning rate, another batch size (ours).

For every choice the times of the workers give the staleness law and the speed
(`analysis.planning.pace`), the turns give the limits of the learning rate
(`analysis.exact.limits`), and paths in virtual time under the run's own rule give the loss
(`analysis.planning.paths`). A few paths of every choice are simulated first. The leading choice
then gets many more, until a choice that has them leads; `analysis.planning.effort` says how many.
No worker is started.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from analysis.exact.limits import StabilityLimits
from analysis.exact.linear_rules import linear_rule
from analysis.planning.choices import Choice, choices_of
from analysis.planning.effort import FIRST_SHARE, SECONDS, Effort, Share, Stage, effort_for
from analysis.planning.gradient_cost import GradientCost
from analysis.planning.pace import ConfiguredPace, MeasuredPace, Pace, PaceOf
from analysis.planning.paths import PathSetting, PlannedPaths
from analysis.planning.row import CLEARLY_STABLE, HEADS, PlanRow, PointLimits
from analysis.prediction.setting import path_dtype
from asgd.arrays import Array
from asgd.config.make import Configuration, as_config
from asgd.config.tables import OptimizerConfig, RunConfig
from asgd.errors import InputError
from asgd.local_steps import not_a_gradient
from asgd.problems.base import Problem, starting_point
from asgd.problems.make import make_problem
from asgd.rules.make import make_rule
from asgd.rundir.problem_record import check_problem
from asgd.rundir.reader import Run, read_run
from asgd.schedules import batch_schedule, learning_rate_schedule
from asgd.shards import dependence

_TARGET = 0.95  # share of the fall of the loss; the rest is slow and hidden in scatter

_OF_LIMIT = (
    "The limit is the learning rate from which on every run diverges on a quadratic; heavy tail: "
    "between the limit of the mean square and that one, runs converge with rare large excursions."
)
_NO_LIMIT = "No limit of the learning rate is known for this rule: the paths alone judge it."

NamedProgress = Callable[[str, float], None]


@dataclass(frozen=True, repr=False, kw_only=True)
class Plan:
    """Every choice with its predictions.

    Attributes
    ----------
    rows
        In the order of the choices.
    target
        Loss to reach; nan if no choice makes progress.
    updates
        Number of updates planned.
    source
        Where the times of the workers come from.
    cost
        Gradient cost by batch size; None if unknown.
    cores
        Cores of the machine of the run, or of this one.
    best
        Index of the recommendable row that reaches the target first; None if none does.
    covered
        Whether limits of the learning rate are known for the rule.
    effort
        How curvatures and paths were limited, as sentences; "" if they were not.
    """

    rows: list[PlanRow]
    target: float
    updates: int
    source: str
    cost: GradientCost | None
    cores: int
    best: int | None
    covered: bool = True
    effort: str = ""

    def table(self) -> pd.DataFrame:
        """Return one row per choice, with the scalar columns of `PlanRow.to_dict`."""
        rows = [row.to_dict() for row in self.rows]
        left_out = ("law", "update", "loss_mean", "loss_median", "loss_std")
        table = pd.DataFrame(rows).drop(columns=list(left_out))
        return table.assign(best=[number == self.best for number in range(len(rows))])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; numbers can be inf or nan."""
        cost = self.cost
        return {
            "target": self.target,
            "updates": self.updates,
            "times_from": self.source,
            "gradient_seconds": cost and {"fixed": cost.fixed, "per_sample": cost.per_sample},
            "cores": self.cores,
            "effort": self.effort,
            "best": self.best,
            "rows": [row.to_dict() for row in self.rows],
        }

    @property
    def sentence(self) -> str:
        """The answer as a sentence."""
        if self.best is not None:
            row = self.rows[self.best]
            seconds = row.seconds_to_target or 0.0
            return (
                f"Best: {row.choice}: loss {self.target:.4g} after {row.updates_to_target:,} "
                f"updates, {seconds:.3g} s."
            )
        if not any(row.stable for row in self.rows):
            return "No choice is stable: take smaller learning rates or fewer workers."
        if not any(row.recommendable for row in self.rows):
            return (
                "No choice can be recommended: all are too near their limit; take smaller learning "
                "rates or fewer workers."
            )
        return f"No choice reaches loss {self.target:.4g} within {self.updates:,} updates."

    @property
    def note(self) -> str:
        """The basis of the numbers, in a sentence or two."""
        batches = {row.choice.batch_size for row in self.rows}
        cost = "; a gradient takes as long whatever its batch size" if len(batches) > 1 else ""
        cost = f"; {self.cost}" if self.cost else cost
        return (
            f"Times: {self.source}, every further worker with a core of its own{cost}. "
            f"{self._cores_in_words}{self.effort}"
            "Losses: means over simulated paths, medians where the tail is heavy. "
            f"{_OF_LIMIT if self.covered else _NO_LIMIT}"
        )

    @property
    def _cores_in_words(self) -> str:
        """The sentence on choices that need more cores than there are; "" without any."""
        if max(row.choice.workers for row in self.rows) <= self.cores:
            return ""
        return (
            f"There {'is 1 core' if self.cores == 1 else f'are {self.cores} cores'}, and a worker "
            "that computes all the time takes one: more such workers are slower than this table "
            "says. "
        )

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table as text: a row of headings, then one row per choice."""
        rows = [row.cells("*" if i == self.best else "") for i, row in enumerate(self.rows)]
        return [HEADS, *rows]

    def __repr__(self) -> str:
        return f"{self.table().to_string(index=False)}\n{self.sentence}"


def plan(
    source: Run | Configuration,
    *,
    workers: Sequence[int] | None = None,
    learning_rates: Sequence[float] | None = None,
    batch_sizes: Sequence[int] | None = None,
    target: float | None = None,
    updates: int | None = None,
    probe: bool = False,
    seconds: float = SECONDS,
    force: bool = False,
    progress: NamedProgress | None = None,
) -> Plan:
    """Predict every combination of workers, learning rates and batch sizes.

    >>> rows = analysis.plan(run.config, workers=[2, 4], learning_rates=[0.05]).rows
    >>> [row.stable for row in rows]
    [True, True]

    Works for any mode, rule and schedule; a schedule scales with its first value. Batches have to
    be independent draws from all samples.

    Parameters
    ----------
    source
        A configuration, a run, or the path of either; the measured cycles of a run give the speed
        of its workers.
    workers, learning_rates
        Default: half, once and twice the source's value.
    batch_sizes
        Samples per gradient; default the source's value.
    target
        Loss to reach. Default: 95 % of the way down to the lowest loss predicted for the source's
        own choice, or for any choice if that one is unstable.
    updates
        Number of updates to plan; default as in the source.
    probe
        Whether to time the gradient in this process at two batch sizes. Otherwise a gradient takes
        the same time for any batch size, unless the run used several.
    seconds
        Time of the plan where gradients of all samples are costly, as those of networks. Each
        choice then gets as many paths as the time allows, at least a few, and curvatures are
        probed. Elsewhere neither depends on the time.
    force
        Plan even if the problem of a run has changed, see `asgd.rundir.problem_record`.
    progress
        Called with the current choice and the completed share of the work.

    Raises
    ------
    InputError
        A value is invalid, the start is flat, the source is a run whose workers wait, its batches
        are not independent draws, or a few paths of each choice take longer than `seconds`.
    """
    if isinstance(source, str | Path) and Path(source).is_dir():
        source = read_run(source)
    config = source.config if isinstance(source, Run) else as_config(source)
    if feature := not_a_gradient(config):
        raise InputError(
            f"{feature}: expected none for a plan, whose paths push whole gradients; "
            "`asgd simulate` makes local steps and compresses in virtual time"
        )
    choices = choices_of(config, workers, learning_rates, batch_sizes)
    updates = config.run.updates if updates is None else updates
    if not 1 <= updates <= 10**9:
        raise InputError(f"updates = {updates}: expected 1 to 1000000000")
    if target is not None and not math.isfinite(target):
        raise InputError(f"target = {target}: expected a finite loss")
    if not 0.0 < seconds < math.inf:
        raise InputError(f"seconds = {seconds}: expected a finite number > 0")
    if dependent := dependence(config):
        raise InputError(
            f"{dependent}: expected data.shards = 'shared' and data.sampling = 'replacement' for "
            "a plan, which takes every batch for an independent draw from all samples; "
            "asgd simulate draws as a run does"
        )
    problem = make_problem(config)
    if isinstance(source, Run):
        check_problem(source, problem, "plan", force=force)
    initial = starting_point(problem, config.run.seed)
    sizes = [choice.batch_size for choice in choices]
    cost = GradientCost.probe(problem, initial, sizes) if probe else None
    pace_of: PaceOf = (
        MeasuredPace.of(source, cost) if isinstance(source, Run) else ConfiguredPace(config, cost)
    )
    of_own = np.mean(sizes) / config.optimizer.batch_size
    gradients = int(of_own * batch_schedule(config.optimizer).array(updates).sum())
    effort = effort_for(problem, config.run.seed, gradients, len(choices), seconds)
    planner = _Planner(config, problem, initial, updates, pace_of, effort)
    rows = []
    for number, choice in enumerate(choices):
        part = FIRST_SHARE / len(choices)
        share = _shares(progress, str(choice), number * part, part)
        share(0, 1)
        rows.append(planner.row(choice, share))
    if target is None:
        target = _default_target(rows, config)
    rows = [_timed(row, target) for row in rows]
    best = _confirmed(planner, rows, target, progress)
    if progress is not None:
        progress("", 1.0)
    noted = source.environment.get("cores") if isinstance(source, Run) else None
    return Plan(
        rows=rows,
        target=target,
        updates=updates,
        source=pace_of.source,
        cost=pace_of.cost,
        cores=noted if isinstance(noted, int) else len(os.sched_getaffinity(0)),
        best=best,
        covered=linear_rule(planner.rule, 0.0) is not None,
        effort=effort.note,
    )


class _Planner:
    """Makes the rows of choices and simulates more paths of them."""

    def __init__(
        self,
        config: RunConfig,
        problem: Problem,
        initial: Array,
        updates: int,
        pace_of: PaceOf,
        effort: Effort,
    ) -> None:
        self._config, self._problem, self._initial = config, problem, initial
        self._updates, self._pace_of, self._effort = updates, pace_of, effort
        self.rule = make_rule(config)
        self._paces: dict[tuple[int, int], Pace] = {}
        self._known: dict[tuple[int, bool], StabilityLimits | None] = {}
        self._first_loss = float(problem.loss(initial))
        self._curvature = effort.curvature(initial)
        if not problem.gradient(initial).any() and not self._curvature:
            raise InputError(
                "problem.initial: expected a point with a slope or a curvature, because learning "
                "rates cannot be judged where both are 0"
            )

    def row(self, choice: Choice, progress: Share) -> PlanRow:
        """Return the row of a choice from its first paths."""
        pace = self._pace(choice)
        paths = self._paths(choice, pace, "first", progress)
        assert paths is not None
        return self._judged(choice, pace, paths)

    def more(self, row: PlanRow, progress: Share) -> PlanRow:
        """Return a row with more paths, or the same row if time is up."""
        paths = self._paths(row.choice, row.pace, "more", progress)
        return row if paths is None else self._judged(row.choice, row.pace, row.paths.joined(paths))

    def _pace(self, choice: Choice) -> Pace:
        # without a cost by batch size the pace is the same for all batches
        key = choice.workers, choice.batch_size if self._pace_of.cost else 0
        if key not in self._paces:
            pace = self._pace_of(choice.workers, choice.batch_size)
            self._paces[key] = pace
        return self._paces[key]

    def _paths(
        self, choice: Choice, pace: Pace, stage: Stage, progress: Share
    ) -> PlannedPaths | None:
        optimizer = scaled(self._config.optimizer, choice)
        batch = batch_schedule(optimizer).array(self._updates).astype(np.int64) * pace.gradients
        setting = PathSetting(
            problem=self._problem,
            initial=self._initial,
            rule=self.rule,
            learning_rate=learning_rate_schedule(optimizer).array(self._updates),
            batch_size=batch,
            turns=pace.turns,
            record=self._effort.record(batch),
            largest_loss=self._config.run.divergence_factor * max(1.0, abs(self._first_loss)),
            dtype=path_dtype(self._problem),
        )
        return self._effort.paths(setting, choice.workers, stage, str(choice), progress)

    def _judged(self, choice: Choice, pace: Pace, paths: PlannedPaths) -> PlanRow:
        rates = learning_rate_schedule(scaled(self._config.optimizer, choice))
        begin = end = self._curvature, rates(0)
        kept = np.flatnonzero(~paths.diverged)
        if len(kept) and np.isfinite(paths.loss[-1, kept]).all():
            # a median path, because the mean of points in different valleys lies in none
            typical = kept[np.argsort(paths.loss[-1, kept])[len(kept) // 2]]
            point = paths.final[typical].astype(float)
            curvature = self._effort.curvature(point)
            end = curvature, rates(self._updates - 1)
        limits = self._limits(choice, pace, mean_square=False)
        row = PlanRow(choice, pace, paths, _at(limits, *begin), _at(limits, *end))
        if row.of_limit < CLEARLY_STABLE:
            return row
        limits = self._limits(choice, pace, mean_square=True)
        return replace(row, start=_at(limits, *begin), end=_at(limits, *end))

    def _limits(self, choice: Choice, pace: Pace, *, mean_square: bool) -> StabilityLimits | None:
        key = id(pace), mean_square
        if key not in self._known:
            limits = pace.limits(self.rule, choice.workers, mean_square)
            self._known[key] = limits
        return self._known[key]


def _at(limits: StabilityLimits | None, curvature: float, learning_rate: float) -> PointLimits:
    """Compare a learning rate with the limits at a point, given those for curvature one."""
    there = limits.at_curvature(curvature) if limits and curvature > 0 else None
    return PointLimits(learning_rate, there)


def scaled(optimizer: OptimizerConfig, choice: Choice) -> OptimizerConfig:
    """Return the optimizer of a choice; schedules keep their ratios to the first value."""
    rates, batches = optimizer.learning_rate_schedule, optimizer.batch_schedule
    rate = choice.learning_rate / optimizer.learning_rate
    batch = choice.batch_size / optimizer.batch_size
    sizes = [max(1, round(batch * size)) for size in batches.values]
    return msgspec.structs.replace(
        optimizer,
        learning_rate=choice.learning_rate,
        batch_size=choice.batch_size,
        learning_rate_schedule=msgspec.structs.replace(
            rates, values=[rate * value for value in rates.values]
        ),
        batch_schedule=msgspec.structs.replace(batches, values=sizes),
    )


def _shares(progress: NamedProgress | None, name: str, begun: float, part: float) -> Share:
    """Return a callback that maps the progress of one choice to the total progress."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(name, begun + part * done / total)

    return report


def _default_target(rows: list[PlanRow], config: RunConfig) -> float:
    optimizer = config.optimizer
    own = Choice(config.cluster.workers, optimizer.learning_rate, optimizer.batch_size)
    reached = [row.lowest for row in rows if row.lowest is not None and row.choice == own]
    reached = reached or [row.lowest for row in rows if row.lowest is not None]
    if not reached:
        return math.nan
    start, lowest = float(rows[0].paths.loss[0, 0]), min(reached)
    return lowest + (1.0 - _TARGET) * (start - lowest)


def _timed(row: PlanRow, target: float) -> PlanRow:
    updates, seconds = row.at_target(target)
    return replace(row, updates_to_target=updates, seconds_to_target=seconds)


def _confirmed(
    planner: _Planner, rows: list[PlanRow], target: float, progress: NamedProgress | None
) -> int | None:
    """Give leading rows many paths, in place, until the leader has them; return its index."""
    seen: set[int] = set()
    while (leading := _leading(rows)) is not None and leading not in seen:
        left = (1.0 - FIRST_SHARE) * 0.5 ** len(seen)  # the number of rounds is unknown
        share = _shares(progress, str(rows[leading].choice), 1.0 - left, 0.5 * left)
        seen.add(leading)
        rows[leading] = _timed(planner.more(rows[leading], share), target)
    if leading is None or rows[leading].seconds_to_target is None:
        return None
    return leading


def _leading(rows: list[PlanRow]) -> int | None:
    """Return the row that reaches the target first, else ends lowest; None if none qualifies."""
    able = [number for number, row in enumerate(rows) if row.recommendable]
    if not able:
        return None

    def order(number: int) -> tuple[float, float]:
        row = rows[number]
        seconds = math.inf if row.seconds_to_target is None else row.seconds_to_target
        return seconds, float(row.mean[-1])

    return min(able, key=order)
