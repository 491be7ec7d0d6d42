"""Ends a run with success before its last update, where its configuration says so."""

from __future__ import annotations

from asgd.config.tables import RunConfig


def reached_target(config: RunConfig, loss: float, update: int) -> str | None:
    """Return that a loss is at `run.target_loss` or below, None if it is not."""
    target = config.run.target_loss
    if target is None or not loss <= target:
        return None
    return f"loss {loss:.4g} at update {update:,} reached run.target_loss = {target:g}"


def time_is_up(config: RunConfig, seconds: float) -> str | None:
    """Return that `run.max_seconds` have passed, None if they have not."""
    most = config.run.max_seconds
    if most is None or seconds < most:
        return None
    return f"run.max_seconds = {most:g} have passed"
