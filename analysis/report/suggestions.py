"""What to try next after a run, in sentences."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.exact.stability import most_workers
from analysis.prediction.advice import at_most
from analysis.prediction.predict import Prediction
from analysis.prediction.run_stability import StabilityAnswer
from analysis.prediction.score import Score
from analysis.profile.fit import StalenessFit
from analysis.profile.verdict import in_words
from analysis.report.judgement import POOR, judged_model
from asgd.counted import percent
from asgd.rundir.reader import Run

_SLIGHT = 0.03  # change of the predicted loss that needs no advice
_AMPLE = 2.0  # limit over learning rate from which there is ample margin
_COVERED = 0.7  # coverage of the 90 % band above which the error of one run is mostly scatter
_MANY = 30  # updates of the busiest worker; with fewer, chance makes shares uneven
_UNEVEN = 2.0  # updates of the busiest worker over those of the idlest


def stability_margin(stability: StabilityAnswer | None) -> tuple[float, float]:
    """Return the largest stable learning rate over that of the run, and itself; inf if unknown."""
    if stability is None:
        return np.inf, np.inf
    values = stability.factor, stability.largest_stable_learning_rate
    factor, limit = (np.inf if value is None else value for value in values)
    return factor, limit


def _about_stability(stability: StabilityAnswer, run: Run) -> list[str]:
    """Return advice for a learning rate above or near its limit."""
    factor, limit = stability_margin(stability)
    if factor >= 1 and stability.verdict in ("heavy tail", "diverges"):
        known = "" if stability.factor is None else " below the limits"
        return [
            f"Paths diverge{known}: take a smaller learning rate or larger batches; "
            "`asgd plan` shows which are stable."
        ]
    if factor >= _AMPLE:
        return []
    if factor >= 1:
        return [
            f"The learning rate is within a factor of {factor:.2g} of the limit: do not "
            "raise it, and lower it for more workers."
        ]
    points, momentum = (stability.start, stability.end), stability.start.momentum
    step = stability.learning_rate * max(point.curvature[0] for point in points if point)
    workers = run.config.cluster.workers
    aware = run.config.optimizer.rule == "staleness_aware"
    few = 0 if aware else most_workers(step, momentum, workers)
    fewer = f", or take {at_most(few)}" if few else ""
    less = " Less momentum raises the limit." if momentum and workers > 1 else ""
    tail = "; until then rare excursions dominate every average over repeats"
    return [
        f"Lower the learning rate below {limit:.3g}{fewer}"
        f"{tail if stability.verdict == 'heavy tail' else ''}.{less}"
    ]


def about_probe(stability: StabilityAnswer, run: Run) -> list[str]:
    """Return advice from the stability of a run whose loss is not predicted."""
    advice = _about_stability(stability, run)
    factor, _ = stability_margin(stability)
    if not advice and np.isfinite(factor):
        advice = [
            f"The limit is {factor:.2g} times the learning rate where it was probed: there is "
            "margin for more workers or a larger learning rate; `asgd plan` shows which pay."
        ]
    return advice


def about_loss(fit: StalenessFit, prediction: Prediction, score: Score, run: Run) -> list[str]:
    """Return advice from stability and predictions."""
    stability = prediction.settings.stability
    advice = _about_stability(stability, run)
    factor, _ = stability_margin(stability)
    if not np.isfinite(score.models[judged_model(score)].relative_error):
        return advice
    best = score.models[score.closest]
    cost = staleness_cost(prediction)
    if best.relative_error > POOR and best.coverage >= _COVERED:
        advice.append(
            f"The errors are mostly scatter: the run is inside the 90 % band "
            f"{percent(best.coverage)} of the time. Repeat it with other seeds, report on all."
        )
    elif best.relative_error > POOR:
        advice.append(
            f"No model comes closer than {percent(best.relative_error)}, and the run is inside "
            f"the 90 % band only {percent(best.coverage)} of the time: do not rely on a "
            "prediction; the drift of staleness and the events may show the cause."
        )
    elif cost is not None and abs(cost) < _SLIGHT:
        afford = (
            ""
            if factor < _AMPLE or stability.verdict != "stable"
            else ": there is margin for more workers or a larger learning rate"
        )
        advice.append(f"Staleness changes the predicted loss by {percent(abs(cost))}{afford}.")
    elif cost is not None and cost > 0:
        advice.append(
            f"Staleness raises the predicted loss by {percent(cost)} on average over the run: a "
            "smaller learning rate or fewer workers would lower it."
        )
    elif cost is not None:
        advice.append(
            f"Staleness lowers the predicted loss by {percent(-cost)} on average over the run: at "
            "this learning rate it acts like momentum."
        )
    if fit.grade == "rejected" and {"sme_asgd", "sme_law"} <= score.models.keys():
        geometric = score.models["sme_asgd"].relative_error
        law = score.models["sme_law"].relative_error
        recorded = prediction.recorded_turns
        what = "recorded turns of the workers" if recorded else in_words(fit.recommended)
        verbs = ("are", "make") if recorded else ("is", "makes")
        verb = (
            f"{verbs[0]} needed" if geometric > 1.5 * law else f"{verbs[1]} little difference here"
        )
        pool = score.models.get("law_pool") if recorded else None
        beside = f", {percent(pool.relative_error)} with the measured law" if pool else ""
        advice.append(
            f"The {what} {verb}: error {percent(law)} against {percent(geometric)} with the "
            f"geometric law{beside}."
        )
    return advice


def about_workers(workers: pd.DataFrame, events: pd.DataFrame) -> list[str]:
    """Return advice from uneven workers and events."""
    advice = []
    busy, idle = workers["share"].max(), workers["share"].min()
    if len(workers) > 1 and busy > _UNEVEN * idle and workers["updates"].max() >= _MANY:
        slow = workers.iloc[int(workers["share"].argmin())]
        lost = slow.get("discarded_share", 0.0)
        why = "its gradients are the stalest"
        if lost > 0.5:
            why = f"{percent(lost)} of its gradients are discarded"
        advice.append(
            f"Worker {slow['worker']:.0f} made {percent(idle)} of the updates, the busiest "
            f"{percent(busy)}: {why}; see what slows it down."
        )
    if len(events):
        counts = events["event"].value_counts()
        listed = ", ".join(f"{str(kind).replace('_', ' ')} ({n})" for kind, n in counts.items())
        advice.append(f"Check the events: {listed}.")
    return advice


def staleness_cost(prediction: Prediction) -> float | None:
    """Return by how much the measured staleness raises the mean predicted loss.

    This is the mean difference over the recorded updates, divided by the mean loss predicted
    without staleness. None if either is not predicted or not finite.
    """
    if not {"sme_sgd", "sme_law"} <= set(prediction.models):
        return None
    free, stale = (prediction.curve(name)["loss_mean"] for name in ("sme_sgd", "sme_law"))
    scale = float(free.abs().mean())
    cost = float((stale - free).mean()) / scale if scale else np.nan
    return cost if np.isfinite(cost) else None
