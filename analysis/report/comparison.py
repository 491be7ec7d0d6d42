"""Compares several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.exact.limits import Verdict
from analysis.prediction.model import without_replays
from analysis.prediction.score import Score
from analysis.profile.fit import StalenessFit
from analysis.profile.fitting import compare_fits
from analysis.report.clock import Clock, clock_of, common_clock
from analysis.report.headline import Facts, problem_name
from analysis.report.judgement import closest_models, judged_model, within_chance
from asgd.counted import listed, percent
from asgd.rundir.reader import Run

# The target, as a share of the fall of the loss to a value that every run reached. Scatter decides
# when a run covers the rest.
_TARGET = 0.95
# Phrases for runs above a limit.
_ABOVE: dict[Verdict, str] = {
    "diverges": "Unstable, above the almost-sure limit or by diverging paths",
    "heavy tail": "Heavy tail, above the limit of the mean square or by a few diverging paths",
}
_SHORT: dict[Verdict, str] = {"diverges": "unstable", "heavy tail": "heavy-tailed"}
_ALIKE = 1.25  # ratio of two update counts that may be scatter


@dataclass(frozen=True)
class Comparison:
    """The comparison of several runs.

    Attributes
    ----------
    table
        One row per run. Columns: `run`, `clock` (real or simulated), `workers`, `mean` (staleness),
        `staleness_q05`, `staleness_q95`, `mu`, `mu_low`, `mu_high` (95 % interval), `mu_expected` =
        1 - 1/P, `law`, `updates_per_second`, `updates_to_target`, `seconds_to_target`, and the
        relative error of each model under its name.
    target
        A loss that every run reached.
    clock
        Clock of the runs; if mixed, their seconds are not comparable.
    models
        Names of the models that predicted every run.
    labels
        Label of each model.
    scatter
        Mean relative error that scatter alone causes, 0 if unknown.
    """

    table: pd.DataFrame
    target: float
    clock: Clock
    models: list[str]
    labels: dict[str, str]
    scatter: float


def compare_runs(
    names: Sequence[str],
    runs: Sequence[Run],
    fits: Sequence[StalenessFit],
    scores: Sequence[Score | None],
) -> Comparison:
    """Compare named runs by their staleness fits and the scores of their predictions.

    The score is None for a run without prediction.
    """
    target = common_target([run.loss for run in runs])
    fitted = compare_fits(list(zip(names, fits, strict=True)))
    predicted = [score.models for score in scores if score is not None]
    complete = len(predicted) == len(scores)
    models = [n for n in predicted[0] if all(n in m for m in predicted)] if complete else []
    reached = [_first(run.loss, target) for run in runs]
    table = fitted[["mean", "mu", "mu_low", "mu_high", "mu_expected", "law"]].copy()
    table.insert(0, "clock", [clock_of(run) for run in runs])
    table.insert(1, "workers", [run.config.cluster.workers for run in runs])
    ends = [np.quantile(fit.sample.staleness, (0.05, 0.95)) for fit in fits]
    table[["staleness_q05", "staleness_q95"]] = np.array(ends)
    table["updates_per_second"] = [
        len(run.trace) / max(float(run.trace["applied_seconds"].iloc[-1]), 1e-9) for run in runs
    ]
    table["updates_to_target"] = [update for update, _ in reached]
    table["seconds_to_target"] = [seconds for _, seconds in reached]
    for name in models:
        table[name] = [scored[name].relative_error for scored in predicted]
    called = {
        name: " or ".join(dict.fromkeys(score.labels[name] for score in scores if score))
        for name in models
    }
    table = table.reset_index(names="run")
    scatters = [score.scatter or 0.0 for score in scores if score is not None]
    scatter = float(np.mean(scatters)) if scatters else 0.0
    return Comparison(table, target, common_clock(runs), models, called, scatter)


def labels(paths: Sequence[Path]) -> list[str]:
    """Return a short name per directory: its own, with more of its path if names repeat."""
    for depth in range(1, 10):
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def common_target(losses: Sequence[pd.DataFrame]) -> float:
    """Return 95 % of the way down to the loss that every run reached."""
    start = float(np.mean([table["loss"].iloc[0] for table in losses]))
    best = max(float(table["loss"].min()) for table in losses)
    return best + (1 - _TARGET) * max(start - best, 0.0)


def _first(loss: pd.DataFrame, target: float) -> tuple[int, float]:
    """Return update and second of the first evaluation at or below the target."""
    row = loss[loss["loss"] <= target].iloc[0]
    return int(row["update"]), float(row["seconds"])


def comparison_verdict(scores: Sequence[Score | None]) -> str:
    """Return in one sentence how well several runs were predicted."""
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return f"Predicted are {len(known)} of {len(scores)} runs."
    errors = _range([score.models[judged_model(score)].relative_error for score in known])
    scatters = [score.scatter for score in known if score.scatter is not None]
    if len(scatters) < len(known):
        return f"Predicted with an error of {errors}."
    within = sum(map(within_chance, known))
    where = {len(known): " in every run", 0: " in no run"}.get(
        within, f" in {within} of {len(known)} runs"
    )
    return f"Predicted within chance{where}: error {errors}, scatter {_range(scatters)}."


def _range(shares: Sequence[float]) -> str:
    low, high = percent(min(shares)), percent(max(shares))
    return low if low == high else f"{low} to {high}"


def comparison_headline(
    runs: Sequence[Run],
    fits: Sequence[StalenessFit],
    comparison: Comparison,
    margins: Sequence[float],
    verdicts: Sequence[Verdict | None],
) -> Facts:
    """Return the main findings on several runs, as named sentences.

    `margins` are the largest stable learning rates over those of the runs, inf if unknown;
    `verdicts` compare each run with its limits, None if unknown.
    """
    table = comparison.table
    kinds = sorted({problem_name(run) for run in runs})
    workers = ", ".join(f"{count}" for count in sorted({int(p) for p in table["workers"]}))
    off = float((table["mu"] - table["mu_expected"]).abs().max())
    return [
        (
            "What was run",
            f"{'; '.join(kinds)}: {_counted(table)} with {workers} workers{_shared(runs)}.",
        ),
        (
            "How stale",
            f"Mean staleness {table['mean'].min():.2f} to {table['mean'].max():.2f} updates"
            + (
                f"; mu (each staleness is mu times as likely as the one below it) is within "
                f"{_digit(off)} of 1 - 1/P in every run."
                if off == off
                else "."
            ),
        ),
        ("Which law", _which_law(fits)),
        ("How well predicted", _how_well(comparison)),
        *(
            [("Stable or not", _stability(table, margins, verdicts))]
            if np.isfinite(margins).any()
            else []
        ),
        ("How fast", _how_fast(comparison)),
        ("What to try", _what_to_try(comparison, verdicts)),
    ]


def _counted(table: pd.DataFrame) -> str:
    """Return the sentence that counts the runs by kind."""
    counts = table["clock"].value_counts()
    kinds = " and ".join(
        f"{counts[kind]} {kind}" for kind in ("real", "simulated") if kind in counts
    )
    return f"{kinds} runs"


def _how_fast(comparison: Comparison) -> str:
    """Return the sentence on the first run at the target, by the clock if it is common."""
    table = comparison.table
    frugal = table.iloc[int(table["updates_to_target"].argmin())]
    updates = sorted(set(table["updates_to_target"]))
    needed = (
        f"every run took {updates[0]:,} updates to it"
        if len(updates) == 1
        else f"it took the fewest updates, {updates[0]:,}, with {frugal['workers']} workers"
    )
    if comparison.clock == "mixed":
        return (
            f"To loss {comparison.target:.3g}: {needed}. Simulated seconds are virtual and real "
            "ones are not, so these runs are compared in updates."
        )
    fastest = table.iloc[int(table["seconds_to_target"].argmin())]
    virtual = " of virtual time" if comparison.clock == "simulated" else ""
    seconds = f"{fastest['seconds_to_target']:.3g} s{virtual}"
    return (
        f"Loss {comparison.target:.3g} was first reached by {fastest['run']} "
        f"({fastest['workers']} workers) in {seconds}; {needed}."
    )


def _shared(runs: Sequence[Run]) -> str:
    """Return the learning rate and the batch size if all runs share them."""
    optimizers = [run.config.optimizer for run in runs]
    rates = {optimizer.learning_rate for optimizer in optimizers}
    sizes = {optimizer.batch_size for optimizer in optimizers}
    return "".join(
        f", {name} {min(values):g}"
        for name, values in (("learning rate", rates), ("batches of", sizes))
        if len(values) == 1
    )


def _digit(number: float) -> str:
    """Return a small number with one digit and no exponent."""
    return "0.0001" if number < 1e-4 else np.format_float_positional(float(f"{number:.1g}"))


def _which_law(fits: Sequence[StalenessFit]) -> str:
    """Return the sentence that counts the grades of the geometric law."""
    grades = [fit.grade for fit in fits]
    words = {
        "holds": "holds",
        "close": "is close",
        "rejected": "is rejected",
        "unclear": "can be neither confirmed nor rejected",
    }
    if len(set(grades)) == 1:
        return f"The geometric law {words[grades[0]]} in every run."
    found = [f"{word} in {grades.count(grade)}" for grade, word in words.items() if grade in grades]
    return f"The geometric law {', '.join(found)} of {len(fits)} runs."


def _how_well(comparison: Comparison) -> str:
    if not comparison.models:
        return "No model was computed for every run."
    mean = {name: float(comparison.table[name].mean()) for name in comparison.models}
    errors = "; ".join(
        f"{comparison.labels[name]} {percent(error)}" for name, error in mean.items()
    )
    competing = {name: mean[name] for name in without_replays(mean)}
    closest = ""
    if competing:
        alike = closest_models(competing, comparison.scatter)
        closest = f" Closest: {listed([comparison.labels[name] for name in alike])}."
        if len(alike) == len(competing) > 1:
            spread = max(competing.values()) - min(competing.values())
            scattered = spread <= comparison.scatter
            why = "differ by less than the scatter of the runs" if scattered else "are alike"
            closest = f" Closest: none, they {why}."
    return f"Mean error over the runs: {errors}.{closest}"


def _stability(
    table: pd.DataFrame, margins: Sequence[float], verdicts: Sequence[Verdict | None]
) -> str:
    """Return the runs above each limit, and how far each run is from the mean-square limit."""
    found = []
    for verdict, what in _ABOVE.items():
        names = [
            str(run) for run, one in zip(table["run"], verdicts, strict=True) if one == verdict
        ]
        if len(names):
            found.append(f"{what}: {', '.join(names)}.")
    each = ", ".join(
        f"{margin:.2g} in {run}"
        for run, margin in zip(table["run"], margins, strict=True)
        if np.isfinite(margin)
    )
    return (
        f"{' '.join(found) or 'No run is above the limit of the mean square.'} "
        f"Largest stable learning rate (mean square) over that of the run: {each}."
    )


def _what_to_try(comparison: Comparison, verdicts: Sequence[Verdict | None]) -> str:
    """Return the recommended run: of the stable ones, the first at the target."""
    order, best, better = "seconds_to_target", "was the fastest to the target", "was faster"
    if comparison.clock == "mixed":
        order, best = "updates_to_target", "took the fewest updates to the target"
        better = "took fewer"
    elif comparison.clock == "simulated":
        best += " in virtual time"
    needed = comparison.table["updates_to_target"]
    if comparison.clock == "mixed" and needed.max() <= _ALIKE * needed.min():
        return (
            "All runs took about as many updates to the target: take the real run that needed the "
            "fewest seconds."
        )
    ranked = comparison.table.assign(verdict=np.array(verdicts, dtype=object)).sort_values(
        order, kind="stable"
    )
    stable = ranked[~ranked["verdict"].isin(list(_ABOVE))]
    first = ranked["run"].iloc[0]
    if stable.empty:
        return "Lower the learning rate: every run is unstable or has a heavy tail."
    if stable["run"].iloc[0] == first:
        stably = ", and is stable" if stable["verdict"].iloc[0] else ""
        return f"Take the settings of {first}: it {best}{stably}."
    return (
        f"Take the settings of {stable['run'].iloc[0]}: of the stable runs it {best}; {first} "
        f"{better} but is {_SHORT[ranked['verdict'].iloc[0]]}: it needs a smaller learning rate."
    )
