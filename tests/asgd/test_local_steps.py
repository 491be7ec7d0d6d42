"""Local steps in virtual time: equalities, the law of their differences, times, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asgd.arrays import Array
from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.delays import ComputeTime
from asgd.draws import WorkerDraws
from asgd.errors import InputError
from asgd.local_steps import LocalSteps, Pushes
from asgd.problems.base import starting_point
from asgd.problems.make import make_problem
from asgd.rules.adam import AdamW
from asgd.rules.base import BLOCK, Optimizer, Rule
from asgd.rules.heavy_ball import HeavyBall
from asgd.rules.make import make_local_rule
from asgd.rules.sgd import Sgd
from asgd.rundir.reader import Run, read_run
from asgd.simulation.simulate import simulate
from asgd.verify import record_findings, replay_findings

LOCAL = {"local_steps": 3, "local_learning_rate": 0.02}
ADAM = {"local_rule": "adam", "local_learning_rate": 0.003}
RATE = 0.02


def configure(optimizer: dict[str, Any], problem: Any = "softmax", **tables: Any) -> RunConfig:
    cluster = {"workers": 4, "compute_time": {"law": "exponential"}, **tables.pop("cluster", {})}
    return make_config(
        {
            "problem": {"kind": problem} if isinstance(problem, str) else problem,
            "optimizer": {"batch_size": 3, **optimizer},
            "cluster": cluster,
            "run": {"updates": 160, "eval_every": 40, **tables.pop("run", {})},
            **tables,
        }
    )


def finished(config: RunConfig, path: Path) -> Run:
    return read_run(simulate(config, path))


# --- equalities to the last bit ---


FLOAT32 = {"kind": "tests.support.plugins:single", "options": {"dim": 3, "dtype": "float32"}}
LONG = {"kind": "tests.support.plugins:single", "options": {"dim": BLOCK + 5, "dtype": "float32"}}


@pytest.mark.parametrize("staleness", ["server", "geometric"])
@pytest.mark.parametrize("problem", ["softmax", "quadratic", FLOAT32, LONG])
def test_one_step_by_sgd_is_plain_asynchronous_sgd(
    tmp_path: Path, problem: Any, staleness: str
) -> None:
    tables: dict[str, Any] = {"simulation": {"staleness": staleness}, "run": {"updates": 90}}
    plain = finished(configure({"learning_rate": RATE}, problem, **tables), tmp_path / "plain")
    one = {"local_steps": 1, "local_learning_rate": RATE}
    local = finished(configure(one, problem, **tables), tmp_path / "local")
    np.testing.assert_array_equal(local.parameters, plain.parameters)
    assert local.parameters.dtype == plain.parameters.dtype
    assert local.loss.equals(plain.loss)
    same = [name for name in plain.trace if name != "gradient_norm"]
    assert local.trace[same].equals(plain.trace[same])
    # The recorded norm is the norm of the pushed difference.
    rounding = 4 * np.finfo(plain.parameters.dtype).eps
    norms = RATE * plain.trace["gradient_norm"]
    np.testing.assert_allclose(local.trace["gradient_norm"], norms, rtol=rounding)


OPTIMIZERS = [
    LOCAL,
    LOCAL | ADAM,
    LOCAL | ADAM | {"local_state": "keep"},
    LOCAL | {"local_rule": "momentum", "local_state": "keep", "local_options": {"momentum": 0.5}},
    LOCAL | ADAM | {"local_rule": "adamw", "rule": "nesterov", "learning_rate": 0.3},
    LOCAL | {"rule": "staleness_aware", "clip_norm": 0.1},
    LOCAL | {"local_rule": "tests.support.rules:Copied", "rule": "adam", "learning_rate": 0.003},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_simulated_run_verifies(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    changes = {"batch_schedule": {"at": [60], "values": [5]}}
    run = finished(configure(optimizer | changes, "logistic"), tmp_path / "run")
    assert [*record_findings(run), *replay_findings(run, {160: run.parameters})] == []
    expected = np.where(run.trace["read_version"] < 60, 9, 15)  # H batches of 3, then of 5
    np.testing.assert_array_equal(run.trace["batch_size"], expected)
    assert run.loss["loss"].iloc[-1] < run.loss["loss"].iloc[0]
    data = json.loads((run.path / "config.json").read_text())
    assert make_config(data) == run.config


def test_steps_by_hand() -> None:
    """Momentum is kept or reset, and step j of push s uses batch 3 s + j."""
    for state in ("keep", "reset"):
        config = configure(LOCAL | {"local_rule": "momentum", "local_state": state})
        problem = make_problem(config)
        draws = WorkerDraws(config, problem)
        pushes, start = Pushes(config, problem, draws), starting_point(problem, 0)
        velocity = np.zeros_like(start)
        for sequence in (0, 1, 2, 4):
            x = start.copy()
            if state == "reset" or sequence == 4:  # push 3 is missing, and its state with it
                velocity[:] = 0.0
            for j in range(3):
                gradient = problem.gradient(x, draws.batch(1, 3 * sequence + j, 3))
                velocity = 0.9 * velocity + 0.02 * gradient
                x -= velocity
            pushed = pushes.push(1, sequence, start, 9)
            np.testing.assert_allclose(pushed, start - x, rtol=1e-9, atol=1e-15)
            start = start - pushed


def steps_of(rule: Rule, keeps: bool = False, steps: int = 4) -> LocalSteps:
    return LocalSteps(rule, 0.1, steps, keeps)


@pytest.mark.parametrize("rule", [Sgd(), HeavyBall(0.9), AdamW(0.9, 0.99, 1e-8, 0.3)])
def test_several_starts_at_once_equal_separate_pushes(rule: Rule) -> None:
    starts = np.random.default_rng(0).standard_normal((5, 3))

    def gradient(j: int, x: Array) -> Array:
        return np.asarray(x**3 + j)

    together = steps_of(rule).difference(0, 0, starts, gradient)
    for start, expected in zip(starts, together, strict=True):
        np.testing.assert_array_equal(steps_of(rule).difference(0, 0, start, gradient), expected)
        x, optimizer = start.copy(), Optimizer(rule, start)
        for j in range(4):
            optimizer.apply(x, gradient(j, x), 0.1, j, 0)
        np.testing.assert_allclose(expected, start - x, rtol=1e-12)


def test_a_small_difference_keeps_its_precision_at_large_parameters() -> None:
    start = np.full(2, 1e6, np.float32)
    found = steps_of(Sgd()).difference(0, 0, start, lambda j, x: np.full(2, 1e-4, np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 4e-5, rtol=1e-6)


def test_each_worker_keeps_its_own_state() -> None:
    def gradient(j: int, x: Array) -> Array:
        return np.ones(1)

    alone, both = (steps_of(HeavyBall(0.5), keeps=True, steps=1) for _ in range(2))
    expected = [alone.difference(1, s, np.zeros(1), gradient)[0] for s in range(4)]
    assert expected == pytest.approx([0.1, 0.15, 0.175, 0.1875])
    found = []
    for s in range(4):
        both.difference(2, s, np.ones(1), lambda j, x: -gradient(j, x))
        found.append(both.difference(1, s, np.zeros(1), gradient)[0])
    assert found == expected


# --- the law of the differences ---


def test_differences_of_a_quadratic_have_the_law_of_scaled_gradients() -> None:
    """On f = a x^2 / 2 with noise of variance s^2, H steps of rate r give (1 - q^H) x + noise.

    q = 1 - r a, and the noise has the variance r^2 s^2 (1 + q^2 + ... + q^(2H-2)). So the equations
    for the second moments of a memoryless server hold with h = 1 - q^H in place of eta a, and this
    variance in place of eta^2 s^2.
    """
    curvature, steps, workers, paths, updates = 2.0, 4, 4, 20_000, 60
    local, rng = steps_of(Sgd(), steps=steps), np.random.default_rng(3)
    q = 1 - local.learning_rate * curvature
    h = 1 - q**steps
    variance = (2 * local.learning_rate) ** 2 * np.sum(q ** (2 * np.arange(steps)))
    a = b = c = d = 1.0  # E x^2, E x s_i, E s_i^2, E s_i s_j
    share, path = 1 / workers, np.arange(paths)
    x, held = np.ones((paths, 1)), np.ones((paths, workers, 1))

    def sampled(step: int, y: Array) -> Array:
        return np.asarray(curvature * y + 2 * rng.standard_normal(y.shape))

    for update in range(updates):
        a = a - 2 * h * b + h**2 * c + variance
        b = share * a + (1 - share) * (b - h * d)
        cross = (b - share * a) / (1 - share)
        c, d = share * a + (1 - share) * c, 2 * share * cross + (1 - 2 * share) * d
        turn = rng.integers(workers, size=paths)
        x = x - local.difference(0, update, held[path, turn], sampled)
        held[path, turn] = x
        if update in (4, 12, 59):
            squares = x**2
            error = squares.std() / np.sqrt(paths)
            assert abs(squares.mean() - a) < 4 * error
            assert error < 0.02 * a


# --- times ---


def test_a_push_takes_the_compute_times_of_all_its_gradients() -> None:
    local = configure(LOCAL | {"local_steps": 5})
    problem = make_problem(local)
    draws, plain = WorkerDraws(local, problem), WorkerDraws(configure({}), problem)
    for sequence in (0, 1, 63, 64, 200):
        each = [plain.compute_seconds(2, 5 * sequence + j) for j in range(5)]
        assert draws.compute_seconds(2, sequence) == pytest.approx(sum(each), rel=1e-14)
    together = draws.compute_seconds_of(2, 1, 2)
    one_by_one = [draws.compute_seconds(2, sequence) for sequence in range(64, 192)]
    assert together.tolist() == one_by_one


@pytest.mark.parametrize("staleness", ["server", "geometric"])
def test_virtual_seconds_count_every_gradient(tmp_path: Path, staleness: str) -> None:
    """With constant times and no queue, a push takes H times the compute and gradient time."""
    tables: dict[str, Any] = {
        "cluster": {"workers": 2, "compute_time": {"law": "constant", "mean": 0.01}},
        "simulation": {"staleness": staleness, "gradient_time": 0.002},
        "run": {"updates": 20},
    }
    run = finished(configure(LOCAL, **tables), tmp_path / "run")
    np.testing.assert_allclose(run.trace["compute_seconds"], 3 * 0.012)
    assert run.trace["applied_seconds"].iloc[-1] == pytest.approx(10 * 3 * 0.012)


def test_times_of_pushes_are_sums_of_the_law() -> None:
    """Over many pushes, mean and variance are H times those of one gradient."""
    config = configure(LOCAL | {"local_steps": 5})
    seconds = WorkerDraws(config, make_problem(config)).compute_seconds_of(0, 0, 100)
    mean = float(ComputeTime.from_config(config.cluster).mean[0])
    error = mean * np.sqrt(5 / len(seconds))
    assert abs(seconds.mean() - 5 * mean) < 4 * error
    assert seconds.var() == pytest.approx(5 * mean**2, rel=0.1)


# --- configuration ---


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"local_steps": 4}, "local_steps = 4 needs local_learning_rate: expected the learning"),
        ({"local_rule": "adam"}, "local_rule = 'adam' needs local_steps: expected both"),
        ({"local_state": "keep"}, "local_state = 'keep' needs local_steps"),
        ({"local_options": {"beta1": 0.5}}, "local_options = {'beta1': 0.5} needs local_steps"),
        (
            LOCAL | {"rule": "delay_compensated"},
            "local_steps = 3 does not go with rule = 'delay_compensated', which compensates",
        ),
        (LOCAL | {"local_rule": "capped"}, "local_rule = 'capped': expected sgd, momentum, "),
        (LOCAL | {"local_rule": "adamm"}, "local_rule = 'adamm': did you mean adam? expected"),
        (
            LOCAL | {"local_rule": "adam", "local_options": {"beta1": 2}},
            "local_options.beta1 = 2: expected a number < 1.0",
        ),
        (
            LOCAL | {"local_options": {"beta1": 0.5}},
            "local_options.beta1 = 0.5 does not belong to local_rule = 'sgd', which takes none",
        ),
        (LOCAL | {"local_steps": 0}, "optimizer.local_steps = 0: expected"),
        (
            LOCAL | {"batch_schedule": {"at": [9], "values": [10**9]}},
            "local_steps = 3 with batch_size = 1000000000: expected at most 2,147,483,647 samples",
        ),
        (LOCAL | {"local_rule": ""}, "local_rule = '': expected sgd, momentum"),
        (LOCAL | {"local_state": "kept"}, "local_state = 'kept': expected one of reset, keep"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        make_config({"optimizer": optimizer})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("optimizer")


def test_the_server_applies_the_whole_difference_by_default() -> None:
    given = make_config({"optimizer": LOCAL | {"local_rule": "adamw"}}).optimizer
    assert given.learning_rate == 1.0
    assert given.local_options == {
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "weight_decay": 0.01,
    }
    assert given.local is not None
    assert given.local.learning_rate == 0.02
    other = make_config({"optimizer": LOCAL | {"learning_rate": 0.7}}).optimizer
    assert (other.learning_rate, other.gradients_per_push) == (0.7, 3)
    assert make_config().optimizer.learning_rate == 0.05


def test_an_unusable_local_rule_is_refused() -> None:
    config = make_config({"optimizer": LOCAL | {"local_rule": "tests.support.rules:Full"}})
    with pytest.raises(
        InputError, match=r"optimizer.local_rule = 'tests.support.rules:Full': expected it as"
    ):
        make_local_rule(config)
    bad = make_config({"optimizer": LOCAL | {"local_rule": "tests.support.rules:Missing"}})
    with pytest.raises(InputError, match=r"optimizer.local_rule = 'tests.support.rules:Missing'"):
        make_local_rule(bad)
