"""Advice for runs that diverged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from analysis.exact.linear_rules import LinearRule, linear_rule
from analysis.exact.stability import most_workers
from analysis.prediction.run_stability import PointStability, limits_of, run_stability
from analysis.prediction.setting import Setting, closure_of, recorded_pushes, rule_of
from analysis.profile.dependence import start_up
from asgd.divergence import DIVERGED
from asgd.errors import AsgdError, DivergedError
from asgd.problems.base import starting_point
from asgd.problems.make import make_problem
from asgd.rundir.reader import Run, read_run
from asgd.schedules import learning_rate_schedule
from asgd.shards import dependence
from asgd.staleness.empirical import Empirical
from asgd.staleness.values import staleness_of


def diverged(run: Run) -> bool:
    """Return whether a run ended because its loss diverged."""
    return (run.failure or "").startswith(DIVERGED)


def advice_on_divergence(run: Run) -> str | None:
    """Return the largest stable learning rate of a diverged run, and other changes.

    Each change alone makes the run stable, provided curvature and noise stay the same. The limits
    are those of its rule along its own turns, with the curvature at the starting point. None if no
    update was recorded or no curvature is positive there. No limits are known for some rules.
    """
    if run.trace.empty:
        return None
    setting = _setting(run)
    stability = run_stability(setting).start
    if not stability.covered:
        whose = "for the policy of its server" if setting.replay_only else "for its rule"
        if setting.pushes is not None:
            whose = f"for {setting.pushes.feature}"
        if stability.dependence:
            whose = f"with {stability.dependence}"
        return f"no limits are known {whose}: halve the learning rate until it converges"
    if stability.limits is None:
        return None
    rule = f" and its momentum of {stability.momentum:g}" if stability.momentum else ""
    measured = f"with the staleness it measured{rule}"
    limit, sure = f"{stability.limit:.3g}", f"{stability.almost_sure:.3g}"
    if stability.verdict == "stable":
        return (
            f"where it started, learning rates up to {limit} are stable {measured}: the curvature "
            "or the noise grew on the way; halve the learning rate until it converges"
        )
    advice = (
        f"{measured}, the largest stable learning rate is {limit}, and single runs diverge from "
        f"{sure} on: take a smaller one"
    )
    others = "".join(f", or {change}" for change in _other_changes(setting, stability))
    if stability.additive_noise:
        return f"{advice}{others}"
    batch = run.config.optimizer.batch_size
    return (
        f"{advice} and larger batches{others}; these limits leave out the gradient noise of "
        f"batches of {batch}, which lowers them: `asgd plan` simulates it"
    )


def _other_changes(setting: Setting, point: PointStability) -> list[str]:
    """Return the other changes that alone make the run stable at its learning rate, in words."""
    rate, curvature, found = point.learning_rate, point.curvature[0], []
    if point.momentum:
        limits = limits_of(setting, LinearRule()).at_curvature(curvature)
        if limits.classify(rate) == "stable":
            plain = limits.mean_square or limits.almost_sure
            found.append(f"no momentum (the largest is then {plain.value:.3g})")
    rule = linear_rule(setting.rule, setting.law.mean())
    if rule is not None and not rule.staleness_aware:
        workers = most_workers(rate * curvature, point.momentum, setting.workers)
        if workers:
            found.append(at_most(workers))
    return found


def at_most(workers: int) -> str:
    """Return an upper bound on the number of workers in words."""
    return "one worker" if workers == 1 else f"at most {workers} workers"


def _setting(run: Run) -> Setting:
    """Return the setting of a run that may be too short for a fit."""
    trace, optimizer = run.trace, run.config.optimizer
    staleness = staleness_of(trace["update"].to_numpy(), trace["read_version"].to_numpy())
    problem = make_problem(run.config)
    several = run.config.cluster.gradients_per_update is not None
    return Setting(
        problem=problem,
        learning_rate=learning_rate_schedule(optimizer).array(len(trace)),
        batch_size=optimizer.batch_size,
        initial=starting_point(problem, run.config.run.seed),
        law=Empirical.from_sample(staleness[start_up(staleness) :]),
        closure=closure_of(run),
        workers=run.config.cluster.workers,
        rule=rule_of(run.config),
        pushes=recorded_pushes([run]),
        replay_only=bool(staleness.any()) and (several or not run.discarded.empty),
        dependence=dependence(run.config),
    )


def advised(error: DivergedError) -> str:
    """Return the error message of a diverged run, with advice if available."""
    advice = None
    with suppress(AsgdError):  # show the run's own error, not one of the advice
        advice = advice_on_divergence(read_run(error.run)) if error.run else None
    return f"{error}; {advice}" if advice else str(error)


def why_not_predicted(error: AsgdError, runs: Sequence[Run]) -> str:
    """Return why runs have no prediction, with advice if one of them diverged."""
    advice = [advice_on_divergence(run) for run in runs if diverged(run)]
    return "; ".join([str(error), *(text for text in advice[:1] if text)])
