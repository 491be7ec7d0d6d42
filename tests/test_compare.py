"""Scores: known errors are measured as such, and the CRPS agrees with an independent library."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scoringrules

from analysis.compare import compare, crps_from_quantiles
from analysis.predict import QUANTILE_LEVELS, Prediction, quantile_column
from asgd.config import make_config
from asgd.errors import InputError
from asgd.trace import Run, RunWriter, read_run

UPDATE = np.arange(0, 101, 10)


def run_with_loss(path: Path, loss: np.ndarray) -> Run:
    writer = RunWriter.create(path, make_config())
    writer.loss({"update": UPDATE, "seconds": UPDATE / 10, "loss": loss})
    return read_run(path)


def normal_prediction(mean: np.ndarray, std: float) -> Prediction:
    from scipy.stats import norm

    quantiles = {quantile_column(level): mean + std * norm.ppf(level) for level in QUANTILE_LEVELS}
    curve = {"model": "sme_law", "update": UPDATE, "loss_mean": mean, "loss_std": std}
    return Prediction(pd.DataFrame({**curve, **quantiles}), {})


def test_a_known_offset_is_the_relative_error(tmp_path: Path) -> None:
    run = run_with_loss(tmp_path / "run", np.full(len(UPDATE), 2.0))
    score = compare(run, normal_prediction(np.full(len(UPDATE), 2.5), 1.0)).models["sme_law"]
    assert score.relative_error == pytest.approx(0.25)
    assert score.worst_error == pytest.approx(0.25)
    assert score.coverage == 1.0


def test_the_given_starting_point_does_not_count(tmp_path: Path) -> None:
    loss = np.full(len(UPDATE), 2.0)
    loss[0] = 100.0
    score = compare(run_with_loss(tmp_path / "run", loss), normal_prediction(loss * 0 + 2.0, 1.0))
    assert score.models["sme_law"].relative_error == pytest.approx(0.0)


def test_coverage_of_a_right_prediction_is_the_level_of_the_band(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    runs = [
        run_with_loss(tmp_path / str(i), 5.0 + rng.standard_normal(len(UPDATE))) for i in range(60)
    ]
    prediction = normal_prediction(np.full(len(UPDATE), 5.0), 1.0)
    coverage = compare(runs, prediction).models["sme_law"].coverage
    standard_error = np.sqrt(0.9 * 0.1 / (60 * (len(UPDATE) - 1)))
    assert abs(coverage - 0.9) < 4 * standard_error
    narrow = normal_prediction(np.full(len(UPDATE), 5.0), 0.5)
    assert compare(runs, narrow).models["sme_law"].coverage < 0.7


def test_crps_agrees_with_the_closed_form_of_a_normal_forecast() -> None:
    from scipy.stats import norm

    observed = np.array([-2.0, -0.3, 0.0, 0.9, 1.5])
    quantiles = np.tile(norm.ppf(QUANTILE_LEVELS), (len(observed), 1))
    exact = scoringrules.crps_normal(observed, 0.0, 1.0)
    # The trapezoid rule over 40 intervals leaves out most of the two end cells.
    assert np.allclose(crps_from_quantiles(observed, quantiles), exact, rtol=0.03)


def test_a_prediction_at_updates_that_were_not_evaluated_is_refused(tmp_path: Path) -> None:
    run = run_with_loss(tmp_path / "run", np.ones(len(UPDATE)))
    prediction = normal_prediction(np.ones(len(UPDATE)), 1.0)
    shifted = Prediction(prediction.curves.assign(update=UPDATE + 1), {})
    with pytest.raises(InputError, match="no loss at update"):
        compare(run, shifted)
