"""The examples in the docstrings of the public names."""

from __future__ import annotations

import doctest
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

import analysis
import asgd
import cluster
from tests.support.reports import simulated_run

PACKAGES: dict[str, ModuleType] = {"asgd": asgd, "analysis": analysis, "cluster": cluster}
OTHER_FRAMEWORKS = {"TorchProblem", "JaxProblem"}  # imported only where they are needed
LEAST = {  # names that users meet first
    "asgd": {
        "ComputeTime",
        "Geometric",
        "Run",
        "StalenessLaw",
        "StalenessLog",
        "from_frame",
        "make_config",
        "make_problem",
        "read_run",
        "simulate",
        "simulate_staleness",
    },
    "analysis": {
        "Study",
        "compare",
        "fit_run",
        "fit_staleness",
        "optimal_batch_schedule",
        "plan",
        "predict",
        "sme_asgd",
        "sme_law",
        "stability_limits",
        "write_report",
    },
    "cluster": {"resume", "run"},
}


def with_examples(package: str) -> list[str]:
    """Return the public names of a package whose docstring has an example."""
    module = PACKAGES[package]
    public = sorted(set(dir(module)) - OTHER_FRAMEWORKS)
    return [name for name in public if ">>>" in (getattr(module, name).__doc__ or "")]


SHOWN = [
    pytest.param(package, name, marks=[pytest.mark.ray] if package == "cluster" else [])
    for package in PACKAGES
    for name in with_examples(package)
]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    directory = Path(tmp_path_factory.mktemp("examples"))
    run = simulated_run(directory / "run")
    return {
        "analysis": analysis,
        "asgd": asgd,
        "cluster": cluster,
        "np": np,
        "run": run,
        "problem": asgd.make_problem(run.config),
        "frame": pd.DataFrame({"lag": [0, 1, 1, 2], "client": ["a", "b", "a", "b"]}),
        "out": directory / "record",
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_names_that_users_meet_first_have_an_example(package: str) -> None:
    assert LEAST[package] <= set(with_examples(package))


@pytest.mark.parametrize(("package", "name"), SHOWN)
def test_the_example_runs(
    package: str,
    name: str,
    names: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if package == "cluster":
        request.getfixturevalue("shared_ray")
    monkeypatch.chdir(tmp_path)
    shown = getattr(PACKAGES[package], name)
    found = doctest.DocTestParser().get_doctest(shown.__doc__, dict(names), name, None, None)
    assert found.examples
    report: list[str] = []
    assert doctest.DocTestRunner().run(found, out=report.append).failed == 0, "".join(report)
