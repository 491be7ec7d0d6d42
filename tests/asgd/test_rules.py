"""Update rules: their formulas, in place and in blocks; what the configuration makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asgd.config import make_config
from asgd.rules.base import BLOCK, Optimizer, Rule
from asgd.rules.clipped import Clipped
from asgd.rules.heavy_ball import HeavyBall
from asgd.rules.make import make_rule
from asgd.rules.sgd import Sgd
from asgd.rules.staleness_power import StalenessPower

RULES: dict[str, Rule] = {
    "sgd": Sgd(),
    "momentum": HeavyBall(0.9),
    "staleness_aware": StalenessPower(1.0),
    "clipped": Clipped(HeavyBall(0.5), 0.1),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def followed(rule: Rule, gradients: np.ndarray, eta: float = 0.1) -> np.ndarray:
    """Return x_1, x_2, ... under gradients of staleness 0, 1, 2, 3, 0, 1, ..."""
    x = np.zeros_like(gradients[0])
    points, optimizer = [x.copy()], Optimizer(rule, x)
    for count, gradient in enumerate(gradients):
        staleness = min(count, count % 4)
        read = points[count - staleness]
        optimizer.apply(x, gradient, eta, count, staleness, read if rule.reads else None)
        points.append(x.copy())
    return np.array(points[1:])


@every_rule
def test_only_parameters_and_state_change(rule: Rule) -> None:
    rng = np.random.default_rng(0)
    x, read = rng.standard_normal((2, 5))
    optimizer = Optimizer(rule, x)
    assert len(optimizer.state) == len(rule.state)
    read.flags.writeable = False
    for count in range(4):
        gradient = rng.standard_normal(5)
        gradient.flags.writeable = False
        optimizer.apply(x, gradient, 0.1, count, count, read)


@every_rule
def test_blocks_and_paths_change_no_bit(rule: Rule) -> None:
    gradients = np.random.default_rng(1).standard_normal((6, 2 * BLOCK + 3))
    one_path = followed(rule, gradients[:, None])
    np.testing.assert_array_equal(followed(rule, gradients), one_path[:, 0])


@every_rule
def test_every_path_has_its_own_staleness(rule: Rule) -> None:
    rng = np.random.default_rng(2)
    gradients, staleness = rng.standard_normal((6, 3, 4)), rng.integers(5, size=(6, 3))
    reads = rng.standard_normal((6, 3, 4))
    paths, alone = np.zeros((3, 4)), np.zeros((3, 4))
    together, single = Optimizer(rule, paths), [Optimizer(rule, x) for x in alone]
    for count, (gradient, lag, read) in enumerate(zip(gradients, staleness, reads, strict=True)):
        together.apply(paths, gradient, 0.1, count, lag[:, None].astype(float), read)
        for path, optimizer in enumerate(single):
            own = int(lag[path])
            optimizer.apply(alone[path], gradient[path], 0.1, count, own, read[path])
    np.testing.assert_allclose(paths, alone, rtol=1e-13)


@every_rule
def test_precision_is_that_of_the_parameters(rule: Rule) -> None:
    gradients = np.random.default_rng(3).standard_normal((8, 5))
    short, long = followed(rule, gradients.astype(np.float32)), followed(rule, gradients)
    assert short.dtype == np.float32
    np.testing.assert_allclose(short, long, atol=1e-5)


@every_rule
def test_a_restored_state_goes_on_to_the_last_bit(rule: Rule) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal(3)
    first = Optimizer(rule, x)
    for count in range(10):
        if count == 5:
            y, second = x.copy(), Optimizer(rule, x)
            second.restore([array.copy() for array in first.state])
        gradient, read = rng.standard_normal((2, 3))
        first.apply(x, gradient, 0.1, count, count % 3, read)
        if count >= 5:
            second.apply(y, gradient, 0.1, count, count % 3, read)
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 1.5])
def test_steps_are_those_of_the_first_version(
    beta: float, aware: bool, clip_norm: float | None
) -> None:
    """Written as it was then: runs on record replay to the last bit."""
    if beta and aware:
        return
    rule: Rule = HeavyBall(beta) if beta else StalenessPower(1.0) if aware else Sgd()
    rule = rule if clip_norm is None else Clipped(rule, clip_norm)
    gradients = np.random.default_rng(5).standard_normal((20, 3))
    x, velocity = np.zeros(3), np.zeros(3)
    for count, (point, gradient) in enumerate(
        zip(followed(rule, gradients), gradients, strict=True)
    ):
        if clip_norm is not None:
            length = np.linalg.norm(gradient, axis=-1, keepdims=True)
            if length > clip_norm:
                gradient = gradient * (clip_norm / np.maximum(length, clip_norm))
        step = gradient * (0.1 / (1 + count % 4) if aware else 0.1)
        velocity = beta * velocity
        velocity += step
        x = x - velocity
        np.testing.assert_array_equal(point, x)


def test_momentum_is_the_heavy_ball() -> None:
    gradients = np.random.default_rng(1).standard_normal((6, 3))
    points = followed(HeavyBall(0.8), gradients)
    x, v = np.zeros(3), np.zeros(3)
    for gradient in gradients:
        v = 0.8 * v - 0.1 * gradient
        x = x + v
    np.testing.assert_allclose(points[-1], x, rtol=1e-14)


def one_step(rule: Rule, gradient: Any, eta: float, staleness: int = 0) -> np.ndarray:
    """Return the first step of a rule from zero, which is also what its gradient was read at."""
    x = np.zeros(len(gradient))
    Optimizer(rule, x).apply(x, np.array(gradient), eta, 0, staleness, np.zeros_like(x))
    return -x


@pytest.mark.parametrize(("gradient", "length"), [([3.0, 4.0], 2.0), ([0.3, 0.4], 0.5)])
def test_clipping_keeps_the_direction(gradient: list[float], length: float) -> None:
    step = one_step(Clipped(Sgd(), 2.0), gradient, 1.0)
    assert np.linalg.norm(step) == pytest.approx(length, rel=1e-15)
    np.testing.assert_allclose(step / np.linalg.norm(step), gradient / np.linalg.norm(gradient))


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
    x = np.zeros(1)
    rule = Optimizer(make_rule(make_config({"optimizer": optimizer}).optimizer), x)
    for count, expected in enumerate(steps):
        before = x.copy()
        rule.apply(x, np.ones(1), 1.0, count, 1)
        assert before[0] - x[0] == expected
