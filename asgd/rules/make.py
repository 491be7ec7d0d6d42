"""Makes the rule of a configuration."""

from __future__ import annotations

from asgd.config import OptimizerConfig
from asgd.rules.base import Rule
from asgd.rules.clipped import Clipped
from asgd.rules.heavy_ball import HeavyBall
from asgd.rules.sgd import Sgd
from asgd.rules.staleness_power import StalenessPower


def make_rule(optimizer: OptimizerConfig) -> Rule:
    """Return the configured rule."""
    rule = _make(optimizer)
    return rule if optimizer.clip_norm is None else Clipped(rule, optimizer.clip_norm)


def _make(optimizer: OptimizerConfig) -> Rule:
    match optimizer.rule:
        case "momentum":
            return HeavyBall(optimizer.momentum)
        case "staleness_aware":
            return StalenessPower(1.0)
    return Sgd()
