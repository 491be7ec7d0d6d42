"""What to tell whoever made a run that diverged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from analysis.prediction.run_stability import limits_of, run_stability
from analysis.prediction.setting import Setting, closure_of
from analysis.profile.dependence import start_up
from asgd.divergence import DIVERGED
from asgd.errors import AsgdError, DivergedError
from asgd.problems import make_problem
from asgd.problems.base import starting_point
from asgd.rules import make_rule
from asgd.rundir.reader import Run, read_run
from asgd.schedules import learning_rate_schedule
from asgd.staleness import Empirical, staleness_of


def diverged(run: Run) -> bool:
    """Return whether a run ended because its loss left every bound."""
    return (run.failure or "").startswith(DIVERGED)


def advice_on_divergence(run: Run) -> str | None:
    """Return up to which learning rate a run would have been stable and what to change, in words.

    The limits are those of its rule along its own turns; the curvature is that of the starting
    point. None where no update was recorded, or no curvature is positive there.
    """
    if run.trace.empty:
        return None
    setting = _setting(run)
    stability = run_stability(setting).start
    if stability.limits is None:
        return None
    momentum = stability.momentum
    rule = f" and its momentum of {momentum:g}" if momentum else ""
    limit, sure = f"{stability.limit:.2g}", f"{stability.almost_sure:.2g}"
    if stability.verdict == "stable":
        return (
            f"where it started, learning rates up to {limit} are stable with the staleness it "
            f"measured{rule}: what grew is the curvature or the noise; take a smaller learning "
            "rate or larger batches"
        )
    less = f"{_without_momentum(setting, stability.curvature[0])}, " if momentum else ""
    noise = "" if stability.additive_noise else "; small batches lower it further"
    return (
        f"with the staleness it measured{rule}, the largest stable learning rate is {limit}, and "
        f"single runs diverge from {sure} on: take a smaller one, {less}or fewer workers{noise}"
    )


def _without_momentum(setting: Setting, curvature: float) -> str:
    limits = limits_of(setting, momentum=0.0).at_curvature(curvature)
    plain = limits.mean_square or limits.almost_sure
    return f"less momentum (without any, the largest is {plain.value:.2g})"


def _setting(run: Run) -> Setting:
    """Return the setting of a run that may have been too short to fit a law to."""
    trace, optimizer = run.trace, run.config.optimizer
    staleness = staleness_of(trace["update"].to_numpy(), trace["read_version"].to_numpy())
    problem = make_problem(run.config)
    plain = optimizer.rule == "sgd" and optimizer.clip_norm is None
    return Setting(
        problem=problem,
        learning_rate=learning_rate_schedule(optimizer).array(len(trace)),
        batch_size=optimizer.batch_size,
        initial=starting_point(problem, run.config.run.seed),
        record=np.zeros(1, dtype=np.int64),
        law=Empirical.from_sample(staleness[start_up(staleness) :]),
        closure=closure_of(run),
        workers=run.config.cluster.workers,
        rule=None if plain else make_rule(optimizer),
    )


def advised(error: DivergedError) -> str:
    """Return the message of a run that diverged with what the theory advises."""
    advice = None
    with suppress(AsgdError):  # the run's own error is the one to be shown
        advice = advice_on_divergence(read_run(error.run)) if error.run else None
    return f"{error}; {advice}" if advice else str(error)


def why_not_predicted(error: AsgdError, runs: Sequence[Run]) -> str:
    """Return why there is no prediction of runs, with advice where one of them diverged."""
    advice = [advice_on_divergence(run) for run in runs if diverged(run)]
    return "; ".join([str(error), *(text for text in advice[:1] if text)])
