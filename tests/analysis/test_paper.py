import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.exact.linear_gradients import LinearGradients
from analysis.exact.moments import MomentRecursion, stationary_variance
from analysis.paper.claim import value
from analysis.paper.claims import CLAIMS
from analysis.paper.fig1 import MUS, fig1
from analysis.paper.fig2 import (
    CONTINUOUS,
    NATIVE,
    STARTS,
    WELL_MU,
    WELL_NOISE,
    WELL_RATE,
    WELL_UPDATES,
    fig2,
)
from analysis.paper.fig2 import _models as fig2_models
from analysis.paper.fig3 import BEST, OTHERS, fig3, settings
from analysis.paper.linear_nonlinear import linear_nonlinear
from analysis.paper.proposition2 import LARGE, SMALL, proposition2
from analysis.paper.temperature import temperature
from analysis.paper.theorem3 import PROBLEMS, theorem3
from asgd.problems.scalar import DoubleWell, Quadratic

SCRIPT = Path(__file__).parents[2] / "scripts" / "paper_figures.py"


@pytest.fixture(scope="module")
def moments_of_models():
    return fig1()


def test_fig1_the_advantage_of_sme_asgd_over_sme_sgd_grows_with_the_delay(moments_of_models):
    claim = moments_of_models
    assert 2 < claim.numbers["low 0.5"] < 2.5
    assert claim.numbers["low 0.75"] > 5.5
    assert claim.numbers["low 0.9"] > 9
    errors = claim.tables["errors"]
    for column in ("max_error_mean", "max_error_second_moment"):
        baseline = [value(errors, column, model="SME-SGD", mu=mu) for mu in MUS]
        assert np.all(np.diff(baseline) > 0)
    # the remaining error of the native scheme is the sampling error of the paths
    native = errors[errors["model"] == "SME-ASGD"]
    assert np.all(native["max_error_mean"] <= 4 * native["max_standard_error_mean"])
    within = 4 * native["max_standard_error_second_moment"]
    assert np.all(native["max_error_second_moment"] <= within)


def test_fig1_sme_asgd_oscillates_with_asgd_and_sme_sgd_does_not(moments_of_models):
    curves = moments_of_models.tables["curves"]
    lowest = curves[curves["mu"] == 0.9].groupby("model")["mean"].min()
    assert lowest["exact"] == pytest.approx(-0.275, abs=0.002)
    assert lowest["ASGD"] == pytest.approx(-0.275, abs=0.03)
    assert lowest["SME-ASGD"] == pytest.approx(-0.275, abs=0.03)
    assert lowest["SME-SGD"] > -0.03


@pytest.mark.slow
def test_fig2_the_well_a_path_ends_in():
    """With one step per update the shares of both models differ by sampling error alone."""
    claim = fig2(paths=10_000, starts=(0.3, 8.0))
    assert claim.numbers["largest_z_sme_asgd"] < 4
    wells = claim.tables["wells"]
    for start in (0.3, 8.0):
        here = wells[wells["initial"] == start]
        low, high = (value(here, end, model="ASGD") for end in ("low", "high"))
        assert not low - 0.02 <= value(here, "share", model="SME-SGD") <= high + 0.02
    for moment in ("mean", "second_moment"):
        ours = claim.numbers[f"quartic_{moment}_sme_asgd"]
        assert claim.numbers[f"quartic_{moment}_sme_sgd"] > 20 * ours


def shares_in_right_well(start, paths, models):
    """Return the share of paths that end in the right well and its standard error, by model."""
    problem, shares = DoubleWell(WELL_NOISE, start), {}
    for model in models:
        simulate = fig2_models(WELL_RATE, WELL_MU, WELL_UPDATES)[model]
        seed = round(1000 * start)
        x = simulate(problem, paths, seed, record=[WELL_UPDATES], quantile_levels=()).final
        share = np.mean(x > 0)
        shares[model] = share, np.sqrt(share * (1 - share) / paths)
    return shares


def test_fig2_the_continuous_equation_is_near_and_not_equal():
    """From x_0 = 8 its share is O(dt) off: more than sampling error, far less than SME-SGD."""
    shares = shares_in_right_well(8.0, 40_000, ["ASGD", CONTINUOUS])
    (discrete, error), (continuous, other) = shares.values()
    assert abs(continuous - discrete) > 4 * np.hypot(error, other)
    # under SME-SGD all paths end in the right well
    assert abs(continuous - discrete) < 0.03 < (1 - discrete) / 20


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_fig2_sme_asgd_follows_every_starting_point(start):
    (discrete, error), (ours, other) = shares_in_right_well(
        start, 10_000, ["ASGD", NATIVE]
    ).values()
    assert abs(ours - discrete) < 4 * np.hypot(error, other)


def test_fig3_the_optimum_wins_at_equal_budget_and_asgd_agrees():
    claim = fig3(paths=4_000)
    final = claim.tables["final"]
    for setting in settings():
        here = final[final["setting"] == setting.name]
        assert set(here["gradients"]) == {setting.budget}
        best = value(here, "final_loss", schedule=BEST)
        assert all(best < value(here, "final_loss", schedule=name) for name in OTHERS)
    error = np.abs(final["simulated_final_loss"] - final["final_loss"])
    assert np.all(error <= 4 * final["standard_error"])
    # beyond the paper: much better where one rate does not describe the decay
    assert claim.numbers["least squares/closed form (B4)"] > 3
    assert claim.numbers["real eigenvalues/closed form (B4)"] < 1.01


@pytest.fixture(scope="module")
def strong_error():
    return theorem3(paths=300, replicates=100)


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("coupling", ["gaussian", "own lags and samples"])
def test_theorem3_bound_holds_and_is_sharp_at_fixed_friction(strong_error, problem, coupling):
    slopes = strong_error.tables["slopes"]
    labels = {"problem": problem, "coupling": coupling}
    low = value(slopes, "low", scaling="fixed mu", **labels)
    assert low > 4  # claimed: at least 2
    assert 1.9 < value(slopes, "slope", scaling="fixed friction", **labels) < 2.4
    # the local slope still falls towards two
    errors = strong_error.tables["errors"]
    labels["scaling"] = "fixed friction"
    here = errors[np.logical_and.reduce([errors[key] == v for key, v in labels.items()])]
    local = np.diff(np.log(here["error"])) / np.diff(np.log(here["dt"]))
    assert local[-1] < local[0]


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
def test_theorem3_drift_alone_approaches_order_six_at_fixed_mu(strong_error, problem):
    errors = strong_error.tables["errors"]
    labels = {"problem": problem, "coupling": "no noise", "scaling": "fixed mu"}
    here = errors[np.logical_and.reduce([errors[key] == v for key, v in labels.items()])]
    local = np.diff(np.log(here["error"])) / np.diff(np.log(here["dt"]))
    assert local[-1] == pytest.approx(6, abs=0.7)
    assert abs(local[-1] - 6) < abs(local[0] - 6)


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
def test_theorem3_needs_the_coupling_where_the_noise_does_not_fade(strong_error, problem):
    slopes = strong_error.tables["slopes"]
    labels = {"problem": problem, "coupling": "signs"}
    assert value(slopes, "slope", scaling="fixed friction", **labels) == pytest.approx(1, abs=0.2)
    assert value(slopes, "low", scaling="fixed mu", **labels) > 2


def test_proposition2_formulas_agree():
    formulas = proposition2(paths=100, thinned_paths=50).tables["formulas"]
    for _, pair in formulas.groupby("eta"):
        for column in ("time_step", "friction", "temperature"):
            first, second = pair[column]
            assert first == pytest.approx(second, rel=1e-12)


def test_proposition2_expected_read_is_momentum_and_the_iterate_is_not():
    claim = proposition2(paths=5_000)
    n = claim.numbers
    assert n["small_read_pvalue"] > 0.01
    assert n["small_iterate_pvalue"] < 1e-4
    error = np.hypot(n["small_read_standard_error"], n["small_momentum_standard_error"])
    assert abs(n["small_read_variance"] - n["small_momentum_variance"]) < 4 * error
    # at a large step the effect of the random lags is visible
    assert n["large_read_pvalue"] < 1e-6
    rest = claim.tables["stationary"]
    for eta, mu in (SMALL, LARGE):
        exact = stationary_variance(2.0, 4.0, eta, mu)
        for model, variance in (("X", exact.iterate), ("M", exact.expected_read)):
            here = rest[(rest["eta"] == eta) & rest["model"].str.endswith(model)].iloc[0]
            assert abs(here["variance"] - variance) < 4 * here["standard_error"]


def test_proposition2_before_rest_the_means_of_m_and_momentum_agree_and_x_leads():
    paths = 10_000
    course = proposition2(paths=paths, thinned_paths=50).tables["course"]
    for _, here in course.groupby("eta"):
        mean = here.pivot(index="update", columns="model", values="mean")
        variance = here.pivot(index="update", columns="model", values="variance")
        momentum, read = mean["momentum SGD"], mean["ASGD, expected read M"]
        spread = variance["momentum SGD"] + variance["ASGD, expected read M"]
        some = [1, 5, 10, 20, 40]
        assert np.all(np.abs(momentum - read)[some] <= 4 * np.sqrt(spread / paths)[some] + 1e-12)
        assert (mean["ASGD, iterate X"] - momentum).abs().max() > 0.08


@pytest.mark.parametrize(("eta", "mu"), [SMALL, LARGE])
def test_without_lag_noise_the_expected_read_has_the_moments_of_momentum_exactly(eta, mu):
    recursion = MomentRecursion(LinearGradients.of(Quadratic()), mu, closure="sampling")
    states = recursion.run(np.ones(1), np.full(200, eta), np.ones(200))
    _, _, m, _, _, mm, _ = recursion.split(states)
    rate, a, s2 = (1 - mu) * eta, 2.0, 4.0
    step = np.array([[1 - rate * a, mu], [-rate * a, mu]])  # of position and velocity
    mean, second = np.array([1.0, 0.0]), np.array([[1.0, 0.0], [0.0, 0.0]])
    for k in range(200):
        assert m[k, 0] == pytest.approx(mean[0], abs=1e-12)
        assert mm[k, 0, 0] == pytest.approx(second[0, 0], rel=1e-10)
        mean, second = step @ mean, step @ second @ step.T + rate**2 * s2


def test_temperature_simulation_has_the_exact_variances():
    claim = temperature(paths=4_000)
    z = claim.tables["variance"][["z_iterate_exact", "z_expected_read_exact"]].to_numpy()
    assert np.abs(z).max() < 4
    assert np.sqrt(np.mean(z**2)) < 1.5


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.75, 0.9])
def test_temperature_formulas_are_the_limit_and_their_correction_is_of_first_order(mu):
    """Each ratio is 1 + first * h + O(h^2); the slope is extrapolated to step h = 0."""
    a, s2, steps = 2.0, 4.0, np.array([4e-4, 2e-4, 1e-4])
    exact = [stationary_variance(a, s2, h / a, mu) for h in steps]
    thermal = steps / a * s2 / (2 * a)
    l3, b3 = (thermal * (1 + q * steps / (1 - mu)) for q in (mu**2, 1))
    corrections = {
        "M over (L2)": (np.array([e.expected_read for e in exact]) / thermal, 0.5 - mu / (1 + mu)),
        "X over (L3)": (np.array([e.iterate for e in exact]) / l3, 0.5 + mu),
        "(B3) over X": (b3 / np.array([e.iterate for e in exact]), 0.5),
    }
    for name, (ratio, first) in corrections.items():
        slope = (ratio - 1) / steps
        # the remaining error is of second order in h / (1 - mu)
        limit = 2 * slope[1:] - slope[:-1]
        assert limit[-1] == pytest.approx(first, abs=1e-4), name


def test_linear_and_nonlinear_forms_are_one_law_for_linear_gradients():
    n = linear_nonlinear(paths=10_000).numbers
    assert n["difference_native"] < 1e-12
    assert n["difference_substeps"] < 1e-12
    assert min(n["pvalue_native"], n["pvalue_substeps"]) > 0.001
    # they differ for nonlinear gradients, and with (L3) used for the continuous equation
    assert n["difference_double_well"] > 0.1
    assert n["difference_substeps_L3"] > 0.05
    assert n["pvalue_substeps_L3"] < 1e-6


def call_script(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_writes_every_kind_of_file(tmp_path, monkeypatch, capsys):
    call_script(monkeypatch, "fig1", "--out", str(tmp_path))
    assert "fig1: " in capsys.readouterr().out
    assert (tmp_path / "fig1.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "fig1.svg").read_text()
    assert "f = x^2" in (tmp_path / "fig1.txt").read_text()
    assert set(pd.read_csv(tmp_path / "fig1.errors.csv")["mu"]) == set(MUS)


def test_the_script_names_its_figures(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call_script(monkeypatch, "fig9")
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert all(name in message for name in CLAIMS)
