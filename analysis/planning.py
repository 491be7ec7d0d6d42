"""What if: more workers, another learning rate, another batch size? (ours).

For every combination the staleness law and the speed follow from the times of the workers
(`analysis.pace`), the largest stable learning rate from that law (`analysis.run_stability`), and
the loss curve from exact moments where the gradients are linear, otherwise from one mean path
with linear noise around it, (F1). Nothing is run. The time of a gradient is taken not to depend
on its batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.choices import Choice, check_plannable, choices_of
from analysis.linear_noise import linear_noise
from analysis.loss_curve import LossCurve
from analysis.model import LAW
from analysis.pace import ConfiguredPace, MeasuredPace, Pace, PaceOf
from analysis.run_stability import (
    RunStability,
    grows,
    leading_curvatures,
    outgrows,
    run_stability,
)
from analysis.setting import Setting
from analysis.verdict import in_words
from asgd.config import RunConfig
from asgd.errors import InputError
from asgd.problems import make_problem
from asgd.problems.base import Array, Problem
from asgd.staleness import StalenessLaw
from asgd.streams import stream
from asgd.trace import Run

_POINTS = 400  # of a predicted curve
_TARGET = 0.95  # of the way down: what is left at the end is slow, and hidden in scatter
_HEADS = (
    *("", "workers", "rate", "batch", "staleness", "law", "updates/s"),
    *("of limit", "updates", "seconds", "final loss", ""),
)
_NEAR = 1.3  # below this distance to the limit linear noise is rough

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class PlanRow:
    """What is expected of one choice.

    Attributes
    ----------
    choice
        Workers, learning rate, batch size.
    law
        Staleness of an update.
    updates_per_second
        In the long run.
    largest_stable
        Largest stable learning rate where it is smallest: at the start or at the predicted end;
        see `analysis.run_stability` for what it counts.
    remark
        "" or why the row is to be read with care: "unstable", "near the limit", ...
    curve
        Predicted loss; None where unstable.
    updates_to_target, seconds_to_target
        Until the predicted mean loss is at the target; None where it does not get there.
    """

    choice: Choice
    law: StalenessLaw
    updates_per_second: float
    largest_stable: float
    remark: str
    curve: LossCurve | None
    updates_to_target: int | None = None
    seconds_to_target: float | None = None

    @property
    def stable(self) -> bool:
        """Whether mean and noise stay bounded, as far as the row looks ahead."""
        return self.curve is not None

    @property
    def of_limit(self) -> float:
        """The learning rate over the largest stable one."""
        return self.choice.learning_rate / self.largest_stable

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; numbers may be infinite."""
        curve = self.curve
        return {
            "workers": self.choice.workers,
            "learning_rate": self.choice.learning_rate,
            "batch_size": self.choice.batch_size,
            "mean_staleness": self.law.mean(),
            "law": self.law.to_dict(),
            "updates_per_second": self.updates_per_second,
            "largest_stable_learning_rate": self.largest_stable,
            "of_limit": self.of_limit,
            "stable": self.stable,
            "remark": self.remark,
            "updates_to_target": self.updates_to_target,
            "seconds_to_target": self.seconds_to_target,
            "final_loss": None if curve is None else float(curve.mean[-1]),
            "update": [] if curve is None else curve.update.tolist(),
            "loss_mean": [] if curve is None else curve.mean.tolist(),
            "loss_std": [] if curve is None else curve.std.tolist(),
        }


@dataclass(frozen=True, repr=False)
class Plan:
    """Every choice with what is expected of it.

    Attributes
    ----------
    rows
        In the order of the choices.
    target
        Loss to reach; nan where no choice gets anywhere.
    updates
        Updates looked ahead.
    source
        Where the times of the workers are from.
    best
        Position of the stable row that is at the target first; None if none gets there.
    """

    rows: list[PlanRow]
    target: float
    updates: int
    source: str
    best: int | None

    def table(self) -> pd.DataFrame:
        """Return one row per choice with the columns of `PlanRow.to_dict` that are one number."""
        rows = [row.to_dict() for row in self.rows]
        left_out = ("law", "update", "loss_mean", "loss_std")
        table = pd.DataFrame(rows).drop(columns=list(left_out))
        return table.assign(best=[number == self.best for number in range(len(rows))])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; numbers may be infinite or not a number."""
        return {
            "target": self.target,
            "updates": self.updates,
            "times_from": self.source,
            "best": self.best,
            "rows": [row.to_dict() for row in self.rows],
        }

    @property
    def sentence(self) -> str:
        """The answer in a sentence."""
        if self.best is None:
            stable = any(row.stable for row in self.rows)
            return (
                f"No choice reaches loss {self.target:.4g} within {self.updates:,} updates."
                if stable
                else "No choice is stable: take smaller learning rates or fewer workers."
            )
        row = self.rows[self.best]
        seconds = row.seconds_to_target or 0.0
        return (
            f"Best: {row.choice}: loss {self.target:.4g} after {row.updates_to_target:,} updates, "
            f"{seconds:.3g} s."
        )

    @property
    def note(self) -> str:
        """What the numbers rest on, in a sentence."""
        batches = {row.choice.batch_size for row in self.rows}
        free = "; a gradient takes as long whatever its batch size" if len(batches) > 1 else ""
        return (
            f"Times: {self.source}, every further worker with a core of its own{free}. "
            "The limit is that of the mean; noise is judged by the predicted curve."
        )

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table for people: a row of heads, then one of texts for each choice."""
        rows = [
            _cells(row, "*" if number == self.best else "") for number, row in enumerate(self.rows)
        ]
        return [_HEADS, *rows]

    def __repr__(self) -> str:
        return f"{self.table().to_string(index=False)}\n{self.sentence}"


def _cells(row: PlanRow, mark: str) -> tuple[str, ...]:
    missing = "" if row.curve is None else "not reached"
    updates, seconds = row.updates_to_target, row.seconds_to_target
    return (
        mark,
        str(row.choice.workers),
        f"{row.choice.learning_rate:g}",
        str(row.choice.batch_size),
        f"{row.law.mean():.2f}",
        "queue" if row.law.name == "empirical" else in_words(row.law).removesuffix(" law"),
        f"{row.updates_per_second:,.4g}",
        f"{100 * row.of_limit:.3g} %",
        missing if updates is None else f"{updates:,}",
        "" if seconds is None else f"{seconds:.3g}",
        "" if row.curve is None else f"{row.curve.mean[-1]:.4g}",
        row.remark,
    )


def plan(
    source: RunConfig | Run,
    *,
    workers: Sequence[int] | None = None,
    learning_rates: Sequence[float] | None = None,
    batch_sizes: Sequence[int] | None = None,
    target: float | None = None,
    updates: int | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Predict every combination of workers, learning rates and batch sizes.

    Parameters
    ----------
    source
        A configuration, or a run whose measured cycles say how fast its workers are.
    workers, learning_rates
        By default half, once and twice the source's own.
    batch_sizes
        In samples per gradient; by default the source's own.
    target
        Loss to reach. By default 95 % of the way down to the lowest loss predicted for the
        source's own choice or, where that is not among the stable ones, for any.
    updates
        How far to look ahead; by default as far as the source goes.
    progress
        Called with the choice at work and the share of the whole that is done.

    Raises
    ------
    InputError
        A value cannot be used, the start is flat, or the source has what no plan is made for: a
        rule other than sgd, clipping, schedules, mode bounded, or a run that waits for workers.
    """
    config = source.config if isinstance(source, Run) else source
    check_plannable(config)
    pace_of: PaceOf = MeasuredPace.of(source) if isinstance(source, Run) else ConfiguredPace(config)
    choices = choices_of(config, workers, learning_rates, batch_sizes)
    updates = config.run.updates if updates is None else updates
    if not 1 <= updates <= 10**9:
        raise InputError(f"updates = {updates}: expected 1 to 1000000000")
    if target is not None and not math.isfinite(target):
        raise InputError(f"target = {target}: expected a finite loss")
    problem = make_problem(config)
    initial = problem.initial_point(stream(config.run.seed, "initial"))
    _check_start(problem, initial)
    paces: dict[int, Pace] = {}
    rows = []
    for number, choice in enumerate(choices):
        share = _shares(progress, str(choice), number, len(choices))
        share(0, 1)
        pace = paces.get(choice.workers) or pace_of(choice.workers)
        paces[choice.workers] = pace
        setting = _setting(problem, initial, choice, pace, updates)
        rows.append(_row(choice, pace, setting, config.run.seed, share))
    if target is None:
        target = _default_target(rows, config)
    rows = [_timed(row, target) for row in rows]
    return Plan(rows, target, updates, pace_of.source, _best(rows))


def _check_start(problem: Problem, initial: Array) -> None:
    """Refuse a start around which the linear theory sees nothing, whatever the learning rate."""
    if not problem.gradient(initial).any() and not leading_curvatures(problem, initial).any():
        raise InputError(
            "problem.initial: slope and curvature are 0 there, so nothing can be told of any "
            "learning rate; accepted: another starting point"
        )


def _setting(problem: Problem, initial: Array, choice: Choice, pace: Pace, updates: int) -> Setting:
    return Setting(
        problem=problem,
        learning_rate=choice.learning_rate,
        batch_size=choice.batch_size * pace.gradients,
        initial=initial,
        record=np.unique(np.linspace(0, updates, _POINTS + 1).round().astype(np.int64)),
        law=pace.law,
        closure=pace.closure,
        workers=choice.workers,
    )


def _row(
    choice: Choice,
    pace: Pace,
    setting: Setting,
    seed: int,
    share: Callable[[int, int], None],
) -> PlanRow:
    stability = run_stability(setting)
    curve, remark = None, "unstable"
    if stability.factor >= 1.0:
        curve = _curve(setting, seed, share)
        # The curvature where the path ends may be larger than where it began.
        end = curve.end if np.all(np.isfinite(curve.end)) else None
        if end is not None:
            at_end = run_stability(replace(setting, initial=end)).start
            stability = RunStability(stability.start, at_end)
        if curve.unstable_from is not None or not np.all(np.isfinite(curve.mean)):
            curve, remark = None, "noise outgrows the theory"
        elif outgrows(curve.mean):
            curve, remark = None, "unstable: noise outgrows"
        elif stability.factor < 1.0:
            curve, remark = None, "unstable at the end"
        else:
            exact = LAW.has_exact(setting)
            remark = "near the limit" if stability.factor < _NEAR and not exact else ""
            remark = "growing at the end" if grows(curve.mean) else remark
    return PlanRow(choice, pace.law, pace.updates_per_second, stability.limit, remark, curve)


def _curve(setting: Setting, seed: int, share: Callable[[int, int], None]) -> LossCurve:
    if LAW.has_exact(setting):
        return LAW.exact(setting, seed)
    return linear_noise(
        setting.problem,
        float(setting.learning_rate),
        setting.law,
        seed,
        batch_size=int(setting.batch_size),
        initial=setting.initial,
        record=setting.record,
        progress=share,
    )


def _shares(
    progress: Progress | None, name: str, number: int, choices: int
) -> Callable[[int, int], None]:
    """Return what turns the share of one choice into that of the whole."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(name, (number + done / total) / choices)

    return report


def _default_target(rows: list[PlanRow], config: RunConfig) -> float:
    optimizer = config.optimizer
    own = Choice(config.cluster.workers, optimizer.learning_rate, optimizer.batch_size)
    curves = [row.curve for row in rows if row.curve is not None and row.choice == own]
    curves = curves or [row.curve for row in rows if row.curve is not None]
    if not curves:
        return math.nan
    start = float(curves[0].mean[0])
    lowest = min(float(curve.mean.min()) for curve in curves)
    return lowest + (1.0 - _TARGET) * (start - lowest)


def _timed(row: PlanRow, target: float) -> PlanRow:
    if row.curve is None:
        return row
    updates = updates_to(row.curve.update, row.curve.mean, target)
    if updates is None:
        return row
    seconds = updates / row.updates_per_second
    return replace(row, updates_to_target=updates, seconds_to_target=seconds)


def updates_to(update: npt.NDArray[np.int64], loss: Array, target: float) -> int | None:
    """Return the first update at which a curve is at or below the target, None if it never is.

    Between two recorded updates the curve is taken to be straight.

    Parameters
    ----------
    update, loss
        Shape (m,), ascending in `update`.
    """
    below = np.flatnonzero(loss <= target)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return int(update[0])
    share = (loss[i - 1] - target) / (loss[i - 1] - loss[i])
    return int(np.ceil(update[i - 1] + share * (update[i] - update[i - 1])))


def _best(rows: list[PlanRow]) -> int | None:
    times = [math.inf if row.seconds_to_target is None else row.seconds_to_target for row in rows]
    first = times.index(min(times))
    return first if math.isfinite(times[first]) else None
