"""The input of a model: a `Setting`, and a `RunSetting` with the measurements of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from analysis.exact.moments import Closure
from analysis.models.descent import Descent
from analysis.models.push_replay import RecordedPushes
from analysis.models.recorded_batches import RecordedBatches
from analysis.models.recorded_turns import RecordedTurns, has_spells
from analysis.profile.fit import StalenessFit
from analysis.profile.repeats import as_runs
from analysis.profile.stragglers import taking_part
from asgd.arrays import Array, Integers
from asgd.config.tables import RunConfig
from asgd.errors import InputError
from asgd.local_steps import PushRule, not_a_gradient
from asgd.problems.base import Problem, starting_point
from asgd.problems.linear import LinearModel
from asgd.problems.make import make_problem
from asgd.rules.base import Rule
from asgd.rules.make import make_rule
from asgd.rundir.events import team_sizes
from asgd.rundir.reader import Run
from asgd.schedules import learning_rate_schedule
from asgd.shards import dependence
from asgd.simulation.replay import Gradients
from asgd.staleness.geometric import Geometric
from asgd.staleness.law import StalenessLaw
from asgd.staleness.values import staleness_of
from asgd.streams import stream

# Above this dimension linear models use single precision: its rounding changes a loss by about
# 1e-7 of its value, the scatter of a hundred paths by 1e-3 and more.
_SINGLE_DIM = 256

# A pool may have another size at this share of the updates, and may miss the mean staleness of a
# server by this share of P, because workers are lost and come back.
_CHANGED_SHARE = 0.1
_OFF_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The input of every model.

    Attributes
    ----------
    problem
        The problem.
    initial
        x_0, shape (d,); of k repeats that start at different points, shape (k, d).
    learning_rate, batch_size
        A number, or under a schedule an array with one per update, shape (updates,).
    record
        Updates to predict, ascending, shape (m,); by default only the start.
    law
        The staleness law.
    closure
        How the lags of different updates depend on each other; "pool" for a server.
    workers
        P, the number of workers at most updates.
    turns
        Recorded turns to resample instead of using the law, (P3); None if the law suffices, (P2),
        or snapshots are not used exactly once.
    rule
        The update rule, None for plain SGD on gradients.
    pushes
        The pushes of workers that make local steps or compress; None if they push gradients.
    replay_only
        Whether the server discarded gradients, or averaged gradients read at different versions.
        Then neither law nor turns describe its updates, and only a replay is a model.
    dependence
        The configuration key by which batches are not independent draws from all samples, or None.
    """

    problem: Problem
    initial: Array
    learning_rate: float | Array
    batch_size: int | Integers
    record: Integers = field(default_factory=lambda: np.zeros(1, np.int64))
    law: StalenessLaw
    closure: Closure
    workers: int
    turns: RecordedTurns | None = None
    rule: Rule | None = None
    pushes: RecordedPushes | None = None
    replay_only: bool = False
    dependence: str | None = None

    @property
    def plain(self) -> bool:
        """Whether the rule is plain SGD and batches are independent draws from all samples."""
        return self.rule is None and self.dependence is None

    @property
    def starts(self) -> int:
        """Number of points where paths start."""
        return len(np.atleast_2d(self.initial))

    @property
    def steady(self) -> bool:
        """Whether learning rate and batch size are constant."""
        return np.ndim(self.learning_rate) == 0 and np.ndim(self.batch_size) == 0

    @property
    def descent(self) -> Descent:
        """The arguments that the paths of every model share."""
        return Descent.of(self.problem, self.learning_rate, self.batch_size, self.updates)

    @property
    def dtype(self) -> npt.DTypeLike:
        """The precision of paths."""
        return path_dtype(self.problem)

    @property
    def updates(self) -> int:
        """The last update to predict."""
        return int(self.record[-1])

    @property
    def pool_law(self) -> StalenessLaw:
        """The law under the pool closure; for a geometric law mu = 1 - 1/P."""
        return Geometric(1 - 1 / self.workers) if isinstance(self.law, Geometric) else self.law


@dataclass(frozen=True, kw_only=True)
class RunSetting(Setting):
    """The setting of a run or its repeats, with their measurements except the losses.

    Attributes
    ----------
    staleness
        Measured tau_0, tau_1, ... of each run, shape (m,), or (m, each) if an update is the mean of
        gradients read at different versions; `batch_size` is then that of each gradient.
    mu
        Parameter of the geometric fit.
    synchronous
        Whether every update is the mean of all workers' gradients; batch_size is then their total.
    batches
        The batches of each run, if they are not independent draws from all samples.
    """

    staleness: tuple[Integers, ...]
    mu: float
    synchronous: bool = False
    batches: tuple[RecordedBatches, ...] | None = None

    @classmethod
    def of(
        cls, runs: Run | Sequence[Run], fit: StalenessFit, problem: Problem | None = None
    ) -> RunSetting:
        """Take the setting from a run, or from repeats: staleness and x_0 of each.

        All else is of the first, because repeats differ only in the seed.

        The problem is made from the configuration unless it is given.

        Raises
        ------
        InputError
            Updates are means of different numbers of gradients, or of batches, read at different
            versions.
        """
        runs = whole(as_runs(runs))
        run, updates = runs[0], last_update(runs[0])
        config, optimizer = run.config, run.config.optimizer
        problem = make_problem(config) if problem is None else problem
        learning_rate, batch_size = optimizer.learning_rate, optimizer.batch_size
        varying = learning_rate_schedule(optimizer).array(updates)
        waits = config.cluster.mode != "async"
        synchronous = waits and not run.trace["staleness"].any()
        mixed = [one for one in runs if _mixes_reads(one)]
        chooses = not synchronous and any(not one.discarded.empty for one in runs)
        replay_only = bool(mixed) or chooses
        closure, turns = "iid" if waits or replay_only else closure_of(run), None
        dependent = dependence(config)
        long = [one for one in runs if len(one.trace) >= updates]
        if closure == "pool" and not isinstance(fit.recommended, Geometric):
            turns = _turns(runs, fit)
        return cls(
            problem=problem,
            learning_rate=varying if optimizer.learning_rate_schedule.at else learning_rate,
            batch_size=_batch_sizes(run, updates)
            if (optimizer.batch_schedule.at or waits) and not mixed
            else batch_size,
            initial=_starts(problem, long or runs),
            record=run.loss["update"].to_numpy(),
            staleness=tuple(
                _staleness_of_means(one, dependent) if mixed else _staleness(one) for one in long
            ),
            mu=fit.mu,
            law=fit.recommended,
            closure=closure,
            workers=team_of(run) - len(fit.left_out),
            turns=turns,
            rule=rule_of(config),
            pushes=recorded_pushes(long),
            synchronous=config.cluster.mode == "sync" or synchronous,
            replay_only=replay_only,
            dependence=dependent,
            batches=tuple(RecordedBatches.of(one, problem) for one in long) if dependent else None,
        )


def _starts(problem: Problem, runs: Sequence[Run]) -> Array:
    """Return x_0 of each run, shape (k, d), or the common one, shape (d,)."""
    points = np.stack([starting_point(problem, run.config.run.seed) for run in runs])
    return points[0] if np.all(points == points[0]) else points


def path_dtype(problem: Problem) -> npt.DTypeLike:
    """Return the precision of paths: the problem's, float32 for a wide linear model too."""
    wide = isinstance(problem, LinearModel) and problem.dim > _SINGLE_DIM
    return np.float32 if wide else problem.dtype


def whole(runs: Sequence[Run]) -> list[Run]:
    """Return the runs whose loss was evaluated up to the last update of the longest one."""
    ends = [last_update(run) for run in runs]
    return [run for run, end in zip(runs, ends, strict=True) if end == max(ends)]


def last_update(run: Run) -> int:
    """Return the update of the last evaluation of the loss, -1 if there was none."""
    return -1 if run.loss.empty else int(run.loss["update"].iloc[-1])


def rule_of(config: RunConfig) -> Rule | None:
    """Return the update rule; None for plain SGD on gradients, which the theory describes."""
    optimizer = config.optimizer
    plain = optimizer.rule == "sgd" and optimizer.clip_norm is None
    return None if plain and not_a_gradient(config) is None else make_rule(config)


def recorded_pushes(runs: Sequence[Run]) -> RecordedPushes | None:
    """Return the pushes of runs with local steps or a compression, else None."""
    config = runs[0].config
    feature = not_a_gradient(config)
    if feature is None:
        return None
    return RecordedPushes(partial(PushRule.of, config), tuple(map(Gradients.of, runs)), feature)


def _staleness(run: Run) -> Integers:
    return staleness_of(run.trace["update"].to_numpy(), run.trace["read_version"].to_numpy())


def _mixes_reads(run: Run) -> bool:
    """Whether an update is the mean of gradients that were read at different versions."""
    if run.config.cluster.mode == "bounded" or run.members.empty:
        return False
    version = run.members.groupby("update")["read_version"]
    return bool((version.min() != version.max()).any())


def _staleness_of_means(run: Run, dependent: str | None) -> Integers:
    """Return the staleness of the gradients of each update, shape (m, each).

    Batch sizes may differ only if the replay draws batches as the run did.
    """
    members, key = run.members, "cluster.gradients_per_update"
    each = run.config.cluster.gradients_per_update or 1
    if len(members) != each * len(run.trace) or members.groupby("update").size().ne(each).any():
        raise InputError(
            f"{run.path}: {key} = {each}: expected as many gradients in every update, but workers "
            "were lost; no model covers that with gradients read at different versions"
        )
    if dependent is None and members["batch_size"].nunique() > 1:
        raise InputError(
            f"{run.path}: optimizer.batch_schedule: expected none with {key} = {each}; no model "
            "takes means of different batches, read at different versions"
        )
    staleness = staleness_of(members["update"].to_numpy(), members["read_version"].to_numpy())
    return staleness.reshape(-1, each)


def _batch_sizes(run: Run, updates: int) -> int | Integers:
    """Return the samples of each update, or their number if it is constant."""
    sizes = run.trace["batch_size"].to_numpy().astype(np.int64)[:updates]
    return int(sizes[0]) if np.all(sizes == sizes[0]) else sizes


def _turns(runs: Sequence[Run], fit: StalenessFit) -> RecordedTurns | None:
    traces = [one.trace[taking_part(one.trace["worker"].to_numpy(), fit.left_out)] for one in runs]
    recorded = RecordedTurns.of([trace["worker"].to_numpy() for trace in traces])
    staleness = [trace["staleness"].to_numpy() for trace in traces]
    rng = stream(runs[0].config.run.seed, "spells")
    # new workers replaced those that left
    if recorded.workers != team_of(runs[0]) - len(fit.left_out):
        return None
    return recorded if has_spells(staleness, recorded, fit.recommended, rng) else None


def team_of(run: Run) -> int:
    """Return the number of workers at most updates."""
    return int(np.bincount(_team_sizes(run)).argmax())


def _team_sizes(run: Run) -> Integers:
    return team_sizes(run.events, run.config.cluster.workers, max(len(run.trace), 1))


def closure_of(run: Run) -> Closure:
    """Return "pool" if the run used each snapshot of one team once, as a server does, else "iid".

    A pool has three properties. Its size hardly changes. All workers read version 0, and every
    later version is read by one worker, except for a few by workers that joined late or again;
    independent lags that vary read at least a quarter of the versions twice or more. And the mean
    staleness matches: an update makes P - 1 snapshots one older and replaces one, so the staleness
    of N updates and the ages of the snapshots held at the end sum to (P - 1) N. Independent
    constant lags read no version twice but can have any mean.
    """
    trace, updates = run.trace, len(run.trace)
    sizes, workers = _team_sizes(run), team_of(run)
    if np.mean(sizes != workers) > _CHANGED_SHARE:
        return "iid"
    read_version = trace["read_version"]
    twice = int(read_version[read_version > 0].duplicated().sum())
    if twice > max(workers, updates // 20):
        return "iid"
    if not updates:
        return "pool"
    staleness = trace["update"].to_numpy() - read_version.to_numpy()
    # workers that left hold nothing
    last = trace.groupby("worker")["update"].max().nlargest(workers).to_numpy()
    held = int(np.sum(updates - 1 - last)) + updates * max(workers - len(last), 0)
    off = abs((staleness.sum() + held) / updates - (sizes.mean() - 1.0))
    allowed = max(4.0 * staleness.std() / np.sqrt(updates), _OFF_SHARE * workers)
    return "iid" if off > allowed else "pool"
