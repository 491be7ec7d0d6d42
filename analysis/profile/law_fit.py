"""A fitted staleness law: estimate, intervals, goodness of fit.

Intervals and tests resample blocks of neighbouring updates, so they allow for serial dependence.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import norm, t

from analysis.profile import diagnostics, goodness
from analysis.profile.cells import INTERVAL_RESAMPLES, Cells
from analysis.profile.counted import CountedSample
from analysis.profile.dependence import (
    START_UP_RULE,
    autocorrelation,
    effective_size,
    lost_variance,
    step_means,
)
from analysis.profile.estimators import ESTIMATORS, Counts, log_likelihood
from asgd.arrays import Array, Integers
from asgd.errors import InputError
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import Geometric
from asgd.staleness.law import StalenessLaw
from asgd.streams import stream

GOODNESS_RESAMPLES = 199


class ConfidenceInterval(NamedTuple):
    """Limits of a parameter; arrays for a parameter that is a sequence."""

    low: Any
    high: Any


@dataclass(frozen=True)
class Sample:
    """A stationary staleness series and the settings of its resampling.

    Attributes
    ----------
    staleness
        In order of update, shape (m,).
    workers
        Worker 0, 1, ... of each update, shape (m,), or None.
    block
        Length of the blocks in updates, longer than the serial dependence.
    seed
        Seed of every resampling.
    step
        Step of each update, shape (m,), not decreasing, if steps have several updates; those of a
        step are one cluster.
    """

    staleness: Integers
    workers: Integers | None
    block: int
    seed: int
    step: Integers | None = None

    start_up_rule: ClassVar[str] = START_UP_RULE

    @property
    def size(self) -> int:
        """Number of updates."""
        return len(self.staleness)

    @property
    def blocks(self) -> float:
        """Number of disjoint blocks."""
        return self.size / self.block

    @property
    def steps(self) -> int | None:
        """Number of steps, None if each update is one of its own."""
        return None if self.step is None else int(np.count_nonzero(np.diff(self.step))) + 1

    @property
    def n_workers(self) -> int:
        """Number of workers, 0 if they are unknown."""
        return 0 if self.workers is None else int(self.workers.max()) + 1

    @cached_property
    def counts(self) -> Counts:
        """The histogram."""
        return Counts.of(self.staleness, self.workers, self.n_workers)

    @cached_property
    def resampled(self) -> list[Counts]:
        """Histograms of moving-block resamples."""
        rng = stream(self.seed, "staleness intervals")
        cells = Cells.of(self.staleness, self.block, self.workers)
        return list(cells.resamples(INTERVAL_RESAMPLES, rng))

    @cached_property
    def lost_variance(self) -> float:
        """Factor by which short blocks underestimate the variance of the mean, at least 1."""
        if self.step is None:
            return lost_variance(self.staleness, self.block)
        means = step_means(self.staleness, self.step)
        steps = self.block * len(means) / len(self.staleness)
        # A block of b steps that cuts one in two holds the variance of b - 1/3 at worst.
        return lost_variance(means, max(1, round(steps))) / (1.0 - 1.0 / (3.0 * max(steps, 1.0)))

    @cached_property
    def effective_size(self) -> float:
        """See `dependence.effective_size`."""
        return effective_size(self.staleness, self.block)

    def autocorrelation(self, max_lag: int) -> Array:
        """See `dependence.autocorrelation`."""
        return autocorrelation(self.staleness, max_lag)

    def shape(self, workers: float | None) -> diagnostics.Shape:
        """See `diagnostics.shape`."""
        return diagnostics.shape(self.staleness, workers, self.block)

    def conservation(self, workers: float) -> diagnostics.Conservation:
        """See `diagnostics.conservation`."""
        return diagnostics.conservation(self.staleness, workers, self.block)

    def per_worker(self, names: npt.NDArray[Any]) -> pd.DataFrame | None:
        """See `diagnostics.per_worker`; None if the workers are unknown."""
        if self.workers is None:
            return None
        return diagnostics.per_worker(self.staleness, names[self.workers])

    def drift(self, start_up: int) -> diagnostics.Drift:
        """See `diagnostics.drift`."""
        rng = stream(self.seed, "staleness drift")
        return diagnostics.drift(self.staleness, start_up, self.block, rng)

    def chi_square(self, law: Geometric) -> goodness.ChiSquare:
        """See `goodness.chi_square`."""
        return goodness.chi_square(self.staleness, law, self.block)

    def with_law(self, law: StalenessLaw, rng: np.random.Generator) -> Cells:
        """Return the cells of a series with this law and the serial dependence of this one."""
        return Cells.of(goodness.with_law(law, self.staleness, rng), self.block, self.workers)


@dataclass(frozen=True)
class LawFit:
    """One law, fitted by maximum likelihood.

    Attributes
    ----------
    law
        The fitted law.
    llf
        Log-likelihood in nats, computed as for independent values.
    aic, bic
        Information criteria.
    tv
        Total variation distance to the measured frequencies.
    sample
        The fitted series.
    """

    law: StalenessLaw
    llf: float
    aic: float
    bic: float
    tv: float
    sample: Sample | CountedSample = field(repr=False)

    @classmethod
    def of(cls, name: str, sample: Sample | CountedSample) -> LawFit:
        """Fit the law called `name`.

        Raises
        ------
        InputError
            The law cannot be fitted to this sample.
        """
        counts = sample.counts
        law = ESTIMATORS[name](counts, None)
        llf, free = log_likelihood(law, counts), law.n_parameters
        aic, bic = 2.0 * free - 2.0 * llf, free * float(np.log(counts.size)) - 2.0 * llf
        return cls(law, llf, aic, bic, goodness.total_variation(law, counts), sample)

    @property
    def name(self) -> str:
        """The law's name."""
        return self.law.name

    @property
    def params(self) -> dict[str, Any]:
        """The law's parameters by name."""
        return self.law.params

    def confidence_interval(
        self,
        confidence_level: float = 0.95,
        method: Literal["percentile", "normal"] = "percentile",
    ) -> dict[str, ConfidenceInterval]:
        """Return an interval for each parameter, from refits of moving-block resamples.

        The interval is widened by Student's law for few blocks, and by `lost_variance` for blocks
        shorter than the dependence.

        Parameters
        ----------
        confidence_level
            Probability that the interval covers the true value.
        method
            "percentile": quantiles of the refits; "normal": estimate +- z standard deviations of
            the refits.
        """
        if not 0.0 < confidence_level < 1.0:
            raise InputError(f"confidence_level = {confidence_level}: expected 0 < level < 1")
        refits, estimate = self._refits, _vector(self.law, self.law)
        # overlapping blocks determine a variance as well as 1.5 times as many disjoint ones
        freedom = 1.5 * self.sample.blocks
        wide = t.ppf(0.5 + confidence_level / 2.0, freedom) * np.sqrt(self.sample.lost_variance)
        if method == "percentile":
            low, high = np.quantile(refits, norm.cdf([-wide, wide]), axis=0)
        elif method == "normal":
            width = wide * refits.std(axis=0, ddof=1)
            low, high = estimate - width, estimate + width
        else:
            raise InputError(f"method = {method!r}: expected percentile or normal")
        intervals, at = {}, 0
        for key, value in self.params.items():
            size = np.size(value)
            part = slice(at, at + size) if isinstance(value, tuple) else at
            intervals[key] = ConfidenceInterval(low[part], high[part])
            at += size
        return intervals

    @cached_property
    def _refits(self) -> Array:
        estimate = ESTIMATORS[self.name]
        refits = []
        for counts in self.sample.resampled:
            with suppress(InputError):  # the law cannot be fitted to this resample
                refits.append(_vector(estimate(counts, self.law), self.law))
        return np.array(refits or [_vector(self.law, self.law) * np.nan])

    def goodness_of_fit(
        self,
        statistic: goodness.Statistic = "tv",
        resamples: int = GOODNESS_RESAMPLES,
    ) -> goodness.GoodnessOfFit:
        """Test the law by a parametric bootstrap that keeps the serial dependence.

        Parameters
        ----------
        statistic
            "tv" total variation distance, "ks" largest difference of the distribution functions,
            "cvm" their mean square difference.
        resamples
            Number of bootstrap samples; the smallest possible p-value is 1/(1 + resamples).
        """
        rng = stream(self.sample.seed, f"goodness {self.name} {statistic}")
        return goodness.parametric_bootstrap(
            self.law,
            self.sample.counts,
            self.sample.with_law(self.law, rng),
            statistic=statistic,
            resamples=resamples,
            rng=rng,
        )

    @cached_property
    def pvalue(self) -> float:
        """P-value of the total variation distance."""
        return self.goodness_of_fit().pvalue

    def work_out(self) -> None:
        """Run the resamplings now; otherwise they run on first access."""
        self.confidence_interval()
        if self.name != Empirical.name:
            _ = self.pvalue


def _vector(law: StalenessLaw, like: StalenessLaw) -> Array:
    """Return the parameters as one vector; pad an empirical law to the length of `like`'s."""
    if isinstance(law, Empirical) and isinstance(like, Empirical):
        return np.append(law.pmf(np.arange(len(like.probabilities))), law.tail_mu)
    return np.concatenate([np.ravel(value) for value in law.params.values()]).astype(float)
