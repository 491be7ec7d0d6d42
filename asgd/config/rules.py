"""The keys of each update rule."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from asgd.errors import did_you_mean

_MOMENTS = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
_FACTOR = {"momentum": 0.9}
# The keys of each rule with their defaults; None has no default and must be given.
RULES: dict[str, dict[str, float | None]] = {
    "sgd": {},
    "momentum": {**_FACTOR},
    "nesterov": {**_FACTOR},
    "corrected_momentum": {**_FACTOR},
    "adam": {**_MOMENTS},
    "adamw": {**_MOMENTS, "weight_decay": 0.01},
    "rmsprop": {"beta2": 0.99, "epsilon": 1e-8},
    "staleness_aware": {},
    "staleness_power": {"exponent": 0.5},
    "capped": {"cap": None},
    "delay_compensated": {"compensation": 0.04},
}
RULE_KEYS = (*sorted({key for keys in RULES.values() for key in keys}), "options")
# Rules for local steps, whose gradients are never stale.
LOCAL_RULES = ("sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop")
MOST_SAMPLES = 2**31 - 1  # of a push: the trace stores their number in four bytes
LOCAL_KEYS = ("local_rule", "local_learning_rate", "local_state", "local_options")


def check_local(rule: str, batch_size: int, given: Mapping[str, Any]) -> None:
    """Refuse keys of local steps that do not go together.

    Parameters
    ----------
    rule
        The rule of the server.
    batch_size
        The largest of the run.
    given
        The values of `local_steps` and `LOCAL_KEYS`, None or empty if they are not given.

    Raises
    ------
    ValueError
        A key is missing or does not go with another.
    """
    steps = given["local_steps"]
    if steps is None:
        for key in LOCAL_KEYS:
            if given[key] not in (None, {}, "reset"):
                raise ValueError(f"{key} = {given[key]!r} needs local_steps: expected both")
        return
    if given["local_learning_rate"] is None:
        raise ValueError(
            f"local_steps = {steps} needs local_learning_rate: expected the learning rate of a "
            "worker's own steps; learning_rate is then that of the server, 1 for the whole "
            "difference"
        )
    if steps * batch_size > MOST_SAMPLES:
        raise ValueError(
            f"local_steps = {steps} with batch_size = {batch_size}: expected at most "
            f"{MOST_SAMPLES:,} samples together"
        )
    if rule == "delay_compensated":
        raise ValueError(
            f"local_steps = {steps} does not go with rule = {rule!r}, which compensates gradients, "
            "not differences"
        )


def check_local_rule(rule: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of a built-in rule for local steps.

    Raises
    ------
    ValueError
        There is no such rule for local steps, or it does not take one of the options.
    """
    if rule not in LOCAL_RULES:
        raise ValueError(
            f"local_rule = {rule!r}: {did_you_mean(rule, LOCAL_RULES)}expected "
            f'{", ".join(LOCAL_RULES)} or "package.module:Name"'
        )
    keys = tuple(RULES[rule])
    for key, value in options.items():
        if key not in keys:
            raise ValueError(
                f"local_options.{key} = {value!r} does not belong to local_rule = {rule!r}, which "
                f"takes {', '.join(keys) or 'none'}"
            )
    return keys


def _rules_with(key: str) -> str:
    *others, last = [rule for rule, keys in RULES.items() if key in keys] or ["a rule of your own"]
    return f"{', '.join(others)} or {last}" if others else last


def left_out(rule: str, own: bool, given: Mapping[str, Any]) -> dict[str, float]:
    """Return the defaults of the keys of a rule that are not given.

    Parameters
    ----------
    own
        Whether the rule is user-defined; such a rule takes `options` alone.
    given
        The values of `RULE_KEYS`, None or empty if they are not given.

    Raises
    ------
    ValueError
        There is no such rule, it does not take a given key, or it needs a missing one.
    """
    if rule not in RULES and not own:
        hint = did_you_mean(rule, RULES)
        raise ValueError(
            f'rule = {rule!r}: {hint}expected {", ".join(RULES)} or "package.module:Name"'
        )
    takes: Collection[str] = ("options",) if own else RULES[rule]
    for key, value in given.items():
        if value not in (None, {}) and key not in takes:
            raise ValueError(
                f"{key} = {value!r} does not belong to rule = {rule!r}: expected it with "
                f"{_rules_with(key)}"
            )
    defaults: dict[str, float] = {}
    for key, default in RULES.get(rule, {}).items():
        if given[key] is not None:
            continue
        if default is None:
            raise ValueError(f"rule = {rule!r} needs {key}: expected a number > 0")
        defaults[key] = default
    return defaults
