"""A predicted loss curve, from simulated paths or from the cumulants of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from analysis.models.blocks import shared
from analysis.models.ensemble import Ensemble
from asgd.arrays import Array, Integers

# Levels i/40: they include the 5 % and 95 % ends of the band and form an even grid for the CRPS.
SCORED_LEVELS = np.arange(1, 40) / 40.0


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """The distribution of f(x_k) at some updates.

    Attributes
    ----------
    update
        Shape (m,).
    mean, std
        Of the loss, shape (m,).
    quantiles
        At `SCORED_LEVELS`, shape (m, q).
    paths
        Number of simulated paths; None without simulation.
    end
        Mean of x after the last update, shape (d,); of paths from k starts one for each, (k, d).
    mean_error
        Standard error of the mean due to drawn paths or reads, shape (m,); zero if none were
        drawn.
    unstable_from
        First update without values, because the method fails there; or None.
    diverged
        Number of simulated paths that end at no finite point.
    """

    update: Integers
    mean: Array
    std: Array
    quantiles: Array
    paths: int | None
    end: Array
    mean_error: Array
    unstable_from: int | None = None
    diverged: int = 0

    def cut(self, update: int) -> LossCurve:
        """Return the curve without its values from `update` on."""
        lost = self.update >= update
        kept = {
            name: getattr(self, name).copy() for name in ("mean", "std", "quantiles", "mean_error")
        }
        for column in kept.values():
            column[lost] = np.nan
        return replace(self, **kept, end=np.full_like(self.end, np.nan), unstable_from=update)

    @classmethod
    def of_ensemble(cls, ensemble: Ensemble, starts: int = 1) -> LossCurve:
        """Take the curve from an ensemble recorded at `SCORED_LEVELS`.

        `end` is a mean for each start, because a mean over all of them may lie near no path.
        """
        start = shared(slice(0, ensemble.paths), ensemble.paths, starts)
        first = np.unique(start, return_index=True)[1]
        ends = [part.mean(axis=0, dtype=float) for part in np.split(ensemble.final, first[1:])]
        return cls(
            update=ensemble.update,
            mean=ensemble.loss_mean,
            std=ensemble.loss_std,
            quantiles=ensemble.loss_quantiles,
            paths=ensemble.paths,
            end=ends[0] if len(ends) == 1 else np.stack(ends),
            mean_error=ensemble.loss_std / math.sqrt(ensemble.paths),
            diverged=int((~np.isfinite(ensemble.final).all(axis=1)).sum()),
        )

    @classmethod
    def of_cumulants(
        cls,
        update: Integers,
        first: Array,
        second: Array,
        third: Array,
        *,
        end: Array,
        mean_error: Array | None = None,
    ) -> LossCurve:
        """Take the quantiles of the shifted gamma law with the given cumulants (Pearson III).

        The loss near a minimum is a quadratic form of a nearly normal point. For one mode the form
        has exactly this law; for many modes both tend to the normal law.

        Parameters
        ----------
        first, second, third
            Mean, variance and third central moment of the loss, shape (m,).
        end
            Mean of x after the last update, shape (d,).
        mean_error
            Standard error of the mean, shape (m,); default zero.
        """
        from scipy.special import gammaincinv, ndtri

        std = np.sqrt(np.maximum(second, 0.0))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            skew = np.where(std > 0, third / std**3, 0.0)[:, None]
            shape = 4.0 / skew**2
            levels = np.where(skew < 0, 1.0 - SCORED_LEVELS, SCORED_LEVELS)
            gamma = np.sign(skew) * (gammaincinv(shape, levels) - shape) / np.sqrt(shape)
            # A gamma law of large shape is nearly normal, and its inverse is inexact.
            standard = np.where(np.abs(skew) > 1e-2, gamma, ndtri(SCORED_LEVELS))
            quantiles = first[:, None] + std[:, None] * standard
        return cls(
            update=update,
            mean=first,
            std=std,
            quantiles=quantiles,
            paths=None,
            end=end,
            mean_error=np.zeros_like(std) if mean_error is None else mean_error,
        )
