"""Scores: known errors are measured, and the CRPS agrees with an independent library."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scoringrules

from analysis.prediction.loss_curve import SCORED_LEVELS
from analysis.prediction.predict import (
    PredictedWith,
    Prediction,
    PredictionSettings,
    quantile_column,
)
from analysis.prediction.score import compare, crps_from_quantiles, relative_error_interval
from asgd.config.make import make_config
from asgd.errors import InputError
from asgd.rundir.reader import Run, read_run
from asgd.rundir.writer import RunWriter

UPDATE = np.arange(0, 101, 10)


def run_with_loss(path: Path, loss: np.ndarray) -> Run:
    writer = RunWriter.create(path, make_config({"run": {"eval_every": 10}}))
    writer.loss({"update": UPDATE, "seconds": UPDATE / 10, "loss": loss})
    return read_run(path)


def normal_prediction(
    mean: np.ndarray, std: float, model: str = "sme_law", paths: int | None = None
) -> Prediction:
    from scipy.stats import norm

    quantiles = {quantile_column(level): mean + std * norm.ppf(level) for level in SCORED_LEVELS}
    curve = {"model": model, "update": UPDATE, "loss_mean": mean, "loss_std": std}
    curve["loss_mean_error"] = std / np.sqrt(paths) if paths else 0.0
    return Prediction(pd.DataFrame({**curve, **quantiles}), settings({model: paths}))


def settings(paths: dict[str, int | None]) -> PredictionSettings:
    return PredictionSettings(
        paths=1,
        method="auto",
        seed=0,
        mu=0.0,
        law={},
        closure="pool",
        turns="by law",
        stability=None,
        models={model: PredictedWith(model, count) for model, count in paths.items()},
    )


def together(*predictions: Prediction) -> Prediction:
    paths = {name: p.paths(name) for p in predictions for name in p.models}
    return Prediction(pd.concat([p.curves for p in predictions]), settings(paths))


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
    assert score.intervals is not None
    errors = ("relative_error", "coverage", "crps")
    ends = {f"{name}_{end}" for name in errors for end in ("low", "high")}
    assert set(score.intervals) == ends | {"coverage_error"}
    numbers = score.numbers("sme_law")
    assert 0.0 == numbers["relative_error_low"] < numbers["relative_error"]
    assert numbers["relative_error"] < numbers["relative_error_high"] < 0.1
    narrow = normal_prediction(np.full(len(UPDATE), 5.0), 0.5)
    assert compare(runs, narrow).models["sme_law"].coverage < 0.7


TRUTH = 1.0 + 4.0 * np.exp(-UPDATE / 30)
PREDICTIONS = {  # their errors against TRUTH are known
    "right": TRUTH,
    "5 % off": 1.05 * TRUTH,
    "wavy": TRUTH + 0.2 * np.cos(UPDATE / 20),
    "50 % off": 1.5 * TRUTH,
}


def scattered(kind: str, repeats: int, rng: np.random.Generator) -> np.ndarray:
    """Return observed curves whose points vary together, alone, or together and skewed."""
    shape = (repeats, len(UPDATE) if kind == "alone" else 1)
    noise = rng.standard_normal(shape)
    if kind == "skewed":
        noise = (np.exp(0.5 * noise) - np.exp(0.125)) / 0.6
    return TRUTH + 0.3 * noise * np.linspace(0.5, 1.5, len(UPDATE))


@pytest.mark.parametrize("kind", ["together", "alone", "skewed"])
@pytest.mark.parametrize(("repeats", "paths"), [(4, 0), (6, 0), (12, 0), (48, 0), (12, 16)])
def test_intervals_of_the_relative_error_cover_it(kind: str, repeats: int, paths: int) -> None:
    """Also for the right prediction, whose error 0 a bootstrap interval never contains."""
    rng, trials = np.random.default_rng([repeats, paths]), 200
    inside = dict.fromkeys(PREDICTIONS, 0)
    lengths = []
    for _ in range(trials):
        observed = scattered(kind, repeats, rng)
        for name, prediction in PREDICTIONS.items():
            mean_error = np.full(len(UPDATE), 0.3 / np.sqrt(paths) if paths else 0.0)
            predicted = prediction + rng.standard_normal() * mean_error
            low, high = relative_error_interval(observed, predicted, mean_error)
            error = np.abs(prediction - TRUTH).mean() / TRUTH.mean()
            inside[name] += low <= error <= high
            lengths.append(high - low)
    standard_error = np.sqrt(0.95 * 0.05 / trials)
    for name, number in inside.items():
        assert number / trials > 0.95 - 4 * standard_error, name
    # The intervals are not too long: at most a few standard errors of the mean.
    assert np.median(lengths) < 8 * 0.3 * np.sqrt(1 / repeats + (1 / paths if paths else 0.0))


def test_the_interval_of_points_that_move_together_is_that_of_student() -> None:
    from scipy.stats import t

    offsets = np.random.default_rng(2).standard_normal(3)
    observed = 10.0 + np.repeat(offsets[:, None], 7, axis=1)
    low, high = relative_error_interval(observed, np.full(7, 40.0), np.zeros(7))
    mean, reach = 10.0 + offsets.mean(), t.ppf(0.975, 2) * offsets.std(ddof=1) / np.sqrt(3)
    # the 95 % quantile of 2000 draws has a standard error of 2.1 %
    assert 40.0 / (1 + low) == pytest.approx(mean + reach, abs=0.085 * reach)
    assert 40.0 / (1 + high) == pytest.approx(mean - reach, abs=0.085 * reach)


def test_a_mean_loss_near_zero_leaves_the_upper_end_open() -> None:
    observed = np.array([[1.0, -1.0], [-1.0, 1.0]]) + 0.1
    assert relative_error_interval(observed, np.full(2, 5.0), np.zeros(2)) == (0.0, np.inf)


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
    quantiles = np.tile(norm.ppf(SCORED_LEVELS), (len(observed), 1))
    exact = scoringrules.crps_normal(observed, 0.0, 1.0)
    # The trapezoid rule over 40 intervals leaves out most of the two end cells.
    assert np.allclose(crps_from_quantiles(observed, quantiles), exact, rtol=0.03)


def test_a_prediction_at_updates_that_were_not_evaluated_is_refused(tmp_path: Path) -> None:
    run = run_with_loss(tmp_path / "run", np.ones(len(UPDATE)))
    prediction = normal_prediction(np.ones(len(UPDATE)), 1.0)
    shifted = Prediction(prediction.curves.assign(update=UPDATE + 1), {})
    with pytest.raises(InputError, match="no loss at update"):
        compare(run, shifted)
