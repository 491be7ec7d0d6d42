"""The examples in the docstrings of the functions that users meet first."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

import analysis
import asgd
from tests.support.reports import simulated_run

SHOWN = (
    "Study",
    "fit_run",
    "optimal_batch_schedule",
    "plan",
    "predict",
    "sme_asgd",
    "sme_law",
    "stability_limits",
)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    run = simulated_run(Path(tmp_path_factory.mktemp("examples")) / "run")
    problem = asgd.make_problem(run.config)
    return {"analysis": analysis, "asgd": asgd, "run": run, "problem": problem}


@pytest.mark.parametrize("name", SHOWN)
def test_the_example_runs(name: str, names: dict[str, object]) -> None:
    shown = getattr(analysis, name)
    found = doctest.DocTestParser().get_doctest(shown.__doc__, dict(names), name, None, None)
    assert found.examples
    report: list[str] = []
    assert doctest.DocTestRunner().run(found, out=report.append).failed == 0, "".join(report)
