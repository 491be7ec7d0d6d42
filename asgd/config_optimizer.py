"""The table `[optimizer]` of a configuration."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

import msgspec

from asgd.config_defects import explained
from asgd.config_rules import LOCAL_KEYS, RULE_KEYS, check_local, check_local_rule, left_out
from asgd.config_table import Count, NonNegative, Positive, Share, Table, names_code


class LearningRateSchedule(Table, frozen=True):
    """Changes of the learning rate: it is `values[i]` from update `at[i]` on."""

    at: list[Count] = []
    values: list[Positive] = []

    def __post_init__(self) -> None:
        _check_changes(self.at, self.values)


class BatchSchedule(Table, frozen=True):
    """Changes of the batch size: it is `values[i]` for snapshots of version `at[i]` and later.

    The server sends the batch size together with the snapshot.
    """

    at: list[Count] = []
    values: list[Count] = []

    def __post_init__(self) -> None:
        _check_changes(self.at, self.values)


def _check_changes(at: list[int], values: list[Any]) -> None:
    if len(at) != len(values):
        raise ValueError(f"at has {len(at)} entries, values has {len(values)}: expected equal")
    if any(later <= earlier for earlier, later in itertools.pairwise(at)):
        raise ValueError(f"at = {at}: expected increasing update numbers")


class OptimizerConfig(Table, frozen=True):
    """The update rule, the learning rate and the batch size (samples per gradient).

    `rule` is one of `asgd.config_rules.RULES` or your own, `"package.module:Name"`, which is called
    with the entries of `options`. `momentum` is the factor of `"momentum"` (the heavy ball),
    `"nesterov"` and `"corrected_momentum"`; `RULES` has the other keys. Gradients longer than
    `clip_norm` are clipped to that length. `learning_rate` and `batch_size` are initial values,
    which the schedules change.

    With `local_steps` H, a worker makes H steps of its own from its snapshot by `local_rule`, with
    `local_learning_rate` and a batch each, and pushes the difference; `rule` applies it like a
    gradient, with `learning_rate`, which is then 1 by default. `local_options` are the keys of
    `local_rule`. `local_state` says whether its momentum or moments are kept from one snapshot to
    the next ("keep") or begin as zeros at each ("reset", the default).
    """

    rule: str = "sgd"
    learning_rate: Positive = 0.05
    batch_size: Count = 16
    momentum: Share = 0.9
    beta1: Share | None = None
    beta2: Share | None = None
    epsilon: Positive | None = None
    weight_decay: NonNegative | None = None
    exponent: NonNegative | None = None
    cap: Positive | None = None
    compensation: NonNegative | None = None
    options: dict[str, Any] = {}
    clip_norm: Positive | None = None
    local_steps: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    local_rule: str | None = None
    local_learning_rate: Positive | None = None
    local_options: dict[str, Any] = {}
    local_state: Literal["reset", "keep"] = "reset"
    learning_rate_schedule: LearningRateSchedule = LearningRateSchedule()
    batch_schedule: BatchSchedule = BatchSchedule()

    @property
    def is_own_rule(self) -> bool:
        """Whether `rule` names a user-defined rule."""
        return names_code(self.rule)

    @property
    def gradients_per_push(self) -> int:
        """Gradients that a worker computes for each push: H local steps, else 1."""
        return self.local_steps or 1

    @property
    def _local_rule(self) -> str:
        return "sgd" if self.local_rule is None else self.local_rule

    @property
    def local(self) -> OptimizerConfig | None:
        """The optimizer of a worker's own steps; None without any."""
        if self.local_steps is None:
            return None
        rule, options = self._local_rule, self.local_options
        given = {"options": options} if names_code(rule) else options
        return OptimizerConfig(rule=rule, learning_rate=self.local_learning_rate or 1.0, **given)

    def __post_init__(self) -> None:
        given = {key: getattr(self, key) for key in RULE_KEYS}
        defaults: dict[str, Any] = left_out(self.rule, self.is_own_rule, given)
        local = {key: getattr(self, key) for key in ("local_steps", *LOCAL_KEYS)}
        check_local(self.rule, max([self.batch_size, *self.batch_schedule.values]), local)
        if self.local_steps is not None:
            defaults |= _resolved_local(self._local_rule, self.local_options)
        for key, default in defaults.items():
            msgspec.structs.force_setattr(self, key, default)


def _resolved_local(rule: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the rule of a worker's own steps and its options, with their defaults filled in.

    Raises
    ------
    ValueError
        There is no such rule for them, or it does not take an option.
    """
    if not names_code(rule):
        keys = check_local_rule(rule, options)
        try:
            optimizer = msgspec.convert({"rule": rule, **options}, OptimizerConfig)
        except msgspec.ValidationError as error:
            reason = explained(str(error), options, OptimizerConfig)
            raise ValueError(f"local_options.{reason}") from None
        options = {key: getattr(optimizer, key) for key in keys}
    return {"local_rule": rule, "local_options": options}
