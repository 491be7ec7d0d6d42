"""The benchmark of methods: its clock, its perceptron, and its verdicts on claims."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.problems.base import starting_point
from asgd.problems.make import make_problem
from scripts.bench_methods import METHODS, configure, scaled
from scripts.methods_problems import Perceptron
from scripts.methods_runs import VirtualRun, virtual_seconds
from scripts.methods_shown import Place, Ratio, Result, Store, figure, table

PLACE = Place("softmax", "shared", "equal")


def constant(**cluster: Any) -> RunConfig:
    """Return the configuration of three workers, whose gradients take 1, 1 and 3 seconds."""
    times = {"law": "constant", "mean": [1.0, 1.0, 3.0]}
    return make_config(
        {
            "problem": {"kind": "softmax"},
            "cluster": {"workers": 3, "compute_time": times, **cluster},
        }
    )


@pytest.mark.parametrize(
    ("cluster", "message", "versions"),
    [
        ({}, 0.0, [2, 4, 7, 9]),
        ({}, 0.5, [0, 2, 2, 5]),
        ({"mode": "sync"}, 0.0, [0, 0, 1, 1]),
        ({"mode": "sync", "gradients_per_update": 2}, 0.0, [1, 2, 3, 4]),
        ({"mode": "buffered", "gradients_per_update": 2}, 0.0, [1, 2, 3, 4]),
        ({"discard_above": 3}, 0.0, [2, 4, 6, 8]),
    ],
)
def test_updates_have_the_times_of_their_gradients(
    cluster: dict[str, Any], message: float, versions: list[int]
) -> None:
    config = constant(**cluster)
    ran = VirtualRun(config, make_problem(config), message)
    found = [ran.server.version for _ in ran.points(iter([1.0, 2.0, 3.0, 4.0]))]
    assert found == versions


def test_virtual_seconds_end_at_the_first_loss_at_the_target() -> None:
    config = constant(mode="sync")
    problem = make_problem(config)
    ran = VirtualRun(config, problem, 0.0)
    point = next(x.copy() for _, x in ran.points(iter([30.0])))
    found = virtual_seconds(config, problem, float(problem.loss(point)), 100.0)
    assert 30.0 <= found <= 30.0 * 1.03
    assert math.isinf(virtual_seconds(config, problem, 1e-3, 100.0))


def test_perceptron_has_the_gradient_of_its_loss() -> None:
    problem = Perceptron(hidden=4)
    rng = np.random.default_rng(0)
    x, v = problem.initial_point(rng), rng.standard_normal(problem.dim)
    slope = (problem.loss(x + 1e-5 * v) - problem.loss(x - 1e-5 * v)) / 2e-5
    np.testing.assert_allclose(problem.gradient(x) @ v, slope, rtol=1e-7)
    batches = rng.integers(problem.n_samples, size=(2, 5))
    both = problem.gradient(np.stack([x, x + v]), batches)
    np.testing.assert_allclose(both[1], problem.gradient(x + v, batches[1]), rtol=1e-12)
    each = [problem.gradient(x, np.array([i])) for i in batches[0]]
    np.testing.assert_allclose(both[0], np.mean(each, axis=0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods_can_be_configured(method: Any) -> None:
    config = configure(PLACE, method, 0.01, 3)
    assert config.cluster.workers == 16
    slower = scaled(config, 10.0).cluster.compute_time
    assert slower.mean == [10.0] * 16
    x = starting_point(make_problem(config), 3)
    assert [at.shape for _, at in VirtualRun(config, make_problem(config), 0.0).points(iter([1.5]))]
    assert x.shape == (650,)


def result(method: str, *seconds: float) -> Result:
    return Result(PLACE, method, 0.5, False, seconds, 100.0)


@pytest.mark.parametrize(
    ("one", "other", "limit", "verdict", "text"),
    [
        ((10.0, 10.5), (10.0, 10.5), 1.0, "reproduced", "1 +- 0"),
        ((20.0, 22.0), (10.0, 10.5), 1.0, "contradicted", "2.05 +- 0.048"),
        ((10.0, 13.0), (10.0, 10.5), 1.0, "reproduced", "1.11 +- 0.12"),
        ((math.inf, math.inf), (10.0, 11.0), 1.0, "contradicted", "more than 9.53"),
        ((math.inf, math.inf), (10.0, 11.0), 20.0, "open", "more than 9.53"),
        ((10.0, 11.0), (math.inf, 90.0), 1.0, "reproduced", "less than 0.111"),
        ((math.inf, 1.0), (math.inf, 90.0), 1.0, "open", "neither reaches the loss"),
    ],
)
def test_a_ratio_gives_a_verdict_on_a_claim(
    one: tuple[float, ...], other: tuple[float, ...], limit: float, verdict: str, text: str
) -> None:
    ratio = Ratio.of(result("a", *one), result("b", *other))
    assert (ratio.at_most(limit), str(ratio)) == (verdict, text)


def test_results_are_kept_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "new" / "methods.csv"
    store = Store(path, 100.0)
    for one in (result("a, b", 10.0, 12.0), result("c", math.inf, math.inf)):
        store.add(one)
    found = list(Store(path, 100.0).results.values())
    assert found == list(store.results.values())
    assert table(found, ["a, b", "c", "d"], ["equal"]).splitlines() == [
        "| method | equal |",
        "|---|---|",
        "| a, b | 11 |",
        "| c | > 100 |",
    ]
    figure(found, ["a, b", "c"], ["equal"], tmp_path / "methods.png")
    assert (tmp_path / "methods.png").stat().st_size > 10_000
