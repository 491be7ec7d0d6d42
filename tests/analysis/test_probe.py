"""The probe of a run, compared with a known Hessian."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.exact.linear_rules import LinearRule
from analysis.prediction.probe import SHARE, leading_curvature, read_probe
from analysis.prediction.run_stability import leading_curvatures, limits_of
from analysis.prediction.setting import RunSetting
from analysis.report.write import write_report
from analysis.study import Study
from asgd.__main__ import main
from asgd.config.make import make_config
from asgd.problems.linear import digits
from asgd.rundir.reader import Run, read_run
from asgd.simulation.simulate import simulate
from scripts.methods_problems import Perceptron
from tests.support.networks import wide_linear, wide_linear_data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = make_config(
        {
            "problem": {"kind": "tests.support.networks:wide_linear"},
            "optimizer": {"learning_rate": 0.05, "batch_size": 64},
            "cluster": {"workers": 4},
            "run": {"updates": 1500, "eval_every": 500},
        }
    )
    return read_run(simulate(config, tmp_path_factory.mktemp("probe") / "run"))


def exact() -> float:
    features, _ = wide_linear_data()
    return float(np.linalg.eigvalsh(features.T @ features / len(features))[-1])


def test_the_curvature_of_all_samples_is_that_of_the_hessian() -> None:
    problem = wide_linear()
    found = leading_curvature(problem, np.ones(100), 400, np.random.default_rng(0))
    assert found.low == found.high == pytest.approx(exact(), rel=1e-3)
    softmax = digits()  # products by differences
    x = 0.1 * np.random.default_rng(1).standard_normal(softmax.dim)
    found = leading_curvature(softmax, x, softmax.n_samples, np.random.default_rng(0))
    assert found.high == pytest.approx(leading_curvatures(softmax, x, 1)[0], rel=1e-3)


def test_a_saturated_network_has_no_curvature() -> None:
    network = Perceptron(hidden=4)
    # Only one class, which is predicted with certainty: gradients and curvatures are zero.
    x = np.zeros(network.dim)
    x[-1] = 1e4
    nines = np.flatnonzero(network.labels == 9)
    network.labels, network.n_samples = network.labels[nines], len(nines)
    network._pixels = network._pixels[nines]
    assert not network.gradient(x).any()
    assert leading_curvature(network, x, 10**6, np.random.default_rng(0)).high == 0.0
    np.testing.assert_array_equal(leading_curvatures(network, x, 2), [0.0, 0.0])


def test_the_mean_ends_from_few_samples_enclose_the_curvature() -> None:
    """The ends are means over 100 probes of 64 samples, with three standard errors."""
    problem, probes = wide_linear(), 100
    found = [
        leading_curvature(problem, np.zeros(100), 64, np.random.default_rng(seed))
        for seed in range(probes)
    ]
    ends = np.array([(one.low, one.high) for one in found])
    (low, high), error = ends.mean(axis=0), ends.std(axis=0, ddof=1) / np.sqrt(probes)
    assert low + 3 * error[0] < exact() < high - 3 * error[1]
    assert 0.8 * exact() < low
    assert high < 1.4 * exact()


def test_a_probe_costs_a_tenth_of_the_run_and_gives_its_limits(run: Run) -> None:
    study = Study.open(run.path)
    probe = study.probe()
    assert [one.update for one in probe.curvature] == [0, 1500]
    assert 0.5 * SHARE < probe.share <= SHARE
    products = sum(one.products for one in probe.curvature)
    assert probe.share == 2.5 * products * probe.samples / (1500 * 64)
    setting = RunSetting.of(study.runs, study.fit)
    # gradients are linear, so both points have the limit of the exact curvature; the mean square of
    # m normal features has a relative standard error of sqrt(2 / m), and four are allowed
    limits = limits_of(setting, LinearRule()).at_curvature(exact())
    assert limits.mean_square is not None
    assert probe.stability.largest_stable_learning_rate == pytest.approx(
        limits.mean_square.value, rel=4 * np.sqrt(2 / probe.samples)
    )
    assert probe.stability.verdict == "stable"
    assert "Probed, not predicted: leading curvature" in probe.sentence
    assert f"on {probe.samples} of 400 samples" in probe.sentence


@pytest.mark.parametrize(
    ("tables", "what"),
    [
        ({"optimizer": {"rule": "adam", "learning_rate": 0.01}}, "this rule"),
        ({"cluster": {"discard_above": 1}}, "this policy of the server"),
    ],
    ids=["adam", "discarding"],
)
def test_a_probe_of_a_run_without_limits_gives_none(
    tables: dict[str, dict[str, Any]], what: str, tmp_path: Path
) -> None:
    given = {
        "problem": {"kind": "tests.support.networks:wide_linear"},
        "optimizer": {"learning_rate": 0.05, "batch_size": 16},
        "cluster": {"workers": 4},
        "run": {"updates": 400, "eval_every": 200},
    }
    config = make_config({**given, **{key: {**given[key], **of} for key, of in tables.items()}})
    probe = Study.open(simulate(config, tmp_path / "run")).probe()
    assert f"no limit of the learning rate is known for {what}" in probe.sentence
    assert probe.samples < probe.of_samples
    assert "limits are those" not in probe.sentence
    assert probe.stability.largest_stable_learning_rate is None


def test_the_command_stores_a_probe_and_the_report_shows_it(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["predict", str(run.path), "--method", "probe", "--json"])
    told = json.loads(capsys.readouterr().out)
    stored = read_probe(run.path)
    assert stored is not None
    assert told["sentence"] == stored.sentence
    study = Study.open(run.path)
    assert study.prediction is None
    page = write_report([study], tmp_path / "report.html").read_text()
    assert "Probed, not predicted: leading curvature" in page
    assert "only its stability was probed" in page
    assert stored.stability.factor is not None
    assert (
        f"The limit is {stored.stability.factor:.2g} times the learning rate where it was probed: "
        "there is margin" in page
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_limit", "updates", "advice"),
    [
        (0.6, 1500, "The learning rate is within a factor of"),
        (1.3, 300, "Lower the learning rate below"),
    ],
)
def test_the_advice_after_a_probe_depends_on_its_limits(
    run: Run, of_limit: float, updates: int, advice: str, tmp_path: Path
) -> None:
    limit = Study.open(run.path).probe().stability.largest_stable_learning_rate
    assert limit is not None
    tables = {"learning_rate": of_limit * limit, "batch_size": 64}
    config = make_config(
        {
            "problem": {"kind": "tests.support.networks:wide_linear"},
            "optimizer": tables,
            "cluster": {"workers": 4},
            "run": {"updates": updates, "eval_every": 100, "divergence_factor": 1e300},
        }
    )
    study = Study.open(simulate(config, tmp_path / "run"))
    study.probe()
    page = write_report([study], tmp_path / "report.html").read_text()
    assert advice in page
