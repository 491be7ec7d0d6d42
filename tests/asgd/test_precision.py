"""A problem sets the precision of the parameters, and runs, replays and exports keep it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import asgd
from asgd.arrays import euclidean_norm
from asgd.errors import InputError, RunFailedError
from asgd.parameter_files import read_arrays
from asgd.problems.base import gradient_of_batch, starting_point
from asgd.problems.make import make_problem
from asgd.rundir.checkpoint import PARAMETERS
from asgd.rundir.problem_record import ProblemRecord, problem_changes
from asgd.rundir.reader import Run
from asgd.rundir.writer import RunWriter
from asgd.simulation.replay import replay

RULES: list[dict[str, Any]] = [
    {"learning_rate": 0.1},
    {"rule": "momentum", "learning_rate": 0.02, "clip_norm": 0.5},
    {"rule": "staleness_aware", "learning_rate": 0.1},
]


def simulated(path: Path, problem: dict[str, Any], **tables: Any) -> Run:
    steps = {"updates": 400, "eval_every": 50, "seed": 3}
    config = {"problem": problem, **tables, "run": steps | tables.get("run", {})}
    return asgd.read_run(asgd.simulate(config, path))


def single(dtype: str = "float32", **options: Any) -> dict[str, Any]:
    return {"kind": "tests.support.plugins:single", "options": {"dtype": dtype, **options}}


@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("dim", [1, 1000])
def test_a_simulation_in_float32_equals_its_replay_to_the_last_bit(
    tmp_path: Path, dim: int, optimizer: dict[str, Any]
) -> None:
    run = simulated(tmp_path / "run", single(dim=dim), optimizer=optimizer)
    problem = make_problem(run.config)
    *_, last = replay(run, problem)
    assert problem.dtype == run.parameters.dtype == last.parameters.dtype == np.float32
    np.testing.assert_array_equal(run.parameters, last.parameters)
    norms = [step.gradient_norm for step in replay(run, problem)]
    np.testing.assert_array_equal(run.trace["gradient_norm"], norms[1:])
    double = simulated(tmp_path / "double", single("float64", dim=dim), optimizer=optimizer)
    assert double.parameters.dtype == np.float64
    assert 0 < np.abs(double.parameters - run.parameters).max() < 1e-5
    if dim > 1:
        sizes = [(one.path / PARAMETERS).stat().st_size for one in (run, double)]
        assert 0.5 <= sizes[0] / sizes[1] < 0.53


@pytest.mark.parametrize(
    ("problem", "tables", "expected"),
    [
        ({"kind": "quadratic"}, {}, "46518099b408417bebe22e0210267045"),
        ({"kind": "quartic"}, {"optimizer": {"rule": "staleness_aware"}}, "692f952be4abd389"),
        (
            {"kind": "tests.support.plugins:bowl"},
            {"optimizer": RULES[1]},
            "412ba0cfe05d861d2205865a699968eb",
        ),
    ],
)
def test_a_simulation_in_float64_has_not_changed(
    tmp_path: Path, problem: dict[str, Any], tables: dict[str, Any], expected: str
) -> None:
    """The digests are older than float32; elementary operations round equally on any machine."""
    run = simulated(tmp_path / "run", problem, **tables)
    digest = hashlib.sha256()
    for table in (run.trace, run.loss):
        for column in table:
            digest.update(np.ascontiguousarray(table[column].to_numpy()).tobytes())
    digest.update(run.parameters.tobytes())
    *_, last = replay(run, make_problem(run.config))
    digest.update(last.parameters.tobytes())
    assert digest.hexdigest().startswith(expected)


@pytest.mark.parametrize("dtype", ["float16", "int64", "single precision", "torch.bfloat16"])
def test_other_precisions_are_refused(dtype: str) -> None:
    with pytest.raises(InputError, match=rf"dtype = '{dtype}': expected float64 or float32"):
        make_problem(asgd.make_config({"problem": single(dtype)}))


def test_a_precision_that_cannot_be_set_is_refused() -> None:
    with pytest.raises(InputError, match=r"dtype = 'float32': expected numpy.dtype\('float32'\)"):
        make_problem(asgd.make_config({"problem": {"kind": "tests.support.plugins:Frozen"}}))


@pytest.mark.parametrize("dtype", ["float32", "<f4", "torch.float32"])
def test_every_name_of_a_precision_is_accepted(dtype: str) -> None:
    from asgd.problems.base import precision

    assert precision(dtype, "") == precision(np.float32, "") == np.dtype("float32")


def test_a_gradient_is_converted_once_and_an_overflow_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gradient\(x\) is not finite in float32, .* 3.4e\+38"):
        make_problem(asgd.make_config({"problem": single(large=1)}))
    problem = make_problem(asgd.make_config({"problem": single()}))
    x = starting_point(problem, 0)
    gradient = gradient_of_batch(problem, x, np.arange(3))
    exact = (problem._user.curvature * x) + (np.arange(3) - 3.5).mean() / 8  # type: ignore[attr-defined]
    assert gradient.dtype == np.float32
    np.testing.assert_array_equal(gradient, exact.astype(np.float32))
    with pytest.raises(RunFailedError, match=r"not finite in float32, which ends at 3.4e38; lower"):
        simulated(tmp_path / "run", single(large=100))


def test_the_norm_of_large_float32_is_finite() -> None:
    large = np.full(4, 1e30, np.float32)
    assert euclidean_norm(large) == pytest.approx(2e30, rel=1e-6)
    assert euclidean_norm(np.array([np.inf, 1.0], np.float32)) == np.inf
    assert np.isnan(euclidean_norm(np.array([np.nan, 1.0], np.float32)))


def test_another_precision_is_another_problem(tmp_path: Path) -> None:
    run = simulated(tmp_path / "run", single())
    other = make_problem(asgd.make_config({"problem": single("float64")}))
    assert problem_changes(run, other).endswith("dtype is float64, was float32")
    assert not problem_changes(run, make_problem(run.config))


def test_a_run_without_a_recorded_precision_is_a_run_in_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs recorded no precision before there was float32."""

    def older(self: ProblemRecord, writer: RunWriter) -> None:
        writer.event("problem", **{k: v for k, v in asdict(self).items() if k != "dtype"})

    monkeypatch.setattr(ProblemRecord, "note", older)
    run = simulated(tmp_path / "run", single())
    assert problem_changes(run, make_problem(run.config)) == "dtype is float32, was float64"
    run = simulated(tmp_path / "double", single("float64"))
    assert not problem_changes(run, make_problem(run.config))


def test_a_plug_in_gets_points_in_its_own_precision() -> None:
    """Models pass float64, and `Single.gradient` asserts that it gets float32.

    Differences of its gradients are wide enough for float32.
    """
    problem = make_problem(asgd.make_config({"problem": single(dim=3)}))
    x = starting_point(problem, 0).astype(float)
    for points in (x, np.stack([x, x])):
        assert problem.gradient(points).dtype == np.float64
        assert problem.gradient(points, np.zeros((len(points), 2), int)).dtype == np.float64
    np.testing.assert_allclose(problem.hessian(x), np.diag([0.5, 1.0, 1.5]), atol=1e-4)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_export_and_start_keep_float32(tmp_path: Path, suffix: str) -> None:
    run = simulated(tmp_path / "run", single(dim=50))
    file = asgd.export(run, tmp_path / f"model{suffix}")
    config = asgd.make_config({"problem": {**single(dim=50), "initial_from": str(file)}})
    again = starting_point(make_problem(config), 0)
    assert again.dtype == np.float32
    np.testing.assert_array_equal(again, run.parameters)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_network_is_float32_unless_float64_is_requested(tmp_path: Path, framework: str) -> None:
    """In float64, the smallest step changes the parameters; gradients are still float32 values."""
    if find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    kind = f"tests.support.networks:{framework}_perceptron"
    single, double = (
        make_problem(asgd.make_config({"problem": {"kind": kind, "options": options}}))
        for options in ({}, {"kept": "float64"})
    )
    x = starting_point(single, 0)
    assert (x.dtype, single.dtype) == (np.float32, np.float32)
    assert starting_point(double, 0).dtype == double.dtype == np.float64
    np.testing.assert_array_equal(starting_point(double, 0), x)
    gradients = [
        gradient_of_batch(problem, starting_point(problem, 0), np.arange(8))
        for problem in (single, double)
    ]
    assert [gradient.dtype for gradient in gradients] == [np.float32, np.float64]
    np.testing.assert_array_equal(*gradients)
    run = simulated(
        tmp_path / "run",
        {"kind": kind, "options": {"kept": "float64"}},
        optimizer={"learning_rate": 1e-12},
        run={"updates": 5},
    )
    assert run.parameters.dtype == np.float64
    assert (run.parameters != x).any()  # float32 has no number so close


@pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
def test_a_state_dictionary_keeps_its_precision(tmp_path: Path) -> None:
    import torch

    kinds = {"a": torch.float32, "b": torch.float64, "c": torch.bfloat16, "d": torch.int64}
    torch.save({name: torch.ones(2, dtype=kind) for name, kind in kinds.items()}, tmp_path / "m.pt")
    found = read_arrays(tmp_path / "m.pt", "m.pt")
    assert [found[name].dtype.name for name in kinds] == ["float32", "float64", "float32", "int64"]
