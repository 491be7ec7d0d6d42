"""The main findings on a run, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.exact.stability import most_workers
from analysis.prediction.advice import advice_on_divergence, at_most, diverged
from analysis.prediction.predict import Prediction
from analysis.prediction.score import Score
from analysis.prediction.setting import last_update, whole
from analysis.profile.fit import StalenessFit
from analysis.profile.stragglers import in_words as in_words_of
from analysis.profile.verdict import in_words
from analysis.profile.work import bias
from analysis.report.clock import clock_of, seconds_waited
from asgd.config import DataConfig, OptimizerConfig
from asgd.counted import counted
from asgd.printable import printable
from asgd.rundir.events import team_sizes
from asgd.rundir.reader import Run

Facts = list[tuple[str, str]]

_SLIGHT = 0.03  # change of the predicted loss that needs no advice
_POOR = 0.15  # error above which a prediction is unreliable
_AMPLE = 2.0  # limit over learning rate from which there is ample margin
_COVERED = 0.7  # coverage of the 90 % band above which the error of one run is mostly scatter
_ALIKE = 1.1  # ratio of two errors below which neither model counts as closer
_RULES = {
    "sgd": "SGD",
    "momentum": "SGD with momentum",
    "nesterov": "SGD with Nesterov momentum",
    "corrected_momentum": "SGD with momentum corrected for asynchrony",
    "adam": "Adam",
    "adamw": "AdamW",
    "rmsprop": "RMSProp",
    "staleness_aware": "staleness-aware SGD",
    "staleness_power": "SGD with steps that fall with the staleness",
    "capped": "SGD with steps capped by the staleness",
    "delay_compensated": "delay-compensated SGD",
}
_LISTED = 5  # workers named in a sentence
_MANY = 30  # updates of the busiest worker; with fewer, chance makes shares uneven
_UNEVEN = 2.0  # updates of the busiest worker over those of the idlest
_CLOSELY = 0.05  # error up to which a prediction counts as close, even beyond chance
# The error of a right prediction is below this multiple of its mean in 95 % of the cases, if all
# points deviate together: 1.96 sqrt(pi / 2).
_CHANCE = 2.46
_MU = (
    " Here mu is the parameter of the geometric law: each staleness is mu times as likely as the "
    "one below it."
)


def headline(
    runs: Sequence[Run],
    fit: StalenessFit,
    prediction: Prediction | None,
    score: Score | None,
    workers: pd.DataFrame,
    events: pd.DataFrame,
    *,
    doubt: str | None = None,
    missing: str | None = None,
    probed: str | None = None,
) -> Facts:
    """Return named sentences: the run, its staleness and law, the prediction, and advice.

    Parameters
    ----------
    runs
        One run, or its repeats.
    prediction, score
        None without a prediction.
    workers, events
        Tables from `analysis.report.activity`; only extraordinary events.
    doubt
        Why the fit is unreliable, None if it is reliable.
    missing
        Why there is no prediction.
    probed
        The sentence of a probe of the stability, shown without a prediction.
    """
    remedy = advice_on_divergence(runs[0]) if score is None and diverged(runs[0]) else None
    reason = (missing or "").removesuffix(f"; {remedy}")
    facts = [
        ("What was run", _description(runs)),
        ("Who contributed", _contributors(runs[0], workers) + _bias(runs[0])),
        ("How stale", _how_stale(runs[0], fit)),
        ("Which law", _which_law(fit, prediction, doubt)),
        (
            "How well predicted",
            f"Not predicted: {reason}."
            if score is None or prediction is None
            else _how_well(prediction, score) + left_out(runs),
        ),
    ]
    stability = _stability(prediction) or probed
    if stability:
        facts.append(("Stable or not", stability))
    advice = [*_about_loss(runs[0], fit, prediction, score), *_about_workers(workers, events)]
    if remedy:
        advice.insert(0, f"{remedy[:1].upper()}{remedy[1:]}.")
    facts.append(("What to try", " ".join(advice or ["Nothing stands out."])))
    return facts


def verdict(
    run: Run, prediction: Prediction | None, score: Score | None, missing: str | None = None
) -> str:
    """Return in one sentence how well a run was predicted, or that it diverged.

    The verdict is on the model that knows most of the staleness but not its order. The closest
    model would be biased, because chance selects it in part.
    """
    if diverged(run):
        rate = f"{run.config.optimizer.learning_rate:g}"
        return f"Diverged: a learning rate of {rate} is too large for this staleness."
    if prediction is None or score is None:
        return f"Not predicted: {missing}."
    name = judged_model(score)
    error, scatter = score.models[name].relative_error, score.scatter
    by = f"by the {score.labels[name]}"
    if not np.isfinite(error):
        return (
            f"Not predicted: paths of the {score.labels[name]} diverge, so its error is infinite."
        )
    if scatter is None:
        return f"Predicted {_how_closely(error)} {by}: error {percent(error)}."
    numbers = f"error {percent(error)}, scatter {percent(scatter)}"
    free = score.models.get("sme_sgd")
    without = ""
    if free is not None and name != "sme_sgd" and free.relative_error > 2.0 * error:
        without = f" Without staleness the error would be {percent(free.relative_error)}."
    if within_chance(score):
        wide = " The scatter is large: repeat the run." if scatter > _POOR else ""
        return f"Predicted within chance {by}: {numbers}.{without}{wide}"
    return f"Predicted {_how_closely(error)}, but not within chance, {by}: {numbers}.{without}"


def judged_model(score: Score) -> str:
    """Return the model that knows most of the staleness but not its order."""
    return next((name for name in ("sme_law", "sme_asgd") if name in score.models), score.closest)


def within_chance(score: Score) -> bool:
    """Whether the scatter of the run alone may have made the error of the judged model."""
    if score.scatter is None:
        return False
    return score.models[judged_model(score)].relative_error <= _CHANCE * score.scatter


def _how_closely(error: float) -> str:
    return "closely" if error <= _CLOSELY else "roughly" if error <= _POOR else "badly"


def problem_name(run: Run) -> str:
    """Return the name of a run's problem for sentences."""
    problem = run.config.problem
    own = ":" in problem.kind  # a user's plug-in
    kind = problem.kind if own else problem.kind.replace("_", " ").capitalize()
    return f"{kind} on {problem.dataset}" if problem.dataset else kind


def _description(runs: Sequence[Run]) -> str:
    run = runs[0]
    config, trace, loss = run.config, run.trace, run.loss["loss"]
    repeats = f"{len(runs)} repeats; the first: " if len(runs) > 1 else ""
    seconds = float(trace["applied_seconds"].iloc[-1])
    clock = "" if clock_of(run) == "real" else " of virtual time"
    return (
        f"{problem_name(run)} by {_method(config.optimizer)}, batches of "
        f"{config.optimizer.batch_size}{_drawn(config.data)}: "
        f"{repeats}{counted(len(trace), 'updates')} by {_team(run)} "
        f"in {seconds:.3g} s{clock} ({len(trace) / max(seconds, 1e-9):,.0f} updates/s), "
        f"{_ended(run)}.{_waited(run, seconds)}"
        f"{'' if loss.empty else f' The loss went from {loss.iloc[0]:.4g} to {loss.iloc[-1]:.4g}.'}"
        f"{_metrics(run)}{_skipped(run)}"
    )


def _method(optimizer: OptimizerConfig) -> str:
    """Return the update rule in words, with the local steps if there are any."""
    words = f"{_RULES.get(optimizer.rule, optimizer.rule)}, learning rate "
    words += f"{optimizer.learning_rate:g}"
    if (local := optimizer.local) is None:
        return words
    steps = counted(optimizer.gradients_per_push, "local steps")
    rule = _RULES.get(local.rule, local.rule)
    return (
        f"{words}, on the differences of {steps} of {rule}, learning rate {local.learning_rate:g}"
    )


def _drawn(data: DataConfig) -> str:
    """Return how batches are drawn, "" for independent draws from all samples."""
    alpha = f" of alpha {data.alpha:g}" if data.alpha is not None else ""
    part = {
        "shared": "",
        "partition": ", each worker's from a random part of the samples",
        "by_label": ", each worker's from a part of the samples by class",
        "dirichlet": f", each worker's from a part with Dirichlet shares{alpha} of the classes",
    }[data.shards]
    return part + (", every sample once an epoch" if data.sampling == "epoch" else "")


def _metrics(run: Run) -> str:
    """Return the sentence on the last metrics of the problem."""
    if run.metrics.empty:
        return ""
    last = [f"{printable(str(name))} {value:.4g}" for name, value in run.metrics.iloc[-1].items()]
    more = ", ..." if len(last) > _LISTED else ""
    return f" At the end: {', '.join(last[:_LISTED])}{more}."


def _skipped(run: Run) -> str:
    """Return the sentence on losses that were not evaluated."""
    skipped = len(run.skipped)
    if not skipped:
        return ""
    return (
        f" {skipped} of {skipped + len(run.loss)} losses were skipped, because evaluating them "
        "took longer than training."
    )


def _waited(run: Run, seconds: float) -> str:
    """Return the sentence on start-up and evaluation, which the seconds of a run exclude."""
    waited = seconds_waited(run)
    if waited is None:
        return ""
    if clock_of(run) == "simulated":
        return f" It was simulated in {waited:.2g} s."
    return (
        f" The whole command took {waited:.3g} s, with starting the processes and evaluating the "
        "loss."
    )


def _contributors(run: Run, workers: pd.DataFrame) -> str:
    """Return the sentence on the workers' shares."""
    if run.config.cluster.workers == len(workers) == 1:
        return "One worker alone."
    busy, idle = workers["share"].max(), workers["share"].min()
    each = (
        f"{percent(idle)} of the gradients each"
        if percent(idle) == percent(busy)
        else f"{percent(idle)} to {percent(busy)} of the gradients each"
    )
    names = sorted(set(range(run.config.cluster.workers)) - set(workers["worker"]))
    more = ", ..." if len(names) > _LISTED else ""
    never = f"; none by worker {', '.join(map(str, names[:_LISTED]))}{more}" if names else ""
    return f"{counted(len(workers), 'workers')}, {each}{never}."


def _bias(run: Run) -> str:
    """Return the sentences on discarded gradients, "" where all are applied alike."""
    found = bias(run)
    return f" {found['sentence']}" if found else ""


def _which_law(fit: StalenessFit, prediction: Prediction | None, doubt: str | None) -> str:
    """Return the verdict on the law, without its advice if the prediction did not follow it."""
    if doubt is not None:
        return f"Too short to tell: {doubt}."
    text = fit.verdict
    if prediction is not None and prediction.recorded_turns:
        text = (
            f"{fit.finding}; the workers' turns came in spells, which no law describes, so the "
            "prediction uses the recorded turns."
        )
    elif prediction is not None and prediction.models == ["replay"]:
        text = f"{fit.finding}."
    return text + (_MU if "mu = " in text else "")


def _team(run: Run) -> str:
    sizes = team_sizes(run.events, run.config.cluster.workers, len(run.trace))
    low, high = int(sizes.min()), int(sizes.max())
    return counted(high, "workers") if low == high else f"{low} to {high} workers"


def _ended(run: Run) -> str:
    """Return the sentence on the end of the run, with the reason of a failure."""
    return f"failed: {run.failure}" if run.failure else run.state


def _how_stale(run: Run, fit: StalenessFit) -> str:
    staleness = fit.sample.staleness
    left_out = in_words_of(fit.left_out, fit.workers)
    text = f"{left_out} " if left_out else ""
    if staleness.max() == 0:
        return f"{text}Staleness is 0: no update came between a snapshot and its gradient."
    middle, high = np.quantile(staleness, (0.5, 0.95))
    text += (
        f"The mean staleness is {fit.geometric.law.mean():.2f} updates, the median {middle:.0f}; "
        f"one gradient in twenty has {high:.0f} or more; the largest is {staleness.max()}."
    )
    team = fit.workers
    if run.config.cluster.mode == "async" and team is not None:
        on_average = (
            counted(team, "workers") if isinstance(team, int) else f"{team:.3g} workers on average"
        )
        text += (
            f" For {on_average} that use every snapshot once, a mean of {team - 1:.3g} is expected."
        )
    return text


def _how_well(prediction: Prediction, score: Score) -> str:
    of = "the observed loss" if score.repeats == 1 else f"the mean of {score.repeats} runs"
    errors = [f"{score.labels[n]} {percent(m.relative_error)}" for n, m in score.models.items()]
    scatter = score.scatter
    alike = closest_models({n: m.relative_error for n, m in score.models.items()}, scatter)
    closest = listed([score.labels[name] for name in alike])
    covered = listed(list(dict.fromkeys(percent(score.models[n].coverage) for n in alike)))
    if len(alike) == len(score.models) - ("replay" in score.models) > 1:
        closest = f"none, they {'differ by less than that scatter' if scatter else 'are alike'}"
    bands = "its 90 % band holds" if len(alike) == 1 else "their 90 % bands hold"
    note = "; the replay does not count, because it is given the staleness of this run"
    return (
        f"Mean error against {of}: {'; '.join(errors)}. {_scatter(score)}Closest: {closest}"
        f"{note if 'replay' in score.models and len(score.models) > 1 else ''}; "
        f"{bands} {covered} of the observed points."
        f"{_recorded(prediction)}"
    )


def closest_models(errors: Mapping[str, float], scatter: float | None) -> list[str]:
    """Return the models whose errors are alike the smallest, without replays, in their order."""
    competing = [name for name in errors if name != "replay"] or list(errors)
    best = min(competing, key=lambda name: errors[name])
    # Scatter can swap the order of two errors that differ by less.
    limit = max(_ALIKE * errors[best], errors[best] + (scatter or 0.0))
    return [name for name in competing if name == best or errors[name] <= limit]


def _scatter(score: Score) -> str:
    """Return the sentence on the error of a perfect prediction, if known."""
    if score.scatter is None:
        return ""
    of = "a single run" if score.repeats == 1 else f"{score.repeats} runs"
    return f"The scatter of {of} alone causes about {percent(score.scatter)}. "


def listed(names: Sequence[str]) -> str:
    """Return names joined by commas and a final "and"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _recorded(prediction: Prediction) -> str:
    """Return the sentence on recorded turns, if "sme_law" used them instead of the law."""
    if not prediction.recorded_turns:
        return ""
    return (
        f" {prediction.label('sme_law')} resamples blocks of this run's recorded turns instead of "
        "using the law, because the turns came in spells. It takes the staleness, not the loss, "
        "from the run."
    )


def left_out(runs: Sequence[Run]) -> str:
    """Return the sentence on repeats that were cut short and therefore not predicted."""
    kept = whole(runs)
    short = len(runs) - len(kept)
    if not short:
        return ""
    return (
        f" {counted(short, 'repeats')} ended before update {last_update(kept[0]):,} and "
        f"{'is' if short == 1 else 'are'} left out of prediction and score."
    )


def _stability(prediction: Prediction | None) -> str | None:
    """Return the stability sentence of a prediction, if it has one."""
    return prediction.settings.stability.sentence if prediction else None


def stability_margin(prediction: Prediction | None) -> tuple[float, float]:
    """Return the largest stable learning rate, over the run's and itself; inf if unknown."""
    if prediction is None:
        return np.inf, np.inf
    stability = prediction.settings.stability
    values = stability.factor, stability.largest_stable_learning_rate
    factor, limit = (np.inf if value is None else value for value in values)
    return factor, limit


def _about_stability(prediction: Prediction, run: Run) -> list[str]:
    """Return advice for a learning rate above or near its limit."""
    factor, limit = stability_margin(prediction)
    stability = prediction.settings.stability
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


def _about_loss(
    run: Run, fit: StalenessFit, prediction: Prediction | None, score: Score | None
) -> list[str]:
    """Return advice from stability and predictions."""
    if prediction is None or score is None:
        return []
    advice = []
    factor, _ = stability_margin(prediction)
    advice.extend(_about_stability(prediction, run))
    if not np.isfinite(score.models[judged_model(score)].relative_error):
        return advice
    best = score.models[score.closest]
    cost = staleness_cost(prediction)
    if best.relative_error > _POOR and best.coverage >= _COVERED:
        advice.append(
            f"The errors are mostly scatter: the run is inside the 90 % band "
            f"{percent(best.coverage)} of the time. Repeat it with other seeds, report on all."
        )
    elif best.relative_error > _POOR:
        advice.append(
            f"No model comes closer than {percent(best.relative_error)}, and the run is inside "
            f"the 90 % band only {percent(best.coverage)} of the time: do not rely on a "
            "prediction; look for the cause in the drift of staleness and in the events."
        )
    elif cost is not None and abs(cost) < _SLIGHT:
        afford = (
            ""
            if factor < _AMPLE or prediction.settings.stability.verdict != "stable"
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


def _about_workers(workers: pd.DataFrame, events: pd.DataFrame) -> list[str]:
    """Return advice from uneven workers and events."""
    advice = []
    busy, idle = workers["share"].max(), workers["share"].min()
    if len(workers) > 1 and busy > _UNEVEN * idle and workers["updates"].max() >= _MANY:
        slow = workers["worker"].iloc[int(workers["share"].argmin())]
        advice.append(
            f"Worker {slow} made {percent(idle)} of the updates, the busiest {percent(busy)}: "
            "its gradients are the stalest; see what slows it down."
        )
    if len(events):
        counts = events["event"].value_counts()
        listed = ", ".join(f"{str(kind).replace('_', ' ')} ({n})" for kind, n in counts.items())
        advice.append(f"Look at the events: {listed}.")
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


def percent(share: float) -> str:
    """Return a share in per cent, with two digits if it is small."""
    if np.isinf(share):
        return "infinite"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
