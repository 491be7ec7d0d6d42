"""Stability of a run: eigenvalues, limits, and runs below and above the limit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.exact.limits import stability_limits
from analysis.exact.stability import max_stable_learning_rate
from analysis.models.recorded_turns import RecordedTurns
from analysis.prediction.lanczos import largest_eigenvalues
from analysis.prediction.run_stability import DivergedPaths, leading_curvatures, run_stability
from analysis.prediction.setting import RunSetting, Setting
from analysis.profile.fitting import fit_run
from asgd.config.make import make_config
from asgd.errors import DivergedError
from asgd.problems.base import Problem
from asgd.problems.linear import breast_cancer, digits
from asgd.problems.scalar import Quadratic, Quartic
from asgd.rules.clipped import Clipped
from asgd.rules.heavy_ball import HeavyBall
from asgd.rules.nesterov import Nesterov
from asgd.rules.staleness_power import StalenessPower
from asgd.rundir.reader import Run, read_run
from asgd.simulation.simulate import simulate
from asgd.staleness.counts import Poisson
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric
from tests.support.exact import Diagonal


def setting(problem: Problem, learning_rate: float, **changes) -> Setting:
    given = Setting(
        problem=problem,
        learning_rate=learning_rate,
        batch_size=1,
        initial=problem.initial_point(np.random.default_rng(0)),
        law=Poisson(3.0),
        closure="pool",
        workers=4,
    )
    return replace(given, **changes)


def test_lanczos_agrees_with_the_dense_spectrum() -> None:
    problem = digits()
    x = 0.1 * np.random.default_rng(0).standard_normal(problem.dim)
    exact = np.linalg.eigvalsh(problem.hessian(x))[::-1][:6]
    assert np.allclose(leading_curvatures(problem, x), exact, rtol=1e-3)
    small = breast_cancer()
    exact = np.linalg.eigvalsh(small.hessian(x[:31]))[::-1][:6]
    assert np.allclose(leading_curvatures(small, x[:31]), exact)


def test_the_eigenvector_is_that_of_the_largest_eigenvalue() -> None:
    curvature = np.random.default_rng(0).permutation(200) + 1.0
    values, vector = largest_eigenvalues(lambda v: curvature * v, np.ones(200), 3, 1e-10)
    np.testing.assert_allclose(values, [200.0, 199.0, 198.0])
    np.testing.assert_allclose(np.abs(vector), curvature == 200.0, atol=1e-6)


def test_the_largest_curvature_of_several_starts_or_ends_counts() -> None:
    several = setting(Quartic(), 0.01, initial=np.array([[1.0], [3.0], [2.0]]))
    stability = run_stability(several, np.array([[1.0], [0.5], [2.0]]))
    assert stability.end is not None
    assert (stability.start.curvature, stability.end.curvature) == ([27.0], [12.0])


def test_a_hundred_thousand_parameters_need_no_matrix() -> None:
    index = np.arange(100_000)
    problem = Diagonal(0.3 / (1.0 + index) + 0.01 * (index < 8), push=0.1)
    found = leading_curvatures(problem, np.ones(problem.dim))
    assert np.allclose(found, np.sort(problem.curvature)[::-1][:6], rtol=1e-4)


def test_curvature_falls_along_a_run_and_the_limit_rises() -> None:
    problem = digits()
    end = np.zeros(problem.dim)
    for _ in range(100):
        end -= problem.gradient(end)
    stability = run_stability(setting(problem, 0.1), end)
    assert stability.end is not None
    assert stability.start.curvature[0] > 1.5 * stability.end.curvature[0]
    assert stability.start.limit < stability.end.limit
    assert stability.limit == stability.start.limit
    between = (stability.start.almost_sure + stability.end.limit) / 2
    changed = run_stability(setting(problem, between), end)
    assert changed.sentence.startswith("Unstable at the start, stable at the end")
    assert changed.start.spectral_radius[0] > 1
    assert changed.verdict == "diverges"


def test_limits_of_known_laws() -> None:
    constant = setting(Quadratic(), 0.05, law=ConstantPlusGeometric(7, 0.0), workers=8)
    assert run_stability(constant).limit == pytest.approx(0.209 / 2, rel=1e-3)
    memoryless = run_stability(setting(Quadratic(), 0.05, law=Geometric(0.7), workers=4)).start
    assert memoryless.limits is not None
    assert memoryless.limits.mean.value == pytest.approx(2 * 7 / 2)
    # Single runs diverge at far smaller rates than their mean, and their mean square at smaller.
    assert memoryless.limit == pytest.approx(0.84307 / 2, rel=1e-4)
    assert memoryless.almost_sure == pytest.approx(1.098 / 2, rel=0.01)


def test_turns_and_rule_of_the_setting_are_those_of_the_limits() -> None:
    ranks = (np.full(500, 3),)
    fixed_order = RecordedTurns(ranks, start_up=(8,), workers=4)
    recorded = run_stability(setting(Quadratic(), 0.05, turns=fixed_order))
    assert recorded.limit == pytest.approx(2 * np.sin(np.pi / 14) / 2)
    momentum = setting(Quadratic(), 0.005, turns=fixed_order, rule=Clipped(HeavyBall(0.9), 1.0))
    known = run_stability(momentum)
    assert known.limit == max_stable_learning_rate(ConstantPlusGeometric(3), 2.0, momentum=0.9)
    assert "with momentum 0.9" in known.sentence
    divided = run_stability(setting(Quadratic(), 0.05, turns=fixed_order, rule=StalenessPower(1.0)))
    assert divided.limit == pytest.approx(4 * recorded.limit)
    independent = run_stability(setting(Quadratic(), 0.05, law=Geometric(0.75), closure="iid"))
    pool = run_stability(setting(Quadratic(), 0.05, law=Geometric(0.75)))
    assert independent.limit < pool.limit  # the noise of independent lags does not cancel


def test_sentences_give_the_verdict_and_the_distance_to_the_limit() -> None:
    limits = stability_limits(Poisson(3.0), curvature=2.0)
    assert limits.mean_square is not None
    limit, sure = limits.mean_square.value, limits.almost_sure.value
    below = run_stability(setting(Quadratic(), limit / 2), np.zeros(1))
    assert below.sentence == (
        f"Stable: the largest stable learning rate is {limit:.3g} (mean square), 2 times the "
        f"{limit / 2:g} of this run; single runs diverge from {sure:.3g} on."
    )
    above = run_stability(setting(Quadratic(), 3 * sure), np.zeros(1))
    assert above.sentence.startswith("Unstable: ")
    assert f"is 3 times {sure:.3g}, from which on single runs diverge" in above.sentence
    diverged = run_stability(setting(Quadratic(), limit / 2), np.full(1, np.nan))
    assert diverged.end is None
    assert diverged.sentence.startswith("Stable at the start: ")
    flat = run_stability(setting(Quadratic(curvature=-1.0), 0.1))
    assert flat.answer().largest_stable_learning_rate is None
    assert flat.sentence.startswith("Cannot tell")
    memoryless = Geometric(0.75)
    between = run_stability(setting(Quadratic(), 0.48, law=memoryless), np.zeros(1))
    assert between.sentence.startswith("Heavy tail: at the learning rate 0.48 of this run")
    assert "with rare large excursions" in between.sentence
    growing = breast_cancer()
    uncounted = run_stability(setting(growing, 0.01, law=memoryless), np.zeros(growing.dim))
    assert uncounted.sentence.startswith("Stable: ")
    assert uncounted.sentence.endswith("from the minimum: it lowers both.")


@pytest.mark.parametrize(("diverged", "verdict"), [(1, "heavy tail"), (2, "diverges")])
def test_a_run_whose_paths_diverge_is_never_called_stable(diverged: int, verdict: str) -> None:
    """Up to 2 % of diverged paths are a heavy tail, as in a plan."""
    thrown = DivergedPaths("replay", 64, diverged)
    below = run_stability(setting(Quadratic(), 0.05), np.full(1, np.nan), thrown)
    assert below.verdict == below.answer().verdict == verdict
    what = {"heavy tail": "Heavy tail", "diverges": "Unstable"}[verdict]
    assert below.sentence.startswith(
        f"{what}: in the prediction {diverged} of 64 paths (replay) diverge. By curvature alone, "
        f"the largest stable learning rate is {below.limit:.3g} "
    )
    above = run_stability(setting(Quadratic(), 3.0), np.full(1, np.nan), thrown)
    assert above.verdict == "diverges"
    assert above.sentence.endswith(f" In the prediction {diverged} of 64 paths (replay) diverge.")
    flat = run_stability(setting(Quadratic(curvature=-1.0), 0.1), None, thrown)
    unknown = run_stability(setting(Quadratic(), 0.1, rule=Nesterov(0.9)), None, thrown)
    for one in (flat, unknown):
        assert one.answer().verdict == verdict
        assert one.sentence.endswith(f" In the prediction {diverged} of 64 paths (replay) diverge.")


def test_the_largest_rate_of_a_schedule_counts() -> None:
    limit = run_stability(setting(Quadratic(), 0.1)).limit
    burst = np.full(300, limit / 2)
    burst[100:200] = 3 * limit
    stability = run_stability(setting(Quadratic(), burst), np.zeros(1))
    assert stability.sentence.startswith("Unstable: ")
    assert stability.factor == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", ["quadratic", "least_squares"])
def test_runs_below_the_limit_settle_and_runs_above_it_do_not(tmp_path: Path, kind: str) -> None:
    """The limit is that of the measured law; runs take 0.9 and 1.15 times it."""

    def run(learning_rate: float, name: str) -> Run:
        tables = {
            "problem": {"kind": kind},
            "optimizer": {"learning_rate": learning_rate, "batch_size": 256},
            "cluster": {"workers": 8, "compute_time": {"law": "gamma", "variation": 0.2}},
            "run": {"updates": 1500, "eval_every": 50},
        }
        return read_run(simulate(make_config(tables), tmp_path / name))

    probe = run(0.01, "probe")
    limit = run_stability(RunSetting.of(probe, fit_run(probe))).limit
    below = run(0.9 * limit, "below").loss["loss"].to_numpy()
    assert below[-10:].max() < below[0]
    with pytest.raises(DivergedError, match="too large"):
        run(1.15 * limit, "above")
