"""Update rules: their formulas, their purity, what the configuration makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asgd.config import make_config
from asgd.rules import Rule, make_rule

RULES = {
    "sgd": Rule(),
    "momentum": Rule(momentum=0.9),
    "staleness_aware": Rule(staleness_aware=True),
    "clipped": Rule(momentum=0.5, clip_norm=0.1),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_update_is_pure_and_out_changes_nothing(rule: Rule) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(5)
    plain, in_place = rule.init(x), rule.init(x)
    buffer = np.empty(5)
    for staleness in range(4):
        gradient = rng.standard_normal(5)
        given, before = gradient.copy(), [part.copy() for part in plain]
        expected, following = rule.update(gradient, plain, learning_rate=0.1, staleness=staleness)
        np.testing.assert_array_equal(gradient, given)
        for part, old in zip(plain, before, strict=True):
            np.testing.assert_array_equal(part, old)
        step, in_place = rule.update(
            gradient, in_place, learning_rate=0.1, staleness=staleness, out=buffer
        )
        np.testing.assert_array_equal(step, expected)
        plain = following


def test_momentum_is_the_heavy_ball() -> None:
    rng = np.random.default_rng(1)
    gradients = rng.standard_normal((6, 3))
    rule = Rule(momentum=0.8)
    state = rule.init(np.zeros(3))
    x, x_ball, v = np.zeros(3), np.zeros(3), np.zeros(3)
    for gradient in gradients:
        step, state = rule.update(gradient, state, learning_rate=0.1, staleness=3)
        x = x - step
        v = 0.8 * v - 0.1 * gradient
        x_ball = x_ball + v
    np.testing.assert_allclose(x, x_ball, rtol=1e-14)


def test_staleness_aware_divides_the_step() -> None:
    rule = Rule(staleness_aware=True)
    for staleness in (0, 1, 7):
        step, _ = rule.update(np.array([2.0]), (), learning_rate=0.3, staleness=staleness)
        assert step[0] == pytest.approx(0.6 / (1 + staleness), rel=1e-15)


@pytest.mark.parametrize(("gradient", "length"), [([3.0, 4.0], 2.0), ([0.3, 0.4], 0.5)])
def test_clipping_keeps_the_direction(gradient: list[float], length: float) -> None:
    value = np.array(gradient)
    step, _ = Rule(clip_norm=2.0).update(value, (), learning_rate=1.0, staleness=0)
    assert np.linalg.norm(step) == pytest.approx(length, rel=1e-15)
    np.testing.assert_allclose(step / np.linalg.norm(step), value / np.linalg.norm(value))


@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [
        ({"rule": "sgd"}, [1.0, 1.0]),
        ({"rule": "momentum", "momentum": 0.5}, [1.0, 1.5]),
        ({"rule": "staleness_aware"}, [0.5, 0.5]),
        ({"rule": "sgd", "clip_norm": 0.25}, [0.25, 0.25]),
        ({"rule": "momentum", "momentum": 0.5, "clip_norm": 0.25}, [0.25, 0.375]),
    ],
)
def test_configuration_names_the_rule(optimizer: dict[str, Any], steps: list[float]) -> None:
    rule = make_rule(make_config({"optimizer": optimizer}).optimizer)
    state = rule.init(np.zeros(1))
    for expected in steps:
        step, state = rule.update(np.ones(1), state, learning_rate=1.0, staleness=1)
        assert step[0] == expected
