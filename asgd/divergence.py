"""Detects divergence of real and simulated runs."""

from __future__ import annotations

import numpy as np

from asgd.arrays import Array
from asgd.config.tables import RunConfig
from asgd.errors import DivergedError
from asgd.schedules import learning_rate_schedule

DIVERGED = "the run diverged"  # start of every message

NOT_FINITE = "not finite"  # start of the defect of a gradient with nan or inf


def not_finite(gradient: Array) -> str:
    """Return the defect of a gradient with nan or inf; the text tells an overflow in float32."""
    if gradient.dtype == np.float32 and np.isinf(gradient).any():
        return f"{NOT_FINITE} in float32, which ends at 3.4e38"
    return NOT_FINITE


def remedy(update: int) -> str:
    """Return advice for a gradient that is not finite after `update` updates."""
    if update == 0:  # the learning rate cannot be the cause
        return "this is at the initial point: check the data for NaN or very large numbers"
    return "lower optimizer.learning_rate, or check the problem's gradient"


def check_divergence(config: RunConfig, first: float, latest: float, update: int) -> None:
    """Refuse a loss that is not finite or far above the first one.

    Parameters
    ----------
    first
        Loss at x_0.
    latest, update
        A later loss, and its number of applied updates.

    Raises
    ------
    DivergedError
        The loss is not finite, or above `divergence_factor` times the larger of `first` and 1.
    """
    limit = config.run.divergence_factor * max(1.0, abs(first))
    if not latest <= limit:
        largest = learning_rate_schedule(config.optimizer).array(max(1, update)).max()
        raise DivergedError(
            f"{DIVERGED}: loss {latest:.3g} at update {update}, {first:.3g} at the start; "
            f"learning_rate = {largest} is too large for this staleness"
        )
