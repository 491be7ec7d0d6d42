"""The main findings on a run, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.prediction.advice import advice_on_divergence, diverged
from analysis.prediction.model import without_replays
from analysis.prediction.predict import Prediction
from analysis.prediction.probe import Probe
from analysis.prediction.score import Score
from analysis.prediction.setting import last_update, whole
from analysis.profile.fit import StalenessFit
from analysis.profile.stragglers import in_words
from analysis.profile.work import bias
from analysis.report.clock import clock_of, seconds_waited
from analysis.report.judgement import how_well
from analysis.report.suggestions import about_loss, about_probe, about_workers
from asgd.config.tables import ClusterConfig, DataConfig, OptimizerConfig
from asgd.counted import abridged, counted, percent
from asgd.printable import printable
from asgd.rundir.events import team_sizes
from asgd.rundir.reader import Run

Facts = list[tuple[str, str]]

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
_LISTED = 5  # workers or metrics named in a sentence
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
    probed: Probe | None = None,
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
        A probe of the stability, shown without a prediction.
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
            else how_well(prediction, score) + left_out(runs),
        ),
    ]
    advice = [f"{remedy[:1].upper()}{remedy[1:]}."] if remedy else []
    if prediction is not None and score is not None:
        facts.append(("Stable or not", prediction.settings.stability.sentence))
        advice.extend(about_loss(fit, prediction, score, runs[0]))
    elif probed is not None:
        facts.append(("Stable or not", probed.sentence))
        advice.extend([] if remedy else about_probe(probed.stability, runs[0]))
    advice.extend(about_workers(workers, events))
    facts.append(("What to try", " ".join(advice or ["Nothing stands out."])))
    return facts


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
        f"{config.optimizer.batch_size}{_drawn(config.data)}{_compressed(config.cluster)}: "
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


def _compressed(cluster: ClusterConfig) -> str:
    """Return how gradients are compressed, "" if they are not."""
    share = cluster.compression_share
    if share is not None:
        return f", the largest {100 * share:.3g} % of the entries sent, the rest added to the next"
    return ", sent in 8 bits a number" if cluster.compression == "int8" else ""


def _metrics(run: Run) -> str:
    """Return the sentence on the last metrics of the problem."""
    if run.metrics.empty:
        return ""
    last = [f"{printable(str(name))} {value:.4g}" for name, value in run.metrics.iloc[-1].items()]
    return f" At the end: {abridged(last, _LISTED)}."


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
    never = f"; none by worker {abridged([*map(str, names)], _LISTED)}" if names else ""
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
    elif prediction is not None and not without_replays(prediction.models):
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
    left_out = in_words(fit.left_out, fit.workers)
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
