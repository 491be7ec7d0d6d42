"""Rules along planned paths; momentum corrected for asynchrony decays as (M1) says."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from analysis.exact.linear_rules import LinearRule, linear_rule
from analysis.planning.paths import PathSetting, _Servers, path_count, planned_paths
from analysis.planning.turns import QueueReads
from analysis.profile.queueing import ServerTimes
from asgd.arrays import Array
from asgd.delays import ComputeTime
from asgd.problems.scalar import Quadratic
from asgd.rules.adam import Adam
from asgd.rules.base import Rule, State
from asgd.rules.capped import Capped
from asgd.rules.clipped import Clipped
from asgd.rules.corrected_momentum import CorrectedMomentum
from asgd.rules.heavy_ball import HeavyBall
from asgd.rules.sgd import Sgd
from asgd.rules.staleness_power import StalenessPower

WORKERS, CURVATURE, STEP = 8, 2.0, 0.004  # STEP is eta times the curvature
MU = 1 - 1 / WORKERS


def setting_of(rule: Rule, first: int, last: int) -> PathSetting:
    return PathSetting(
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


def decay(rule: Rule, first: int, last: int) -> tuple[float, float]:
    """Return the decay per update of |x| between two updates without noise, and its error."""
    loss = planned_paths(setting_of(rule, first, last), 64, np.random.default_rng(0)).loss
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
    own = CorrectedMomentum(0.9).explicit(WORKERS - 1)
    assert own == pytest.approx(0.2)
    fixed, error = decay(HeavyBall(own), 400, 1200)
    assert abs(fixed - with_staleness(own)) < 4 * error
    # After 3000 updates the measured mean is at most 0.01 below P - 1 and scatters by 0.17. The
    # relative error is 0.1 / 0.8 times the first plus the square of 0.1 / 0.8 times the second.
    seen, _ = decay(CorrectedMomentum(0.9), 3000, 4000)
    assert seen == pytest.approx(with_staleness(own), rel=2e-3)
    ball = slowest(1.0, -(1.9 - STEP / WORKERS), 0.9)  # factor 0.9, learning rate eta / P
    assert seen == pytest.approx(ball, rel=0.05)
    # Uncorrected, x oscillates with a period of 134 updates; this is a mean over many periods.
    uncorrected, _ = decay(HeavyBall(0.9), 200, 2200)
    assert uncorrected == pytest.approx(with_staleness(0.9), rel=0.02)
    assert uncorrected > 5 * ball


def test_rules_that_the_limits_cover() -> None:
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


class FromOne(HeavyBall):
    """A rule whose state starts at one."""

    def init(self, x: Array) -> State:
        return (np.ones_like(x),)


def test_a_restarted_path_has_the_initial_state_of_its_rule() -> None:
    servers = _Servers(setting_of(FromOne(0.5), 1, 2), 3, np.random.default_rng(0))
    servers.step(0)
    (velocity,) = servers._optimizer.state
    before = velocity.copy()
    servers.restart(np.array([True, False, False]))
    assert velocity[0] == 1.0
    assert (before != 1.0).all()
    np.testing.assert_array_equal(velocity[1:], before[1:])


def test_the_memory_of_paths_includes_the_state_of_the_rule() -> None:
    numbers: dict[str, Any] = {"numbers": 1e12, "fewest": 2, "most": 10**9}
    setting = setting_of(Adam(0.9, 0.999, 1e-8), 1, 2)
    plain, adam = (
        path_count(replace(setting, rule=rule), 4, **numbers) for rule in (Sgd(), setting.rule)
    )
    assert plain / adam == pytest.approx(10 / 8)
