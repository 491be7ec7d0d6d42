"""Update rules of the user: how they are applied, tried and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.errors import InputError, RunFailedError
from asgd.problems.make import make_problem
from asgd.rules.base import BLOCK, Optimizer, Rule
from asgd.rules.make import make_rule
from asgd.rundir.reader import read_run
from asgd.simulation.replay import replay
from asgd.simulation.simulate import simulate


def configure(rule: str, options: dict[str, Any] | None = None, **tables: Any) -> RunConfig:
    return make_config(
        {
            "problem": {"kind": "logistic"},
            "optimizer": {"rule": rule, "learning_rate": 0.02, "options": options or {}},
            "cluster": {"workers": 4, "compute_time": {"law": "exponential"}},
            "run": {"updates": 60, "eval_every": 10},
            **tables,
        }
    )


def own(name: str, **options: Any) -> Rule:
    return make_rule(configure(f"tests.support.rules:{name}", options))


@pytest.mark.parametrize("kind", ["logistic", "quadratic"])
def test_a_copy_of_sgd_gives_the_same_run(tmp_path: Path, kind: str) -> None:
    problem = {"kind": kind}
    ours = read_run(simulate(configure("sgd", problem=problem), tmp_path / "ours"))
    rule = "tests.support.rules:make"
    config = configure(rule, {"kind": "copied"}, problem=problem)
    theirs = read_run(simulate(config, tmp_path / "theirs"))
    assert ours.trace.equals(theirs.trace)
    assert ours.loss.equals(theirs.loss)
    assert np.array_equal(ours.parameters, theirs.parameters)


@pytest.mark.parametrize("name", ["Full", "Normalised", "Branches"])
def test_a_run_is_replayed_to_the_last_bit(tmp_path: Path, name: str) -> None:
    run = read_run(simulate(configure(f"tests.support.rules:{name}"), tmp_path / "run"))
    *_, last = replay(run, make_problem(run.config))
    np.testing.assert_array_equal(last.parameters, run.parameters)


@pytest.mark.parametrize(
    ("name", "takes_paths"),
    [("Copied", True), ("Full", True), ("Normalised", False), ("Branches", False)],
)
def test_paths_are_updated_together_or_one_by_one(name: str, takes_paths: bool) -> None:
    rule = own(name)
    assert rule.takes_paths == takes_paths
    rng = np.random.default_rng(0)
    together, alone = np.ones((3, 4)), np.ones((3, 4))
    paths, single = Optimizer(rule, together), [Optimizer(rule, x) for x in alone]
    for count in range(5):
        gradient, read = rng.standard_normal((2, 3, 4))
        lags = rng.integers(5, size=3)
        paths.apply(together, gradient, 0.1, count, lags[:, None].astype(float), read)
        for one, optimizer in enumerate(single):
            optimizer.apply(alone[one], gradient[one], 0.1, count, int(lags[one]), read[one])
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_long_vectors_come_in_blocks_unless_a_rule_needs_the_whole() -> None:
    gradient = np.random.default_rng(1).standard_normal(BLOCK + 5)
    for name, expected in (
        ("Copied", gradient),
        ("Normalised", gradient / np.linalg.norm(gradient)),
    ):
        x = np.zeros(BLOCK + 5)
        optimizer = Optimizer(own(name), x)
        optimizer.apply(x, gradient, 1.0, 0, 0)
        np.testing.assert_allclose(x, -expected, rtol=1e-12)
        assert [array.tolist() for array in optimizer.state] == (
            [[1.0]] if name == "Normalised" else []
        )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("names", "state = 'velocity': expected different names"),
        ("twice", "state = ('v', 'v'): expected different names"),
        ("many", "state has 99 names: expected 16 at most"),
        ("scratch", "scratch = -1: expected 0 to 16"),
        ("flag", "blockwise = 'no': expected True or False"),
        ("property", "rule raised ZeroDivisionError: no state ("),
        ("no update", "Faulty has no method update"),
        ("short init", "init(x) has 0 arrays: expected 1"),
        ("shape", "v of init(x) has shape (1,): expected that of x, or blockwise = False"),
        ("list", "v of init(x): expected a vector like x"),
        ("raises", "update raised ZeroDivisionError: mine ("),
        ("gradient", "update raised ValueError: output array is read-only ("),
        ("returns", "update returned an object of type ndarray: expected None"),
        ("tuple", "update raised TypeError: 'tuple' object does not support item assignment ("),
        ("forgets", "update leaves v as it was: expected a change in place, such as v *= 0.9"),
        ("stays", "update leaves x as it was: expected a change in place"),
        ("nan", "parameters of float64 are not finite after update"),
        ("narrow", "parameters of float32 are not finite after update"),
        ("random", "update gives other parameters when other vectors are updated in between"),
        ("hidden", "update gives other parameters when other vectors are updated in between"),
        ("refers", "update gives other parameters when other vectors are updated in between"),
        ("double", "v of init(x): expected a vector like x, here of float32"),
        ("whole", "update of a part of x differs from that part of an update of x"),
    ],
)
def test_a_rule_that_breaks_the_contract_is_refused(fault: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        own("Faulty", fault=fault)
    assert message in str(refused.value)
    assert str(refused.value).startswith("optimizer.rule = 'tests.support.rules:Faulty': ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("tests.support.rules:Missing", {}, "has no rule 'Missing'; it has Any, Copied, Full"),
        ("tests.support.nowhere:Rule", {}, "No module named 'tests.support.nowhere'"),
        ("tests.support.rules:Full", {"gamma": 1}, "optimizer.options: got an unexpected keyword"),
        ("tests.support.rules:make", {"kind": "number"}, "int has no method update"),
        ("os:system", {"command": "true"}, "system is not defined in a module of your own"),
        (
            "collections:Counter",
            {},
            "Counter is not defined in a module of your own",
        ),
    ],
)
def test_a_name_that_is_no_rule_is_refused(
    rule: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        make_rule(configure(rule, options))
    assert message in str(refused.value)


def test_the_state_is_not_the_parameters_and_arguments_are_read_only() -> None:
    rule, x = own("Aliased"), np.ones(3)
    optimizer = Optimizer(rule, x)
    gradient, read = np.full(3, 2.0), np.zeros(3)
    optimizer.apply(x, gradient, 0.5, 0, 0, read)
    np.testing.assert_array_equal(x, 0.0)
    np.testing.assert_array_equal(optimizer.state[0], 2.0)
    with pytest.raises(ValueError, match="read-only"):  # from update 40 on it changes the gradient
        optimizer.apply(x, gradient, 0.5, 40, 0, read)
    with pytest.raises(ValueError, match="read-only"):
        optimizer.apply(x, gradient, 0.5, 41, 0, read)
    np.testing.assert_array_equal((gradient, read), ([2.0] * 3, [0.0] * 3))


def test_nothing_is_left_of_a_run_with_a_refused_rule(tmp_path: Path) -> None:
    config = configure("tests.support.rules:Faulty", {"fault": "whole"})
    with pytest.raises(InputError):
        simulate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rule_that_uses_the_read_parameters_needs_async() -> None:
    config = configure("tests.support.rules:Full", cluster={"mode": "sync"})
    with pytest.raises(InputError, match=r"tests.support.rules:Full.*cluster.mode = .async."):
        make_rule(config)


def test_a_rule_that_raises_later_ends_the_run_in_one_line(tmp_path: Path) -> None:
    config = configure("tests.support.rules:Faulty", {"fault": "late"})
    with pytest.raises(RunFailedError, match="update 31: ArithmeticError: enough"):
        simulate(config, tmp_path / "run")
    assert len(read_run(tmp_path / "run").trace) == 31


@pytest.mark.parametrize("problem", [{"kind": "logistic"}, {"kind": "quadratic"}])
def test_an_unfinished_update_is_not_on_record(tmp_path: Path, problem: dict[str, Any]) -> None:
    """The saved parameters exclude all changes that the rule made before it raised."""
    config = configure("tests.support.rules:Faulty", {"fault": "half"}, problem=problem)
    with pytest.raises(RunFailedError, match="update 31: ArithmeticError: half"):
        simulate(config, tmp_path / "run")
    run = read_run(tmp_path / "run")
    *_, last = replay(run, make_problem(config))
    assert last.update == len(run.trace) == 31
    np.testing.assert_array_equal(run.parameters, last.parameters)
