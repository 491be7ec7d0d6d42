"""The fitted staleness laws of a run: tests, diagnostics, and the one to predict with.

    fit = fit_staleness(staleness, workers=8)
    print(fit.verdict)
    fit.table()                                      # the laws side by side
    fit.laws["geometric"].confidence_interval()["mu"]
    fit.recommended.pmf(0)                           # the law a predictor should use

The laws are marginal: they give the share of each staleness, not the order of the values.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.profile import diagnostics, goodness, stragglers
from analysis.profile.counted import CountedSample
from analysis.profile.law_fit import LawFit, Sample
from analysis.profile.series import Nouns
from analysis.profile.verdict import (
    CLOSE,
    FAR,
    LEVEL,
    Grade,
    finding,
    in_words,
    name_in_words,
    recommendation,
)
from asgd.arrays import Array
from asgd.counted import counted
from asgd.rundir.files import replace_file
from asgd.seals import sealed_object
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import Geometric
from asgd.staleness.law import StalenessLaw

_FEW_EFFECTIVE = 80.0  # independent updates below which a warning accompanies the intervals
_INVISIBLE = 1e-3  # share of updates in the tail that the histogram leaves out
_LONGEST_HISTOGRAM = 10_000


@dataclass(frozen=True, repr=False, kw_only=True)
class StalenessFit:
    """The fitted staleness laws of one run, and the one to predict with.

    Attributes
    ----------
    laws
        Each fitted law by name.
    workers
        Number of workers, averaged if it changed, or None.
    start_up
        Updates dropped at the start, by `dependence.START_UP_RULE` or as given.
    sample
        The fitted series.
    worker_names
        The caller's names of workers 0, 1, ... of the sample, or None.
    left_out
        Deliveries of each straggler, by name; `sample` and `workers` exclude stragglers.
    unfitted
        The reason why a law could not be fitted, by its name.
    nouns
        Words for sentences.
    """

    laws: Mapping[str, LawFit]
    workers: float | None
    start_up: int
    sample: Sample | CountedSample
    worker_names: npt.NDArray[Any] | None
    left_out: Mapping[Any, int] = field(default_factory=dict)
    unfitted: Mapping[str, str] = field(default_factory=dict)
    nouns: Nouns = field(default_factory=Nouns)

    @property
    def geometric(self) -> LawFit:
        """The geometric fit."""
        return self.laws[Geometric.name]

    @property
    def mu(self) -> float:
        """Parameter of the geometric fit; near 1 - 1/P whatever the true law is."""
        return float(self.geometric.params["mu"])

    @cached_property
    def chi_square(self) -> goodness.ChiSquare:
        """Chi-square test of the geometric law."""
        return self.sample.chi_square(Geometric(self.mu))

    @property
    def grade(self) -> Grade:
        """How well the geometric law holds.

        "holds": neither the chi-square test nor the distance from the data rejects it at 1 %;
        "unclear": the same, but the distance is above `FAR`; "close": rejected, but the distance is
        below `CLOSE`; "rejected": otherwise.
        """
        fit = self.geometric
        if self.chi_square.pvalue >= LEVEL and fit.pvalue >= LEVEL:
            return "holds" if fit.tv < FAR else "unclear"
        return "close" if fit.tv < CLOSE else "rejected"

    @cached_property
    def selected(self) -> LawFit:
        """The law to predict with.

        The geometric law unless it is rejected at 1 %. Then the law of lowest AIC among the other
        parametric laws that their bootstrap does not reject at 1 %. If there is none, the measured
        law, or the law nearest to it if the measured one is too wide for a table.
        """
        if self.grade == "holds":
            return self.geometric
        names = [name for name in self.laws if name not in (Geometric.name, Empirical.name)]
        for fit in sorted((self.laws[name] for name in names), key=lambda fit: round(fit.aic, 6)):
            if fit.pvalue >= LEVEL:
                return fit
        nearest = min(self.laws.values(), key=lambda fit: fit.tv)
        return self.laws.get(Empirical.name, nearest)

    @property
    def recommended(self) -> StalenessLaw:
        """The law to predict with."""
        return self.selected.law

    @property
    def counts(self) -> pd.Series[Any]:
        """Number of updates with each staleness, after the start-up."""
        counts = self.sample.counts
        index = pd.Index(counts.staleness, name="staleness")
        return pd.Series(counts.updates, index, dtype=np.int64, name="updates")

    def histogram(self) -> tuple[Array, dict[str, Array]]:
        """Return the input of `figures.staleness_histogram`, without the invisible tail.

        Returns
        -------
        counts
            Number of updates with staleness 0, 1, ..., shape (l,).
        laws
            The pmf, shape (l,), of the geometric law and of the best other parametric law, by
            name in words.
        """
        counts = self.sample.counts
        beyond = 1.0 - np.cumsum(counts.updates) / counts.size
        last = int(counts.staleness[np.argmax(beyond <= _INVISIBLE)])
        length = min(last + 2, _LONGEST_HISTOGRAM)
        others = [n for n in self.table().index if n not in (Geometric.name, Empirical.name)]
        laws = (self.geometric.law, self.laws[others[0]].law)
        inside = counts.staleness < length
        shown = np.zeros(length)
        shown[counts.staleness[inside]] = counts.updates[inside]
        return shown, {in_words(law): law.pmf(np.arange(length)) for law in laws}

    @cached_property
    def effective_size(self) -> float:
        """Number of independent updates that would determine the mean equally well."""
        return self.sample.effective_size / self.sample.lost_variance

    def autocorrelation(self, max_lag: int = 50) -> Array:
        """Return the autocorrelation of staleness at lags 0, ..., max_lag; nan from counts."""
        return self.sample.autocorrelation(max_lag)

    @cached_property
    def shape(self) -> diagnostics.Shape:
        """Share of zeros and variance compared with the geometric law."""
        return self.sample.shape(self.workers)

    @cached_property
    def conservation(self) -> diagnostics.Conservation | None:
        """Mean staleness against workers - 1; None if the number of workers is unknown."""
        if self.workers is None:
            return None
        return self.sample.conservation(self.workers)

    @cached_property
    def per_worker(self) -> pd.DataFrame | None:
        """One row per worker; None if the workers are unknown."""
        return None if self.worker_names is None else self.sample.per_worker(self.worker_names)

    @cached_property
    def drift(self) -> diagnostics.Drift:
        """Whether the law changed over the run."""
        return self.sample.drift(self.start_up)

    @cached_property
    def verdict(self) -> str:
        """One sentence: whether the geometric law holds, which law should predict, and why."""
        end = recommendation(self.grade, self.geometric, self.selected, self.nouns.use)
        if self.nouns.replayed is not None:
            end += (
                f" With {self.nouns.replayed}, no law predicts: the replay of this staleness does."
            )
        return f"{self.finding}; {end}"

    @property
    def finding(self) -> str:
        """The first half of the verdict: whether the geometric law holds, and the evidence."""
        evidence = (self.geometric, self.shape, self.chi_square, self.workers)
        return finding(self.grade, *evidence, self.nouns.rows)

    def table(self) -> pd.DataFrame:
        """Return the laws side by side, best AIC first.

        Columns: law, parameters (free ones), mean, variance, zeros, llf, aic, bic, tv (total
        variation distance to the data) and pvalue (parametric bootstrap; missing for the measured
        law).
        """
        rows = [
            {
                "law": in_words(fit.law),
                "parameters": fit.law.n_parameters,
                "mean": fit.law.mean(),
                "variance": fit.law.var(),
                "zeros": float(fit.law.pmf(0)),
                "llf": fit.llf,
                "aic": fit.aic,
                "bic": fit.bic,
                "tv": fit.tv,
                "pvalue": np.nan if name == Empirical.name else fit.pvalue,
            }
            for name, fit in self.laws.items()
        ]
        return pd.DataFrame(rows, index=list(self.laws)).sort_values("aic", kind="stable")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; `law` is the law to predict with."""
        intervals = {
            name: {
                key: [np.ravel(limit).tolist() for limit in interval]
                if np.ndim(interval.low)
                else [float(limit) for limit in interval]
                for key, interval in fit.confidence_interval().items()
            }
            for name, fit in self.laws.items()
            if name != Empirical.name
        }
        laws = {
            name: {
                **fit.law.to_dict(),
                "confidence_interval": intervals.get(name),
                "llf": fit.llf,
                "aic": fit.aic,
                "bic": fit.bic,
                "tv": fit.tv,
                "pvalue": None if name == Empirical.name else fit.pvalue,
            }
            for name, fit in self.laws.items()
        }
        drift, workers = self.drift, self.per_worker
        return {
            "verdict": self.verdict,
            "grade": self.grade,
            "law": self.recommended.to_dict(),
            "mu": self.mu,
            "workers": self.workers,
            "left_out": {str(name): times for name, times in self.left_out.items()},
            "updates": self.sample.size,
            "start_up": self.start_up,
            "start_up_rule": self.sample.start_up_rule,
            "block": self.sample.block,
            "effective_size": self.effective_size,
            "chi_square": asdict(self.chi_square),
            "shape": asdict(self.shape),
            "conservation": None if self.conservation is None else asdict(self.conservation),
            "laws": laws,
            "unfitted": dict(self.unfitted),
            "counts": {
                "staleness": self.counts.index.tolist(),
                "updates": self.counts.tolist(),
            },
            "autocorrelation": [
                None if value != value else value for value in self.autocorrelation().tolist()
            ],
            "per_worker": None if workers is None else workers.to_dict(orient="list"),
            "drift": {
                "distance": drift.distance,
                "pvalue": drift.pvalue,
                "parts": drift.parts.to_dict(orient="list"),
            },
        }

    def save(self, directory: str | Path) -> None:
        """Write `profile.json` into a run directory."""
        replace_file(Path(directory) / "profile.json", sealed_object(self.to_dict()))

    def __repr__(self) -> str:
        return f"{self.summary}\n\n{self._shown().to_string()}\n\n{self.verdict}"

    def _repr_html_(self) -> str:
        """Return the table and the verdict for a notebook."""
        summary, sentence = html.escape(self.summary), html.escape(self.verdict)
        return f"<p>{summary}</p>{self._shown().to_html()}<p>{sentence}</p>"

    def _shown(self) -> pd.DataFrame:
        table = self.table().set_index("law")
        digits = {"llf": 1, "aic": 1, "bic": 1, "mean": 3, "variance": 2, "zeros": 4, "tv": 4}
        return table.round(digits | {"pvalue": 3})

    @property
    def summary(self) -> str:
        """The fitted updates, the mean staleness and mu, in a line or two."""
        low, high = self.geometric.confidence_interval()["mu"]
        text = stragglers.in_words(self.left_out, self.workers)
        text += "\n" if text else ""
        text += (
            f"{counted(self.sample.size, self.nouns.rows)}{self._of_steps} after "
            f"{self.start_up} of start-up; mean staleness {self.geometric.law.mean():.3f}"
        )
        text += f" {self.nouns.unit}" if self.nouns.unit else ""
        if self.conservation is not None:
            agrees = "as" if self.conservation.holds else "where"
            text += f", {agrees} P - 1 = {self.conservation.expected:.3g} is expected"
        text += f"; mu {self.mu:.4f} (95 % {low:.4f} to {high:.4f})"
        if self.effective_size < _FEW_EFFECTIVE:
            text += (
                f", of {self.effective_size:.0f} effectively independent {self.nouns.rows}: such "
                f"intervals of strongly dependent {self.nouns.rows} miss the truth more often than "
                "they say"
            )
        if self.drift.pvalue < LEVEL:
            text += (
                f"; the law drifts: its halves are {self.drift.distance:.3f} apart "
                f"(p = {self.drift.pvalue:.3f})"
            )
        for name, reason in self.unfitted.items():
            text += f"; the {name_in_words(name)} could not be fitted ({reason})"
        return text

    @property
    def _of_steps(self) -> str:
        number = self.sample.steps
        if number is None:
            return ""
        steps = counted(number, "steps")
        return f" of {steps}, as good as {self.effective_size:.0f} independent ones,"
