"""Scores: known errors are measured as such, and the CRPS agrees with an independent library."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scoringrules

from analysis.loss_curve import QUANTILE_LEVELS
from analysis.prediction import Prediction, quantile_column
from analysis.score import compare, crps_from_quantiles
from asgd.config import make_config
from asgd.errors import InputError
from asgd.trace import Run, RunWriter, read_run

UPDATE = np.arange(0, 101, 10)


def run_with_loss(path: Path, loss: np.ndarray) -> Run:
    writer = RunWriter.create(path, make_config())
    writer.loss({"update": UPDATE, "seconds": UPDATE / 10, "loss": loss})
    return read_run(path)


def normal_prediction(
    mean: np.ndarray, std: float, model: str = "sme_law", paths: int | None = None
) -> Prediction:
    from scipy.stats import norm

    quantiles = {quantile_column(level): mean + std * norm.ppf(level) for level in QUANTILE_LEVELS}
    curve = {"model": model, "update": UPDATE, "loss_mean": mean, "loss_std": std}
    curve["loss_mean_error"] = std / np.sqrt(paths) if paths else 0.0
    settings = {"models": {model: {"label": model, "paths": paths}}}
    return Prediction(pd.DataFrame({**curve, **quantiles}), settings)


def together(*predictions: Prediction) -> Prediction:
    models = {name: m for p in predictions for name, m in p.settings["models"].items()}
    return Prediction(pd.concat([p.curves for p in predictions]), {"models": models})


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
    score = compare(runs, prediction)
    coverage = score.models["sme_law"].coverage
    standard_error = np.sqrt(0.9 * 0.1 / (60 * (len(UPDATE) - 1)))
    assert abs(coverage - 0.9) < 4 * standard_error
    # A mean of absolute values has no honest bootstrap: it would add the scatter of the runs again.
    assert score.intervals is not None
    ends = {f"{name}_{end}" for name in ("coverage", "crps") for end in ("low", "high")}
    assert set(score.intervals) == ends | {"coverage_error"}
    narrow = normal_prediction(np.full(len(UPDATE), 5.0), 0.5)
    assert compare(runs, narrow).models["sme_law"].coverage < 0.7


def test_the_error_is_split_into_known_parts(tmp_path: Path) -> None:
    run = run_with_loss(tmp_path / "run", np.full(len(UPDATE), 2.0))
    flat = np.ones(len(UPDATE))
    prediction = together(
        normal_prediction(2.9 * flat, 0.1, "sme_asgd"),
        normal_prediction(2.3 * flat, 0.1, "sme_law"),
        normal_prediction(2.1 * flat, 0.1, "replay", paths=4),
    )
    score = compare(run, prediction)
    assert score.parts["error"].round(9).tolist() == [0.05, 0.1, 0.3]
    noise = np.sqrt(2 / np.pi) * 0.1 / 2.0 * np.sqrt([1 + 1 / 4, 1 / 4, 0.0])
    assert np.allclose(score.parts["noise"], noise)
    assert score.closest == "sme_law"


def test_parts_without_their_models_are_left_out(tmp_path: Path) -> None:
    run = run_with_loss(tmp_path / "run", np.full(len(UPDATE), 2.0))
    assert compare(run, normal_prediction(np.ones(len(UPDATE)), 1.0)).parts.empty


def test_the_noise_of_the_split_is_the_scatter_of_right_predictions(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    size = (100, len(UPDATE))
    errors, noises = [], []
    for i, mean in enumerate(5 + rng.standard_normal(size) / 2):
        run = run_with_loss(tmp_path / str(i), 5 + rng.standard_normal(len(UPDATE)))
        parts = compare(run, normal_prediction(mean, 1.0, "replay", paths=4)).parts
        errors.append(parts["error"].iloc[0])
        noises.append(parts["noise"].iloc[0])
    standard_error = np.std(errors) / np.sqrt(len(errors))
    assert abs(np.mean(errors) - np.mean(noises)) < 4 * standard_error


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
