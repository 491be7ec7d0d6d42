"""How well a run was predicted, in sentences."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from analysis.prediction.advice import diverged
from analysis.prediction.model import without_replays
from analysis.prediction.predict import Prediction
from analysis.prediction.score import Score
from asgd.counted import listed, percent
from asgd.rundir.reader import Run

POOR = 0.15  # error above which a prediction is unreliable
_ALIKE = 1.1  # ratio of two errors below which neither model counts as closer
_CLOSELY = 0.05  # error up to which a prediction counts as close, even beyond chance
# The error of a right prediction is below this multiple of its mean in 95 % of the cases, if all
# points deviate together: 1.96 sqrt(pi / 2).
_CHANCE = 2.46


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
        wide = " The scatter is large: repeat the run." if scatter > POOR else ""
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
    return "closely" if error <= _CLOSELY else "roughly" if error <= POOR else "badly"


def how_well(prediction: Prediction, score: Score) -> str:
    """Return the sentences on the error of each model, and which come closest."""
    of = "the observed loss" if score.repeats == 1 else f"the mean of {score.repeats} runs"
    errors = [f"{score.labels[n]} {percent(m.relative_error)}" for n, m in score.models.items()]
    scatter = score.scatter
    alike = closest_models({n: m.relative_error for n, m in score.models.items()}, scatter)
    closest = listed([score.labels[name] for name in alike])
    covered = listed(list(dict.fromkeys(percent(score.models[n].coverage) for n in alike)))
    judged = len(without_replays(score.models))
    if len(alike) == judged > 1:
        closest = f"none, they {'differ by less than that scatter' if scatter else 'are alike'}"
    bands = "its 90 % band holds" if len(alike) == 1 else "their 90 % bands hold"
    note = "; the replay does not count, because it is given the staleness of this run"
    return (
        f"Mean error against {of}: {'; '.join(errors)}. {_scatter(score)}Closest: {closest}"
        f"{note if 0 < judged < len(score.models) else ''}; "
        f"{bands} {covered} of the observed points."
        f"{_recorded(prediction)}"
    )


def closest_models(errors: Mapping[str, float], scatter: float | None) -> list[str]:
    """Return the models with the smallest errors, alike ones included, without replays."""
    competing = without_replays(errors) or list(errors)
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


def _recorded(prediction: Prediction) -> str:
    """Return the sentence on recorded turns, if "sme_law" used them instead of the law."""
    if not prediction.recorded_turns:
        return ""
    return (
        f" {prediction.label('sme_law')} resamples blocks of this run's recorded turns instead of "
        "using the law, because the turns came in spells. It takes the staleness, not the loss, "
        "from the run."
    )
