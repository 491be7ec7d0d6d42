"""The staleness of a record of means per step: a weighted mean, its drift, bounds; no law."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from analysis.profile.dependence import block_length, effective_size, lost_variance, standard_error
from asgd.arrays import Array
from asgd.counted import counted
from asgd.errors import UnreliableEstimateError
from asgd.records.columns import STEPS
from asgd.records.reader import Record

_LEAST_STEPS = 20
_DRIFTS = 3.0  # standard errors between the halves


@dataclass(frozen=True, kw_only=True)
class MeansProfile:
    """The staleness of a record of means per step.

    Attributes
    ----------
    unit
        Unit of the staleness.
    steps
        Number of steps.
    mean, standard_error
        Mean staleness, steps weighted by their items where these are known; the error allows for
        the dependence of neighbouring steps.
    weighted
        Whether the items of the steps are known.
    effective_steps
        Number of independent steps that would determine the mean equally well.
    smallest, largest
        Staleness of all items, None if the log does not say.
    first_half, second_half, halves_error
        Mean of each half, and the standard error of their difference.
    """

    unit: str
    steps: int
    mean: float
    standard_error: float
    weighted: bool
    effective_steps: float
    smallest: float | None
    largest: float | None
    first_half: float
    second_half: float
    halves_error: float

    @property
    def drifts(self) -> bool:
        """Whether the halves differ by more than three standard errors."""
        return abs(self.second_half - self.first_half) > _DRIFTS * self.halves_error

    def beyond(self, cap: int) -> tuple[float, float]:
        """Return bounds of the share of items with staleness above a cap.

        Any law with this mean m, on 0 to the largest value M, has at most m/(cap + 1) of its items
        above the cap (Markov), and at least (m - cap)/(M - cap).
        """
        largest = np.inf if self.largest is None else self.largest
        if cap >= largest:
            return 0.0, 0.0
        low = max(0.0, (self.mean - cap) / (largest - cap)) if np.isfinite(largest) else 0.0
        return low, min(1.0, self.mean / (cap + 1.0))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**asdict(self), "drifts": self.drifts, "law": None}

    def __str__(self) -> str:
        weighted = "weighted by items" if self.weighted else "every step counts the same"
        text = (
            f"{counted(self.steps, 'steps')}, as good as {self.effective_steps:.0f} independent "
            f"ones; mean staleness {self.mean:.3f} +- {self.standard_error:.3f} {self.unit} "
            f"({weighted})"
        )
        ends = [
            f"{name} {value:.4g}"
            for name, value in (("smallest", self.smallest), ("largest", self.largest))
            if value is not None
        ]
        text += f"; {', '.join(ends)}" if ends else ""
        move = f"from {self.first_half:.3f} in the first half to {self.second_half:.3f}"
        text += f"; it drifts {move}" if self.drifts else "; no drift between its halves"
        return (
            f"{text}.\n\nNo law can be fitted from means: laws of very different shape, with very "
            "different limits of the learning rate, have the same mean. Log one row per item."
        )


def profile_means(record: Record) -> MeansProfile:
    """Return the profile of a record of means.

    Raises
    ------
    UnreliableEstimateError
        There are fewer than 20 steps; the error carries the estimate.
    """
    columns = record.columns(STEPS, "mean", "max", "min", "items")
    mean, items = columns["mean"], columns["items"]
    weighted = bool(np.all(items > 0))
    weight = items / items.mean() if weighted else np.ones(len(mean))
    total = float(np.average(mean, weights=weight))
    influence = weight * (mean - total)
    block = block_length(mean)
    half = len(mean) // 2
    error = _error(influence, block)
    errors = [_error(part, min(block, max(half // 4, 1))) for part in np.array_split(influence, 2)]
    found = MeansProfile(
        unit=record.about.unit,
        steps=len(mean),
        mean=total,
        standard_error=error,
        weighted=weighted,
        effective_steps=effective_size(influence, block) / lost_variance(influence, block),
        smallest=_end(columns["min"], np.nanmin),
        largest=_end(columns["max"], np.nanmax),
        first_half=float(np.average(mean[:half], weights=weight[:half])) if half else total,
        second_half=float(np.average(mean[half:], weights=weight[half:])),
        halves_error=float(np.linalg.norm(errors)),
    )
    if len(mean) < _LEAST_STEPS:
        raise UnreliableEstimateError(
            f"{record.path}: {counted(len(mean), 'steps')}; expected at least {_LEAST_STEPS}", found
        )
    return found


def _error(influence: Array, block: int) -> float:
    return standard_error(influence, block) * float(np.sqrt(lost_variance(influence, block)))


def _end(values: Array, choose: Any) -> float | None:
    return float(choose(values)) if np.any(np.isfinite(values)) else None
