"""Update rules: formulas, updates in place and in blocks, and their configuration."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from asgd.config.make import make_config
from asgd.config.rules import RULES as KEYS
from asgd.errors import InputError
from asgd.rules.adam import Adam, AdamW
from asgd.rules.base import BLOCK, Optimizer, Rule, alike
from asgd.rules.capped import Capped
from asgd.rules.clipped import Clipped
from asgd.rules.corrected_momentum import CorrectedMomentum
from asgd.rules.delay_compensated import DelayCompensated
from asgd.rules.heavy_ball import HeavyBall
from asgd.rules.make import make_rule
from asgd.rules.nesterov import Nesterov
from asgd.rules.rmsprop import RmsProp
from asgd.rules.sgd import Sgd
from asgd.rules.staleness_power import StalenessPower

RULES: dict[str, Rule] = {
    "sgd": Sgd(),
    "momentum": HeavyBall(0.9),
    "nesterov": Nesterov(0.9),
    "corrected_momentum": CorrectedMomentum(0.9),
    "adam": Adam(0.9, 0.999, 1e-8),
    "adamw": AdamW(0.8, 0.99, 1e-3, 0.1),
    "rmsprop": RmsProp(0.99, 1e-8),
    "staleness_aware": StalenessPower(1.0),
    "staleness_power": StalenessPower(0.5),
    "capped": Capped(0.15),
    "delay_compensated": DelayCompensated(0.3),
    "clipped": Clipped(HeavyBall(0.5), 0.1),
    "clipped adam": Clipped(Adam(0.9, 0.999, 1e-8), 1.0),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def followed(rule: Rule, gradients: Sequence[np.ndarray], eta: float = 0.1) -> np.ndarray:
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


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@every_rule
def test_blocks_and_compiled_loops_change_no_bit(
    rule: Rule, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = np.random.default_rng(1).standard_normal((6, 2 * BLOCK + 3)).astype(dtype)
    one_path = followed(rule, gradients[:, None])[:, 0]  # without blocks and compiled loops
    np.testing.assert_array_equal(followed(rule, gradients), one_path)
    x = np.zeros(gradients.shape[1], dtype)
    if rule.blockwise and not rule.reads:
        optimizer = Optimizer(rule, x)
        monkeypatch.setattr(type(rule), "loop", None)
        for count, gradient in enumerate(gradients):
            staleness = min(count, count % 4)
            rule.update_long(x, gradient, optimizer._arrays, 0.1, count, staleness)
        np.testing.assert_array_equal(x, one_path[-1])


@every_rule
def test_unaligned_gradients_give_the_same_steps(rule: Rule) -> None:
    """Gradients in the log are read-only and lie at odd addresses."""
    gradients = np.random.default_rng(1).standard_normal((3, BLOCK + 3))
    stored = [
        np.frombuffer(bytes(7) + gradient.tobytes(), "<f8", offset=7) for gradient in gradients
    ]
    assert not alike(stored[0])
    assert alike(gradients[0])
    np.testing.assert_array_equal(followed(rule, stored), followed(rule, gradients))


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
    np.testing.assert_allclose(paths, alone, rtol=1e-12)


@every_rule
def test_a_rule_keeps_the_precision_of_the_parameters(rule: Rule) -> None:
    gradients = np.random.default_rng(3).standard_normal((8, 5))
    short, long = followed(rule, gradients.astype(np.float32)), followed(rule, gradients)
    assert short.dtype == np.float32
    np.testing.assert_allclose(short, long, atol=1e-5)


@every_rule
def test_a_restored_state_continues_to_the_last_bit(rule: Rule) -> None:
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


@pytest.mark.parametrize(("beta", "aware"), [(0.0, False), (0.9, False), (0.0, True)])
@pytest.mark.parametrize("clip_norm", [None, 1.5])
def test_steps_are_those_of_the_first_version(
    beta: float, aware: bool, clip_norm: float | None
) -> None:
    """The formula here is that of the first version, so its runs replay to the last bit."""
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
    """Return the first step of a rule from zero, where the gradient was computed too."""
    x = np.zeros(len(gradient))
    Optimizer(rule, x).apply(x, np.array(gradient), eta, 0, staleness, np.zeros_like(x))
    return -x


@pytest.mark.parametrize(("gradient", "length"), [([3.0, 4.0], 2.0), ([0.3, 0.4], 0.5)])
def test_clipping_keeps_the_direction(gradient: list[float], length: float) -> None:
    step = one_step(Clipped(Sgd(), 2.0), gradient, 1.0)
    assert np.linalg.norm(step) == pytest.approx(length, rel=1e-15)
    np.testing.assert_allclose(step / np.linalg.norm(step), gradient / np.linalg.norm(gradient))


@pytest.mark.parametrize(("dtype", "large"), [(np.float32, 1e30), (np.float64, 1e200)])
def test_clipping_takes_gradients_whose_square_overflows(dtype: type, large: float) -> None:
    gradients = np.array([[large, -large, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 0.0]], dtype)
    x = np.zeros((3, 3), dtype)
    Optimizer(Clipped(Sgd(), 2.0), x).apply(x, gradients, 1.0, 0, 0)
    np.testing.assert_allclose(x[0], [-(2**0.5), 2**0.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(x[1:], [[-1.2, -1.6, 0.0], [0.0, 0.0, 0.0]], rtol=1e-6)
    alone = one_step(Clipped(Sgd(), 2.0), gradients[0], 1.0)
    np.testing.assert_allclose(alone, -x[0], rtol=1e-6)


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
def test_the_configuration_chooses_the_rule(optimizer: dict[str, Any], steps: list[float]) -> None:
    x = np.zeros(1)
    rule = Optimizer(make_rule(make_config({"optimizer": optimizer})), x)
    for count, expected in enumerate(steps):
        before = x.copy()
        rule.apply(x, np.ones(1), 1.0, count, 1)
        assert before[0] - x[0] == expected


def test_every_configured_rule_is_tested_here() -> None:
    assert set(KEYS) <= set(RULES)


# --- equalities to the last bit ---


@pytest.mark.parametrize(
    ("rule", "other"),
    [
        (Nesterov(0.0), Sgd()),
        (HeavyBall(0.0), Sgd()),
        (StalenessPower(0.0), Sgd()),
        (Capped(np.inf), Sgd()),
        (DelayCompensated(0.0), Sgd()),
        (Clipped(Sgd(), np.inf), Sgd()),
        (CorrectedMomentum(0.0), Sgd()),
        (AdamW(0.9, 0.999, 1e-8, 0.0), Adam(0.9, 0.999, 1e-8)),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_equalities_to_the_last_bit(rule: Rule, other: Rule) -> None:
    gradients = np.random.default_rng(6).standard_normal((30, 5))
    np.testing.assert_array_equal(followed(rule, gradients), followed(other, gradients))


def test_corrected_momentum_without_staleness_is_the_heavy_ball() -> None:
    gradients = np.random.default_rng(7).standard_normal((30, 5))
    x, y = np.zeros((2, 5))
    corrected, ball = Optimizer(CorrectedMomentum(0.7), x), Optimizer(HeavyBall(0.7), y)
    for count, gradient in enumerate(gradients):
        corrected.apply(x, gradient, 0.1, count, 0)
        ball.apply(y, gradient, 0.1, count, 0)
    np.testing.assert_array_equal(x, y)


# --- formulas ---


def test_steps_that_depend_on_the_staleness() -> None:
    for staleness in (0, 1, 3, 50):
        power = one_step(StalenessPower(0.75), [2.0], 0.3, staleness)
        assert power[0] == pytest.approx(0.6 * (1 + staleness) ** -0.75, rel=1e-14)
        capped = one_step(Capped(0.4), [2.0], 0.3, staleness)
        assert capped[0] == 2.0 * (0.3 if staleness < 2 else 0.4 / staleness)


def test_delay_compensation_expands_the_gradient_around_the_read_parameters() -> None:
    x, read, gradient = np.random.default_rng(8).standard_normal((3, 4))
    expected = x - 0.1 * (gradient + 0.7 * gradient * gradient * (x - read))
    Optimizer(DelayCompensated(0.7), x).apply(x, gradient, 0.1, 9, 3, read)
    np.testing.assert_allclose(x, expected, rtol=1e-13)
    # For f = x^2 / 2, read at 1, g^2 is the curvature, so the result is the gradient at x.
    y, then = np.array([0.5]), np.array([1.0])
    Optimizer(DelayCompensated(1.0), y).apply(y, then.copy(), 0.1, 9, 3, then)
    assert y[0] == pytest.approx(0.5 - 0.1 * 0.5)


def test_corrected_momentum_subtracts_the_momentum_of_the_staleness() -> None:
    rule, x = CorrectedMomentum(0.9), np.zeros(1)
    optimizer = Optimizer(rule, x)
    for count in range(5000):
        optimizer.apply(x, np.zeros(1), 0.1, count, 3 + count % 3)
    mean = float(optimizer.state[1][0])
    assert mean == pytest.approx(4.0, abs=0.01)
    # (1 - beta') (1 - mu) = 1 - beta with mu = m / (1 + m)
    assert (1 - rule.explicit(mean)) / (1 + mean) == pytest.approx(0.1)
    before, velocity = x.copy(), optimizer.state[0]
    velocity[:] = 1.0
    optimizer.apply(x, np.zeros(1), 0.1, 5000, 4)
    assert before[0] - x[0] == pytest.approx(rule.explicit(mean), rel=1e-3)
    assert rule.explicit(20.0) == 0.0


GRADIENTS = np.random.default_rng(9).standard_normal((200, 6)) * np.geomspace(1e-6, 1e3, 6)
SAME = {"rtol": 1e-11, "atol": 1e-13}


def test_adam_follows_its_paper() -> None:
    """The operations are in the order of Algorithm 1."""
    x, m, v = np.zeros(6), np.zeros(6), np.zeros(6)
    points = followed(Adam(0.9, 0.99, 1e-3), GRADIENTS, 0.01)
    for t, (point, gradient) in enumerate(zip(points, GRADIENTS, strict=True), start=1):
        m = 0.9 * m + (1 - 0.9) * gradient
        v = 0.99 * v + (1 - 0.99) * gradient**2
        x = x - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3)
        np.testing.assert_allclose(point, x, **SAME)


def test_adamw_and_rmsprop_by_hand() -> None:
    shrunk, x = np.zeros(6), np.zeros(6)
    m, v, w = np.zeros((3, 6))
    points = zip(
        followed(AdamW(0.9, 0.99, 1e-3, 0.5), GRADIENTS, 0.01),
        followed(RmsProp(0.95, 1e-3), GRADIENTS, 0.01),
        GRADIENTS,
        strict=True,
    )
    for t, (adamw, rmsprop, gradient) in enumerate(points, start=1):
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3)
        shrunk = shrunk - 0.01 * 0.5 * shrunk - 0.01 * step
        np.testing.assert_allclose(adamw, shrunk, **SAME)
        w = 0.95 * w + 0.05 * gradient**2
        x = x - 0.01 * gradient / (np.sqrt(w) + 1e-3)
        np.testing.assert_allclose(rmsprop, x, **SAME)


@pytest.mark.parametrize(
    ("rule", "name", "options"),
    [
        (Sgd(), "SGD", {}),
        (HeavyBall(0.9), "SGD", {"momentum": 0.9}),
        (Nesterov(0.9), "SGD", {"momentum": 0.9, "nesterov": True}),
        (Adam(0.9, 0.999, 1e-8), "Adam", {}),
        (Adam(0.5, 0.9, 1e-3), "Adam", {"betas": (0.5, 0.9), "eps": 1e-3}),
        (AdamW(0.9, 0.999, 1e-8, 0.01), "AdamW", {}),
        (
            AdamW(0.9, 0.99, 1e-4, 0.3),
            "AdamW",
            {"betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.3},
        ),
        (RmsProp(0.99, 1e-8), "RMSprop", {}),
        (RmsProp(0.9, 1e-2), "RMSprop", {"alpha": 0.9, "eps": 1e-2}),
    ],
)
def test_steps_equal_those_of_pytorch(rule: Rule, name: str, options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.zeros(6, dtype=torch.float64)
    theirs = getattr(torch.optim, name)([weight], lr=0.01, **options)
    for point, gradient in zip(followed(rule, GRADIENTS, 0.01), GRADIENTS, strict=True):
        weight.grad = torch.from_numpy(gradient.copy())
        theirs.step()
        np.testing.assert_allclose(point, weight.numpy(), **SAME)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop"])
def test_an_update_allocates_no_vector(rule: str) -> None:
    x, gradient = np.zeros(300_000), np.full(300_000, 1e-3)
    optimizer = Optimizer(RULES[rule], x)
    optimizer.apply(x, gradient, 0.1, 0, 0)  # compiles its loop
    tracemalloc.start()
    try:
        optimizer.apply(x, gradient, 0.1, 1, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 10


# --- configuration ---


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"rule": "adamm"}, "rule = 'adamm': did you mean adam? expected sgd, "),
        ({"rule": "sgd", "beta1": 0.5}, "beta1 = 0.5 does not belong to rule = 'sgd': expected"),
        (
            {"momentum": 0.5},
            "rule = 'sgd': expected it with momentum, nesterov or corrected_momentum",
        ),
        ({"rule": "adam", "momentum": 0.9}, "momentum = 0.9 does not belong to rule = 'adam'"),
        ({"rule": "adam", "weight_decay": 0.5}, "rule = 'adam': expected it with adamw"),
        (
            {"rule": "sgd", "options": {"a": 1}},
            "options = {'a': 1} does not belong to rule = ",
        ),
        (
            {"rule": "mine:Rule", "cap": 1.0},
            "cap = 1.0 does not belong to rule = 'mine:Rule'",
        ),
        ({"rule": "capped"}, "rule = 'capped' needs cap: expected a number > 0"),
        ({"rule": "adam", "beta1": 1.0}, "optimizer.beta1 = 1.0: expected"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        make_config({"optimizer": optimizer})
    assert message in str(refused.value)
    assert str(refused.value).startswith("optimizer")


def test_keys_of_a_rule_have_defaults_and_reach_it() -> None:
    given = make_config({"optimizer": {"rule": "adamw", "beta2": 0.5}})
    assert make_rule(given) == AdamW(0.9, 0.5, 1e-8, 0.01)
    assert make_config(json.loads(given.to_json())) == given
    assert make_rule(make_config({"optimizer": {"rule": "nesterov", "momentum": 0.3}})) == Nesterov(
        0.3
    )


@pytest.mark.parametrize("mode", ["sync", "bounded"])
def test_a_rule_that_uses_the_read_parameters_needs_async(mode: str) -> None:
    config = make_config({"optimizer": {"rule": "delay_compensated"}, "cluster": {"mode": mode}})
    with pytest.raises(
        InputError, match=rf"optimizer.rule = .*: expected cluster.mode = \"async\".* '{mode}'"
    ):
        make_rule(config)
