"""Arguments of public functions: unusable values are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import analysis
import asgd
import cluster
from analysis.models.ensemble import per_update
from asgd.config.make import make_config
from asgd.errors import InputError
from asgd.staleness.values import staleness_of

PROBLEM = asgd.make_problem({"problem": {"kind": "quadratic"}})
LAW = asgd.Geometric(0.75)

ENDLESS: dict[str, Any] = {}
ENDLESS["problem"] = ENDLESS

REFUSED = {
    "misspelt option": lambda: analysis.sme_asgd(PROBLEM, 0.1, 0.5, 5, 4, 0, substep=2),
    "number for a law": lambda: analysis.sme_law(PROBLEM, 0.1, 7.0, 5, 4, 0),
    "name for a law": lambda: analysis.asgd_iid(PROBLEM, 0.1, "geometric", 5, 4, 0),
    "half a worker": lambda: analysis.sme_law(PROBLEM, 0.1, asgd.Geometric(0.6), 5, 4, 0),
    "fractional updates": lambda: analysis.sme_asgd(PROBLEM, 0.1, 0.5, 5.5, 4, 0),
    "fractional paths": lambda: analysis.sme_sgd(PROBLEM, 0.1, 5, 4.5, 0),
    "fractional batch": lambda: analysis.sme_sgd(PROBLEM, 0.1, 5, 4, 0, batch_size=1.5),
    "schedule too long": lambda: analysis.sme_sgd(PROBLEM, [0.1] * 6, 5, 4, 0),
    "schedule too short": lambda: analysis.sme_sgd(PROBLEM, [0.1] * 4, 5, 4, 0),
    "rate that is not a number": lambda: analysis.sme_sgd(PROBLEM, [0.1, np.nan], 2, 4, 0),
    "rate as text": lambda: analysis.sme_sgd(PROBLEM, "fast", 2, 4, 0),
    "mu as text": lambda: analysis.sme_asgd(PROBLEM, 0.1, "high", 5, 4, 0),
    "mu of nan": lambda: analysis.sme_asgd(PROBLEM, 0.1, float("nan"), 5, 4, 0),
    "seed as text": lambda: analysis.sme_asgd(PROBLEM, 0.1, 0.5, 5, 4, "seed"),
    "negative seed": lambda: analysis.sme_asgd(PROBLEM, 0.1, 0.5, 5, 4, -1),
    "initial of wrong shape": lambda: analysis.sme_sgd(PROBLEM, 0.1, 5, 4, 0, initial=[1, 2]),
    "initial of nan": lambda: analysis.sme_sgd(PROBLEM, 0.1, 5, 4, 0, initial=[np.nan]),
    "record beyond the end": lambda: analysis.sme_sgd(PROBLEM, 0.1, 5, 4, 0, record=[0, 6]),
    "fractional record": lambda: analysis.sme_sgd(PROBLEM, 0.1, 5, 4, 0, record=[0.5]),
    "fractional threads": lambda: analysis.sme_sgd(PROBLEM, 0.1, 5, 4, 0, threads=1.5),
    "integer precision": lambda: analysis.sme_sgd(PROBLEM, 0.1, 5, 4, 0, dtype=int),
    "level above one": lambda: analysis.sme_sgd(PROBLEM, 0.1, 5, 4, 0, quantile_levels=[2]),
    "no problem": lambda: analysis.sme_sgd("quadratic", 0.1, 5, 4, 0),
    "staleness of half": lambda: analysis.sme_replay(PROBLEM, 0.1, [0, 0.5], 4, 0),
    "momentum of one": lambda: analysis.sme_msgd(PROBLEM, 0.1, 1.0, 5, 4, 0),
    "mu of one": lambda: analysis.stationary_variance(1.0, 1.0, 0.1, 1.0),
    "negative curvature": lambda: analysis.stationary_variance(-1.0, 1.0, 0.1, 0.5),
    "negative noise": lambda: analysis.stationary_variance(1.0, -1.0, 0.1, 0.5),
    "negative rate": lambda: analysis.stationary_variance(1.0, 1.0, -0.1, 0.5),
    "misspelt law": lambda: asgd.ComputeTime("lognromal", np.ones(2)),
    "negative mean": lambda: asgd.ComputeTime("gamma", np.array([-1.0])),
    "zero variation": lambda: asgd.ComputeTime("gamma", np.ones(2), 0.0),
    "no times": lambda: analysis.queue_staleness(3),
    "configuration as a list": lambda: asgd.simulate([1]),
    "no such file": lambda: asgd.simulate("none.toml"),
    "no run": lambda: analysis.fit_run(3),
    "no runs": lambda: analysis.fit_runs(3),
    "run of nothing": lambda: asgd.read_run(None),
    "run of a number": lambda: analysis.Study.open(3),
    "nothing to resume": lambda: cluster.resume(None),
    "nothing to simulate": lambda: asgd.simulate(None),
    "nothing to plan": lambda: analysis.plan(None),
    "plan of a missing file": lambda: analysis.plan("none.toml"),
    "number as a table": lambda: asgd.make_config({3: {}}),
    "endless configuration": lambda: asgd.make_config(ENDLESS),
    "version of text": lambda: staleness_of("a", 0),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unusable_argument_is_refused_in_one_line(case: str) -> None:
    with pytest.raises(InputError) as caught:
        REFUSED[case]()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_refusals_suggest_a_usable_value() -> None:
    with pytest.raises(InputError, match="substep: unknown option; did you mean substeps"):
        REFUSED["misspelt option"]()
    with pytest.raises(InputError, match="did you mean lognormal"):
        REFUSED["misspelt law"]()
    with pytest.raises(InputError, match=r"law = a law of mean 1\.5: expected P - 1 for a whole"):
        REFUSED["half a worker"]()


def test_a_generator_is_a_seed() -> None:
    def final(seed: int | np.random.Generator) -> np.ndarray:
        return analysis.sme_asgd(PROBLEM, 0.1, 0.5, 5, 4, seed).final

    same = [final(np.random.default_rng(3)) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    rng = np.random.default_rng(3)
    assert not np.array_equal(final(rng), final(rng))


def test_a_configuration_accepts_numpy_numbers_and_arrays(tmp_path: Path) -> None:
    given = {
        "problem": {"kind": "quadratic"},
        "optimizer": {"learning_rate": np.float32(0.5), "batch_size": np.int64(2)},
        "cluster": {"workers": np.int32(2), "compute_time": {"mean": np.array([0.01, 0.02])}},
        "run": {"updates": np.array(20)},
    }
    config = make_config(given)
    assert config.cluster.compute_time.mean == [0.01, 0.02]
    path = asgd.simulate(given, tmp_path / "run")
    assert len(asgd.read_run(path).trace) == 20
    with pytest.raises(InputError, match="finite"):
        make_config({"optimizer": {"learning_rate": np.float64("nan")}})


def test_unsigned_versions_do_not_wrap() -> None:
    update, read = np.array([3, 4], dtype=np.uint64), np.array([1, 4], dtype=np.uint64)
    np.testing.assert_array_equal(staleness_of(update, read), [2, 0])
    assert staleness_of(np.uint8(3), np.uint8(1)) == 2
    with pytest.raises(InputError, match="read_version = 4: expected 0 to 3"):
        staleness_of(np.uint64(3), np.uint64(4))


def test_a_refused_value_of_a_schedule_is_named_with_its_update() -> None:
    with pytest.raises(InputError, match=r"eta\[2\] = -1: expected"):
        per_update([1, 2, -1], 3, "eta")
