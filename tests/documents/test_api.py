"""The public names of the packages exist, are documented and typed, and print their headline."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import analysis
import asgd
from tests.support.reports import HOSTILE, simulated_run

PACKAGES = ("asgd", "cluster", "analysis")
NAMES = [(package, name) for package in PACKAGES for name in dir(importlib.import_module(package))]
OPTIONAL = {"JaxProblem": "jax", "TorchProblem": "torch"}  # the extra that each name needs
# Names that users rely on: users notice if one is removed or renamed.
STAY = {
    "asgd": (
        "AsgdError ComputeTime ConstantPlusGeometric ConwayMaxwellPoisson DivergedError "
        "Empirical Geometric GeometricMixture InputError JaxProblem NegativeBinomial Poisson "
        "Problem Record Run RunConfig RunFailedError StalenessLaw StalenessLog TorchProblem "
        "UnreliableEstimateError export from_frame import_log load_config make_config "
        "make_problem read_record read_run read_runs simulate simulate_staleness "
        "with_batch_sizes"
    ),
    "cluster": "resume run set_workers",
    "analysis": (
        "Ensemble Limit Plan Prediction Score ServerTimes StabilityLimits StalenessFit Study "
        "asgd_iid asgd_moments asgd_server compare compare_fits config_staleness events_table "
        "figures fit_run fit_runs fit_staleness max_stable_learning_rate momentum_sgd "
        "optimal_batch_schedule plan predict queue_staleness read_prediction sgd sme_asgd "
        "sme_langevin sme_law sme_msgd sme_replay sme_sgd stability_limits "
        "stationary_variance timeline workers_table write_report"
    ),
}


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_public_names_are_documented_and_typed(package: str, name: str) -> None:
    module = importlib.import_module(package)
    if name in OPTIONAL and find_spec(OPTIONAL[name]) is None:
        pytest.skip(f"{OPTIONAL[name]} is not installed")
    thing = getattr(module, name)
    assert thing.__doc__
    if inspect.isfunction(thing):
        missing = [
            parameter.name
            for parameter in inspect.signature(thing).parameters.values()
            if parameter.annotation is inspect.Parameter.empty
        ]
        assert not missing
        assert "return" in thing.__annotations__


def test_a_type_checker_sees_the_same_names() -> None:
    for package in PACKAGES:
        module = importlib.import_module(package)
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        for name in dir(module):
            assert f" import {name} as {name}\n" in source, f"{package}.{name}"
        assert source.count(" as ") == len(dir(module))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_stay(package: str) -> None:
    assert set(STAY[package].split()) <= set(dir(importlib.import_module(package)))


def test_dir_lists_the_public_names_and_nothing_else() -> None:
    for package in PACKAGES:
        module = importlib.import_module(package)
        optional = OPTIONAL if package == "asgd" else ()
        assert dir(module) == sorted({*module.__all__, *optional})
        assert len(set(module.__all__)) == len(module.__all__) == len(dir(module)) - len(optional)


def test_import_star_works_without_the_extras() -> None:
    lines = [
        "import sys",
        "class WithoutExtras:",
        "    def find_spec(self, name, *rest):",
        "        if name in ('jax', 'torch'):",
        "            raise ModuleNotFoundError(name)",
        "sys.meta_path.insert(0, WithoutExtras())",
        *(f"from {package} import *" for package in PACKAGES),
        "print(make_problem, Study, set_workers)",
        "import asgd",
        "asgd.TorchProblem",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.stdout.count("<") == 3, done.stderr
    assert "pip install '.[torch]'" in done.stderr


def test_importing_modules_hides_no_function_and_keeps_the_backend_of_matplotlib() -> None:
    code = (
        "import matplotlib\n"
        "matplotlib.use('svg')\n"
        "import analysis.figures, analysis.models.sme_law, analysis.models.sme_sgd\n"
        "assert matplotlib.get_backend() == 'svg'\n"
        "from analysis import sme_law, sme_sgd, sme_replay\n"
        "assert all(map(callable, (sme_law, sme_sgd, sme_replay, analysis.sme_law)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    for package in PACKAGES:
        with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'no_such'"):
            importlib.import_module(package).__getattr__("no_such")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> asgd.Run:
    return simulated_run(tmp_path_factory.mktemp("api") / "run")


def test_results_print_their_headline(run: asgd.Run) -> None:
    fit = analysis.fit_run(run)
    prediction = analysis.predict(run, fit=fit)
    score = analysis.compare(run, prediction)
    problem = asgd.make_problem(run.config)
    ensemble = analysis.sme_law(problem, 0.05, asgd.Geometric(0.75), 20, 4, 0)
    assert "quadratic, 4 workers, finished, 300 of 300 updates, mean staleness" in repr(run)
    assert "Ensemble(4 paths, d = 1, 21 records of updates 0 to 20" in repr(ensemble)
    assert "geometric law" in repr(fit)
    assert prediction.label("sme_law") in repr(prediction)
    assert "relative_error" in repr(score)
    for thing in (run, fit, fit.geometric, prediction, score, ensemble):
        assert len(repr(thing)) < 2500
        if thing not in (fit.geometric, ensemble):
            assert "<table" in thing._repr_html_()


def test_names_of_runs_are_escaped_in_a_notebook(run: asgd.Run) -> None:
    empty = asgd.Run(Path(HOSTILE), run.config)
    assert "0 of 300 updates" in repr(empty)
    assert "<script" not in empty._repr_html_()
    assert "&lt;script" in empty._repr_html_()


def test_figures_are_drawn_into_axes_of_the_caller(run: asgd.Run) -> None:
    ax = analysis.figures.new_axes()
    counts, laws = analysis.fit_run(run).histogram()
    assert analysis.figures.staleness_histogram(counts, laws, ax) is ax
    assert counts.sum() > 200
    for pmf in laws.values():
        assert pmf.shape == counts.shape
        assert np.all(pmf >= 0)
