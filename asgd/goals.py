"""Goals in a configuration that end a run, with success, before its last update."""

from __future__ import annotations

from asgd.config.tables import RunConfig


def reached_target(config: RunConfig, loss: float, update: int) -> str | None:
    """Return the reason to end a run if a loss is at `run.target_loss` or below, else None."""
    target = config.run.target_loss
    if target is None or not loss <= target:
        return None
    return f"loss {loss:.4g} at update {update:,} reached run.target_loss = {target:g}"


def time_is_up(config: RunConfig, seconds: float) -> str | None:
    """Return the reason to end a run if `run.max_seconds` have passed, else None."""
    most = config.run.max_seconds
    if most is None or seconds < most:
        return None
    return f"run.max_seconds = {most:g} have passed"
