"""The row of a plan: predictions for one choice, and remarks on them (ours)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from analysis.exact.limits import StabilityLimits, Verdict
from analysis.planning.choices import Choice
from analysis.planning.pace import Pace
from analysis.planning.paths import PlannedPaths
from analysis.prediction.run_stability import FEW_DIVERGE
from analysis.profile.verdict import in_words
from asgd.arrays import Array, Integers

HEADS = (
    *("", "workers", "rate", "batch", "staleness", "law", "updates/s"),
    *("of limit", "updates", "seconds", "final loss", "paths", ""),
)

_SURE = 2.0  # standard errors added to a mean loss
_FEW_SWING = 0.05  # share of swinging paths up to which there is no remark
CLEARLY_STABLE = 0.5  # of the almost-sure limit: below it the mean-square limit is not computed
_NEAR = 1.3  # factor on the learning rate within which a limit is near
_RISEN = 0.05  # share of the fall of the loss; smaller rises are scatter


@dataclass(frozen=True)
class PointLimits:
    """The learning rate compared with its limits at one point of a run.

    Attributes
    ----------
    learning_rate
        Learning rate at the point.
    limits
        Limits for the largest curvature; None if it is not positive or limits are unknown.
    """

    learning_rate: float
    limits: StabilityLimits | None

    @property
    def verdict(self) -> Verdict:
        """The fate of a run on a quadratic with this curvature."""
        if self.limits is None or self.of_limit < CLEARLY_STABLE:
            return "stable"
        return self.limits.classify(self.learning_rate)

    @property
    def of_limit(self) -> float:
        """The learning rate over the almost-sure limit."""
        return self.learning_rate / self.limits.almost_sure.value if self.limits else 0.0

    @property
    def near(self) -> bool:
        """Whether the mean-square limit is near."""
        second = self.limits.mean_square if self.limits else None
        return second is not None and self.learning_rate * _NEAR > second.value


@dataclass(frozen=True)
class PlanRow:
    """The predictions for one choice.

    Attributes
    ----------
    choice
        Workers, learning rate, batch size.
    pace
        Staleness and speed.
    paths
        Simulated runs of the choice.
    start, end
        Limits at the start of the paths and at the end of a typical one.
    updates_to_target, seconds_to_target
        Updates and seconds until the loss reaches the target; None if it does not.
    """

    choice: Choice
    pace: Pace
    paths: PlannedPaths
    start: PointLimits
    end: PointLimits
    updates_to_target: int | None = None
    seconds_to_target: float | None = None

    @cached_property
    def stable(self) -> bool:
        """Whether paths stay bounded, and would stay so over more updates."""
        if self.paths.diverged.mean() > FEW_DIVERGE:
            return False
        if self.start.verdict != "diverges":
            return True
        if self.median[-1] > self.median[0]:  # where a network saturates, its curvature is gone
            return False
        return self.end.verdict != "diverges" or not (self._swings > 0.5 or self._rises)

    @cached_property
    def heavy_tailed(self) -> bool:
        """Whether excursions of single paths dominate, or may dominate, every average."""
        thrown = self.paths.diverged.any() or self._swings > _FEW_SWING
        return bool(thrown) or self.end.verdict != "stable"

    @property
    def recommendable(self) -> bool:
        """Whether the plan may recommend this choice."""
        return self.stable and not self.heavy_tailed

    @property
    def remark(self) -> str:
        """Why the row needs care; "" if it does not."""
        diverged, paths = int(self.paths.diverged.sum()), self.paths.paths
        if not self.stable:
            if diverged:
                given_up = self.paths.reached < self.paths.update[-1]
                until = f" by update {self.paths.reached:,}" if given_up else ""
                return f"unstable: {diverged} of {paths} paths diverge{until}"
            if self.end.verdict != "diverges":
                return "unstable: above the limit at the start, and ends above its start"
            return "unstable: above every limit, and swings"
        if diverged:
            return f"heavy tail: {diverged} of {paths} paths diverge"
        if self.end.verdict == "heavy tail":
            return "heavy tail"
        if self.end.verdict == "diverges":
            return "above the limit at the end"
        if self._swings > _FEW_SWING:
            return "heavy tail: swings above its start"
        if self._rises:
            return "growing at the end"
        if self.start.verdict == "diverges":
            return "above the limit at the start"
        return "near the limit" if self.end.near else ""

    @property
    def of_limit(self) -> float:
        """The learning rate over the almost-sure limit, at the tighter point."""
        return max(self.start.of_limit, self.end.of_limit)

    @property
    def diverges_from(self) -> float:
        """The learning rate above which every run diverges; under a schedule its first value."""
        share = self.of_limit
        return self.choice.learning_rate / share if share else np.inf

    @cached_property
    def mean(self) -> Array:
        """Mean loss over the paths that stay bounded, shape (m,)."""
        return np.asarray(self.paths.loss[:, ~self.paths.diverged].mean(axis=1))

    @cached_property
    def median(self) -> Array:
        """Median loss over the paths, shape (m,)."""
        loss = np.where(np.isnan(self.paths.loss), np.inf, self.paths.loss)
        return np.median(loss, axis=1)

    @property
    def curve(self) -> Array | None:
        """Mean loss, or median loss if heavy-tailed, shape (m,); None if unstable."""
        if not self.stable:
            return None
        return self.median if self.heavy_tailed else self.mean

    @property
    def lowest(self) -> float | None:
        """The lowest loss of the curve, raised by the scatter of the paths.

        None if unstable. The minimum of a noisy mean depends on chance: a target close to it could
        be reached at any time.
        """
        if self.curve is None:
            return None
        kept = self.paths.loss[:, ~self.paths.diverged]
        error = kept.std(axis=1) / np.sqrt(kept.shape[1])
        return float((self.curve + _SURE * error).min())

    @cached_property
    def _swings(self) -> float:
        """Share of the paths whose loss rises further above its start than the median falls."""
        start = self.paths.loss[0, 0]
        kept = self.paths.loss[:, ~self.paths.diverged]
        if not kept.shape[1]:
            return 1.0
        way = start - min(float(self.median.min()), start)
        return float((kept.max(axis=0) > start + way).mean()) if way > 0 else 0.0

    @cached_property
    def _rises(self) -> bool:
        """Whether the typical loss rises at its end at a growing rate, by more than scatter."""
        update = self.paths.update
        even = np.interp(np.linspace(0, update[-1], 80), update, self.median)
        second, third, last = (float(part.max()) for part in np.array_split(even, 4)[1:])
        rise = last - third
        return rise > max(third - second, 0.0) and rise > _RISEN * float(even[0] - even.min())

    def at_target(self, target: float) -> tuple[int | None, float | None]:
        """Return the updates and the seconds until the loss is at the target."""
        if self.curve is None:
            return None, None
        updates = updates_to(self.paths.update, self.curve, target)
        if updates is None:
            return None, None
        return updates, float(np.interp(updates, self.paths.update, self.paths.seconds))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; numbers can be infinite."""
        curve = self.curve
        shown = curve is not None
        return {
            "workers": self.choice.workers,
            "learning_rate": self.choice.learning_rate,
            "batch_size": self.choice.batch_size,
            "mean_staleness": self.pace.law.mean(),
            "law": self.pace.law.to_dict(),
            "updates_per_second": self.pace.updates_per_second,
            "diverges_from": self.diverges_from,
            "of_limit": self.of_limit,
            "stable": self.stable,
            "heavy_tailed": self.heavy_tailed,
            "recommendable": self.recommendable,
            "remark": self.remark,
            "paths": self.paths.paths,
            "diverged_paths": int(self.paths.diverged.sum()),
            "updates_to_target": self.updates_to_target,
            "seconds_to_target": self.seconds_to_target,
            "final_loss": None if curve is None else float(curve[-1]),
            "update": self.paths.update.tolist() if shown else [],
            "loss_mean": self.mean.tolist() if shown else [],
            "loss_median": self.median.tolist() if shown else [],
            "loss_std": np.nanstd(self.paths.loss, axis=1).tolist() if shown else [],
        }

    def cells(self, mark: str) -> tuple[str, ...]:
        """Return the row as text, under `HEADS`."""
        curve, law = self.curve, self.pace.law
        missing = "" if curve is None else "not reached"
        updates, seconds = self.updates_to_target, self.seconds_to_target
        return (
            mark,
            str(self.choice.workers),
            f"{self.choice.learning_rate:g}",
            str(self.choice.batch_size),
            f"{law.mean():.2f}",
            "queue" if law.name == "empirical" else in_words(law).removesuffix(" law"),
            f"{self.pace.updates_per_second:,.4g}",
            f"{100 * self.of_limit:.3g} %" if self.of_limit else "",
            missing if updates is None else f"{updates:,}",
            "" if seconds is None else f"{seconds:.3g}",
            "" if curve is None else f"{curve[-1]:.4g}",
            str(self.paths.paths),
            self.remark,
        )


def updates_to(update: Integers, loss: Array, target: float) -> int | None:
    """Return the first update at which a curve is at or below the target, None if it never is.

    The curve is interpolated linearly between recorded updates.

    Parameters
    ----------
    update, loss
        Shape (m,), ascending in `update`.
    """
    below = np.flatnonzero(loss <= target)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return int(update[0])
    if not np.isfinite(loss[i - 1]):
        return int(update[i])
    share = (loss[i - 1] - target) / (loss[i - 1] - loss[i])
    return int(np.ceil(update[i - 1] + share * (update[i] - update[i - 1])))
