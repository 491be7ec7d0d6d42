"""The cost of a record's staleness, and the effect of caps and of other numbers of samplers.

All limits are of one mode, over those without staleness, so the curvature cancels. Lags are taken
as independent from update to update, as in the model of An, Lu, Ying, with one item per update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.exact.limits import Limit, stability_limits
from analysis.profile.dependence import standard_error
from analysis.profile.fit import StalenessFit
from analysis.records.means import MeansProfile
from analysis.records.study import RecordStudy
from asgd.arguments import count
from asgd.arrays import Integers
from asgd.counted import counted
from asgd.errors import InputError
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric
from asgd.streams import stream

_MOST_CAPS = 5
_RARE = 0.001  # a cap that fewer items exceed is not worth trying
_MOST_ROWS = 10
_SEED = 0

ASSUMPTIONS = (
    "Limits are over those without staleness, so the curvature cancels; lags are taken as "
    "independent, one item per update. Where an update averages many items of different staleness, "
    "its mean-square limit lies between the one given and that of the mean. Discarding drops the "
    "items beyond the cap; pacing delays their start until they have just the cap. Both leave out "
    "that the other items then become younger."
)


@dataclass(frozen=True, kw_only=True)
class RecordChoice:
    """The record as it is, or under one change.

    Attributes
    ----------
    name
        In words.
    kind
        "now", "discard", "pace" or "samplers".
    cap
        Largest staleness, for the first two changes.
    mean_staleness
        Under the change; it and the limits are nan if no item is left.
    mean, mean_square, almost_sure
        Largest stable step over that without staleness, of the mean, of the mean square, and of
        almost every run.
    almost_sure_error
        Standard error of the last, from its simulation.
    gain
        `mean_square` over that of the record as it is.
    beyond, beyond_error
        Share of the items beyond the cap, dropped or delayed, and its standard error; nan without
        a cap.
    delay
        Mean delay of these items by pacing; nan without a cap.
    """

    name: str
    kind: str
    cap: int | None
    mean_staleness: float = np.nan
    mean: float = np.nan
    mean_square: float = np.nan
    almost_sure: float = np.nan
    almost_sure_error: float = np.nan
    gain: float = np.nan
    beyond: float = np.nan
    beyond_error: float = np.nan
    delay: float = np.nan


@dataclass(frozen=True)
class WhatIf:
    """The choices of a record with items.

    Attributes
    ----------
    unit
        Unit of the staleness.
    momentum
        beta of the heavy ball.
    choices
        The record as it is, then each change.
    workers
        One row per worker with most items beyond the caps: its items, their share, and its share of
        items beyond each cap (columns `beyond <cap>`); None if the workers are unknown.
    """

    unit: str
    momentum: float
    choices: Sequence[RecordChoice]
    workers: pd.DataFrame | None

    @property
    def now(self) -> RecordChoice:
        """The record as it is."""
        return self.choices[0]

    def drawn(self) -> pd.DataFrame:
        """Return the table for `figures.limit_by_cap`."""
        return pd.DataFrame([asdict(choice) for choice in self.choices])

    def caps(self, kind: str) -> list[RecordChoice]:
        """Return the choices of one kind."""
        return [choice for choice in self.choices if choice.kind == kind]

    def table(self) -> pd.DataFrame:
        """Return one row per choice."""
        rows = [
            {
                "choice": choice.name,
                "mean staleness": choice.mean_staleness,
                "mean square": choice.mean_square,
                "almost sure": choice.almost_sure,
                "mean": choice.mean,
                "gain": choice.gain,
                "beyond": choice.beyond,
                "delay": choice.delay,
            }
            for choice in self.choices
        ]
        return pd.DataFrame(rows)

    @property
    def cost(self) -> str:
        """The cost of the staleness, in a sentence."""
        now = self.now
        beta = f" with momentum {self.momentum:g}" if self.momentum else ""
        return (
            f"The largest stable step{beta} is {now.mean_square:.3g} of that without staleness in "
            f"mean square, {now.almost_sure:.3g} for almost every run ({now.mean:.3g} of the mean, "
            "which bounds no run)."
        )

    @property
    def sentences(self) -> list[str]:
        """The cost and the gain of each cap, a sentence each."""
        found = []
        for dropped, paced in zip(self.caps("discard"), self.caps("pace"), strict=True):
            kept = 1.0 - dropped.beyond
            discarding = (
                f"discarding drops {_percent(dropped)} of the items, {1.0 / kept:.2f} times the "
                f"sampling, and allows {dropped.gain:.2f} times the step"
                if kept
                else "discarding drops every item, and no step is left"
            )
            delay = counted(f"{paced.delay:.3g}", self.unit)
            found.append(
                f"A cap of {dropped.cap}: {discarding}; pacing delays as many by {delay} (mean), "
                f"and allows {paced.gain:.2f} times the step."
            )
        for choice in self.caps("samplers"):
            found.append(
                f"{choice.name.capitalize()}: mean staleness {choice.mean_staleness:.3g}, "
                f"{choice.gain:.2f} times the step."
            )
        return found

    def __str__(self) -> str:
        tables = [self.table(), *([] if self.workers is None else [self.workers])]
        choices, *whose = (
            table.to_string(index=False, float_format="{:.3g}".format, na_rep="")
            for table in tables
        )
        parts = [self.cost, choices, "\n".join(self.sentences), *whose, ASSUMPTIONS]
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        workers = None if self.workers is None else self.workers.to_dict(orient="list")
        return {
            "unit": self.unit,
            "momentum": self.momentum,
            "cost": self.cost,
            "choices": [asdict(choice) for choice in self.choices],
            "workers": workers,
            "assumptions": ASSUMPTIONS,
        }


def bounds_of_caps(profile: MeansProfile, caps: Sequence[int] | None = None) -> list[str]:
    """Return the bounds that means give for caps, a sentence each."""
    largest = 16 if profile.largest is None else int(profile.largest)
    chosen = caps if caps is not None else [cap for cap in (1, 2, 4, 8, 16) if cap < largest]
    return [
        f"A cap of {cap}: between {100 * low:.3g} % and {100 * high:.3g} % of the items are beyond "
        "it, whatever their law; what it would allow cannot be told from means."
        for cap in chosen
        for low, high in [profile.beyond(cap)]
    ]


def what_if(
    study: RecordStudy,
    *,
    caps: Sequence[int] | None = None,
    momentum: float = 0.0,
    progress: Callable[[str, float], None] | None = None,
) -> WhatIf:
    """Return the effect of caps and of other numbers of samplers.

    Parameters
    ----------
    study
        A record with a row per item.
    caps
        Largest staleness of each cap; default 1, 2, 4, ... as far as items are beyond it.
    momentum
        beta of the heavy ball, in [0, 1).
    progress
        Called with the name of a choice and the completed fraction.

    Raises
    ------
    InputError
        The record has means only, a cap is negative, or the momentum is not in [0, 1).
    UnreliableEstimateError
        The record is too short.
    """
    fit = study.profile
    if isinstance(fit, MeansProfile):
        raise InputError(f"{study.path}: no law can be fitted from means, so no limit follows")
    values = fit.sample.staleness
    chosen = _default_caps(values) if caps is None else sorted({count(c, "cap", 0) for c in caps})
    free = stability_limits(ConstantPlusGeometric(0), momentum=momentum, independent=True)
    changes = list(_changes(values, chosen, fit.workers))
    found: list[RecordChoice] = []
    for number, change in enumerate(changes):
        if progress is not None:
            progress(change.name, number / len(changes))
        beyond, beyond_error, delay = _beyond(values, change.cap, fit.sample.block)
        choice = RecordChoice(
            name=change.name,
            kind=change.kind,
            cap=change.cap,
            beyond=beyond,
            beyond_error=beyond_error,
            delay=delay,
        )
        if change.law is None:
            found.append(choice)
            continue
        limits = stability_limits(change.law, momentum=momentum, independent=True)
        second = _over(limits.mean_square, free.mean_square)
        sure = limits.almost_sure
        found.append(
            replace(
                choice,
                mean_staleness=change.law.mean(),
                mean=_over(limits.mean, free.mean),
                mean_square=second,
                almost_sure=_over(sure, free.almost_sure),
                almost_sure_error=sure.error / free.almost_sure.value,
                gain=second / found[0].mean_square if found else 1.0,
            )
        )
    return WhatIf(study.record.about.unit, momentum, found, _by_worker(study, fit, chosen))


@dataclass(frozen=True)
class _Change:
    """A change with the law under it; None if no item is left."""

    name: str
    kind: str
    law: Empirical | None
    cap: int | None = None


def _changes(values: Integers, caps: Sequence[int], workers: float | None) -> Iterator[_Change]:
    yield _Change("as it is", "now", Empirical.from_sample(values))
    for cap in caps:
        kept = values[values <= cap]
        law = Empirical.from_sample(kept) if len(kept) else None
        yield _Change(f"discard above {cap}", "discard", law, cap)
    for cap in caps:
        yield _Change(f"pace to {cap}", "pace", Empirical.from_sample(np.minimum(values, cap)), cap)
    rng = stream(_SEED, "samplers")
    for name, factor in (("half the samplers", 0.5), ("twice the samplers", 2.0)):
        if workers is not None and workers > 1:  # only the other workers make its items stale
            factor = max(factor * workers - 1.0, 0.0) / (workers - 1.0)
        law = Empirical.from_sample(with_samplers(values, factor, rng))
        yield _Change(name, "samplers", law)


def with_samplers(values: Integers, factor: float, rng: np.random.Generator) -> Integers:
    """Return the staleness with `factor` times as many samplers of the same speed (ours).

    While an item is computed, the others make `factor` times as many updates. If the variance of
    the staleness exceeds its mean, these updates come at random, with a gamma distributed rate for
    each item: fewer samplers thin them, more samplers add a negative binomial number that depends
    on the staleness. This is exact for memoryless workers. Otherwise they come in turn: the
    staleness is stretched, which is exact for workers of constant speed.

    Parameters
    ----------
    values
        Staleness, shape (m,).
    factor
        Ratio of the mean staleness.
    """
    mean, variance = float(values.mean()), float(values.var())
    if variance <= mean or not mean:
        return np.asarray(np.floor(factor * values + rng.random(len(values))), dtype=np.int64)
    if factor <= 1.0:
        return np.asarray(rng.binomial(values, factor), dtype=np.int64)
    shape = mean**2 / (variance - mean)
    ready = 1.0 + shape / mean
    more = rng.negative_binomial(shape + values, ready / (ready + factor - 1.0))
    return np.asarray(values + more, dtype=np.int64)


def _over(limit: Limit | None, free: Limit | None) -> float:
    return np.nan if limit is None or free is None else limit.value / free.value


def _beyond(values: Integers, cap: int | None, block: int) -> tuple[float, float, float]:
    """Return the share of the items beyond a cap, its standard error, and their mean excess."""
    if cap is None:
        return np.nan, np.nan, np.nan
    beyond = values > cap
    share = float(beyond.mean())
    delay = float((values[beyond] - cap).mean()) if share else 0.0
    return share, standard_error(beyond, block), delay


def _default_caps(values: Integers) -> list[int]:
    """Return the caps 1, 2, 4, ... that some but not all items exceed."""
    caps = 2 ** np.arange(20)
    worth = [int(cap) for cap in caps if np.any(values <= cap) and np.mean(values > cap) > _RARE]
    return worth[:_MOST_CAPS]


def _by_worker(study: RecordStudy, fit: StalenessFit, caps: Sequence[int]) -> pd.DataFrame | None:
    """Return the workers with items beyond the caps, those with most such items first."""
    sample, names = fit.sample, study.workers
    if sample.workers is None or names is None or not caps:
        return None
    table = names[["worker", "items", "share"]].copy()
    for cap in caps:
        beyond = np.bincount(sample.workers[sample.staleness > cap], minlength=len(table))
        table[f"beyond {cap}"] = beyond / table["items"].to_numpy()
    most = table[f"beyond {caps[0]}"] * table["items"]
    return table.loc[most.sort_values(ascending=False).index[:_MOST_ROWS]].reset_index(drop=True)


def _percent(choice: RecordChoice) -> str:
    return f"{100 * choice.beyond:.1f} +- {100 * choice.beyond_error:.1f} %"
