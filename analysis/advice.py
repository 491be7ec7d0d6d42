"""What to tell whoever made a run that diverged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from analysis.dependence import start_up
from analysis.run_stability import run_stability
from analysis.setting import Setting, closure_of
from asgd.divergence import DIVERGED
from asgd.errors import AsgdError, DivergedError
from asgd.problems import make_problem
from asgd.schedules import learning_rate_schedule
from asgd.staleness import Empirical, staleness_of
from asgd.streams import stream
from asgd.trace import Run, read_run


def diverged(run: Run) -> bool:
    """Return whether a run ended because its loss left every bound."""
    return (run.failure or "").startswith(DIVERGED)


def advice_on_divergence(run: Run) -> str | None:
    """Return the largest stable learning rate for the measured staleness of a run, in words.

    The curvature is that of the starting point. None where the theory says nothing: no update was
    recorded, or the rule is not plain SGD.
    """
    trace, optimizer = run.trace, run.config.optimizer
    if trace.empty or optimizer.rule != "sgd" or optimizer.clip_norm is not None:
        return None
    staleness = staleness_of(trace["update"].to_numpy(), trace["read_version"].to_numpy())
    problem = make_problem(run.config)
    law = Empirical.from_sample(staleness[start_up(staleness) :])
    setting = Setting(
        problem=problem,
        learning_rate=learning_rate_schedule(optimizer).array(len(trace)),
        batch_size=optimizer.batch_size,
        initial=problem.initial_point(stream(run.config.run.seed, "initial")),
        record=np.zeros(1, dtype=np.int64),
        law=law,
        closure=closure_of(run),
        workers=run.config.cluster.workers,
    )
    stability = run_stability(setting)
    limit = f"{stability.limit:.2g}"
    if stability.factor < 1.0:
        return f"the largest stable learning rate for the staleness it measured is {limit}"
    return (
        f"where it started, learning rates up to {limit} are stable: what grew is the curvature "
        "or the noise; take a smaller learning rate or larger batches"
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
