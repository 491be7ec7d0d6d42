"""Makes the rule of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from asgd.config.rules import RULES
from asgd.config.tables import OptimizerConfig, RunConfig
from asgd.errors import InputError
from asgd.rules.adam import Adam, AdamW
from asgd.rules.base import Rule
from asgd.rules.capped import Capped
from asgd.rules.clipped import Clipped
from asgd.rules.corrected_momentum import CorrectedMomentum
from asgd.rules.delay_compensated import DelayCompensated
from asgd.rules.heavy_ball import HeavyBall
from asgd.rules.nesterov import Nesterov
from asgd.rules.rmsprop import RmsProp
from asgd.rules.sgd import Sgd
from asgd.rules.staleness_power import StalenessPower


def make_rule(config: RunConfig) -> Rule:
    """Return the configured rule.

    Raises
    ------
    InputError
        A user-defined rule cannot be imported or does not keep the contract, or the rule does not
        go with the mode.
    """
    optimizer, mode = config.optimizer, config.cluster.mode
    rule = _make(optimizer)
    if rule.reads and mode != "async":
        raise InputError(
            f'optimizer.rule = {optimizer.rule!r}: expected cluster.mode = "async", because it '
            f"needs the snapshot of each gradient, and in mode {mode!r} updates may be means of "
            "gradients at different snapshots"
        )
    return rule if optimizer.clip_norm is None else Clipped(rule, optimizer.clip_norm)


def make_local_rule(config: RunConfig) -> Rule | None:
    """Return the rule of the local steps; None without local steps.

    Raises
    ------
    InputError
        A user-defined rule cannot be imported, does not keep the contract, or `reads`.
    """
    local = config.optimizer.local
    if local is None:
        return None
    rule = _make(local, "local_")
    if rule.reads:
        raise InputError(
            f"optimizer.local_rule = {local.rule!r}: expected it as optimizer.rule, because it "
            "needs the snapshot of each gradient, and local gradients are not stale"
        )
    return rule


def _make(optimizer: OptimizerConfig, prefix: str = "") -> Rule:
    if optimizer.is_own_rule:
        from asgd.rules.own import load_rule

        return load_rule(optimizer.rule, optimizer.options, prefix)
    return _RULES[optimizer.rule](**{key: getattr(optimizer, key) for key in RULES[optimizer.rule]})


_RULES: dict[str, Callable[..., Rule]] = {
    "sgd": Sgd,
    "momentum": HeavyBall,
    "nesterov": Nesterov,
    "corrected_momentum": CorrectedMomentum,
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RmsProp,
    "staleness_aware": partial(StalenessPower, 1.0),
    "staleness_power": StalenessPower,
    "capped": Capped,
    "delay_compensated": DelayCompensated,
}
