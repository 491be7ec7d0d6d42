"""Momentum corrected for asynchrony: with memoryless workers the mean decays as (M1) says."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from analysis.exact.linear_rules import LinearRule, linear_rule
from analysis.planning.paths import PathSetting, planned_paths
from analysis.planning.turns import QueueReads
from analysis.profile.queueing import ServerTimes
from asgd.delays import ComputeTime
from asgd.problems.scalar import Quadratic
from asgd.rules.base import Rule
from asgd.rules.capped import Capped
from asgd.rules.clipped import Clipped
from asgd.rules.corrected_momentum import CorrectedMomentum
from asgd.rules.heavy_ball import HeavyBall
from asgd.rules.staleness_power import StalenessPower

WORKERS, CURVATURE, STEP = 8, 2.0, 0.004  # STEP is eta times the curvature
MU = 1 - 1 / WORKERS


def decay(rule: Rule, first: int, last: int) -> tuple[float, float]:
    """Return the decay per update of |x| between two updates without noise, and its error."""
    setting = PathSetting(
        problem=Quadratic(curvature=CURVATURE, noise=0.0, initial=1.0),
        initial=np.ones(1),
        rule=rule,
        learning_rate=np.full(last, STEP / CURVATURE),
        batch_size=np.ones(last, dtype=np.int64),
        turns=partial(QueueReads, ServerTimes(ComputeTime("exponential", np.ones(WORKERS)))),
        record=np.array([0, first, last]),
        largest_loss=1e9,
        dtype=np.float64,
    )
    loss = planned_paths(setting, 64, np.random.default_rng(0)).loss
    rates = np.log(loss[1] / loss[2]) / (2 * (last - first))  # the loss is a x^2 / 2
    return float(rates.mean()), float(rates.std() / np.sqrt(len(rates)))


def slowest(*polynomial: float) -> float:
    """Return the decay per update of the slowest root."""
    return float(-np.log(np.abs(np.roots(polynomial)).max()))


def with_staleness(beta: float) -> float:
    """Return the decay under momentum beta of the rule and geometric staleness, (M1)."""
    product = np.polymul(np.polymul([1.0, -beta], [1.0, -MU]), [1.0, -1.0])
    return slowest(*np.polyadd(product, [STEP * (1 - MU), 0.0, 0.0]))


def test_rule_and_staleness_together_are_the_heavy_ball() -> None:
    corrected = CorrectedMomentum(0.9)
    seen, error = decay(corrected, 400, 1200)
    own = corrected.explicit(WORKERS - 1)
    assert own == pytest.approx(0.2)
    assert abs(seen - with_staleness(own)) < 4 * error
    ball = slowest(1.0, -(1.9 - STEP / WORKERS), 0.9)  # factor 0.9, learning rate eta / P
    assert seen == pytest.approx(ball, rel=0.05)
    uncorrected, _ = decay(HeavyBall(0.9), 50, 150)
    assert uncorrected == pytest.approx(with_staleness(0.9), rel=0.1)
    assert uncorrected > 5 * ball


def test_what_the_limits_cover() -> None:
    assert linear_rule(None, 3.0) == LinearRule()
    assert linear_rule(Clipped(HeavyBall(0.8), 1.0), 3.0) == LinearRule(0.8)
    assert linear_rule(StalenessPower(1.0), 3.0) == LinearRule(staleness_aware=True)
    assert linear_rule(StalenessPower(0.0), 3.0) == LinearRule()
    corrected = linear_rule(CorrectedMomentum(0.9), 3.0)
    assert corrected is not None
    assert corrected.momentum == pytest.approx(0.6)
    assert linear_rule(CorrectedMomentum(0.5), 3.0) == LinearRule()
    assert linear_rule(StalenessPower(0.5), 3.0) is None
    assert linear_rule(Capped(1.0), 3.0) is None
