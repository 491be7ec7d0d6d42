"""Models whose blocks advance together share their gradient calls and keep their paths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from analysis.models.blocks import PathModel
from analysis.models.descent import Descent
from analysis.models.discrete import AsgdIid, independent_lags
from analysis.models.ensemble import Ensemble, run_ensembles
from analysis.models.replay import replay_paths
from analysis.models.sme_asgd import sme_asgd_paths
from analysis.models.sme_law import sme_law_paths
from analysis.models.sme_sgd import native_sgd_paths
from asgd.problems.base import Array, Indices, Problem
from asgd.problems.linear import LeastSquares
from asgd.rules.heavy_ball import HeavyBall
from asgd.staleness.geometric import Geometric
from asgd.streams import stream
from tests.support.networks import jax_perceptron, torch_perceptron

UPDATES, PATHS, SEED = 12, 6, 3
LAW = Geometric(0.75)


class Counted(LeastSquares):
    """Least squares with the noise of mini-batches. Counts calls and points."""

    gives_noise = False
    calls = points = 0

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        self.calls += 1
        self.points += len(x)
        return super().gradient(x, indices)


def least_squares() -> Counted:
    rng = stream(1, "features")
    features = rng.standard_normal((60, 3))
    return Counted(features, features.sum(axis=1) + rng.standard_normal(60))


def staleness(*columns: int) -> Array:
    """Return columns of staleness that repeat 0, ..., largest."""
    k = np.arange(UPDATES)
    return np.stack([np.minimum(k % (1 + largest), k) for largest in columns], axis=1)


def all_models(problem: Problem) -> list[PathModel]:
    descent = Descent.of(problem, 0.1, 4, UPDATES)
    few = partial(AsgdIid, descent, LAW, 5)
    runs = [staleness(one)[:, 0] for one in (2, 4)]
    return [
        native_sgd_paths(descent),
        sme_asgd_paths(descent, LAW.mu, noise="batch"),
        PathModel(few, "few"),
        PathModel(independent_lags(descent, LAW)[0], "lags"),
        sme_law_paths(descent, LAW, SEED),
        replay_paths(descent, runs[0], HeavyBall(0.5)),
        PathModel(replay_paths(descent, runs).make_block, "runs", runs=2),
        PathModel(replay_paths(descent, staleness(1, 3)).make_block, "means"),
    ]


def simulate(models: list[PathModel], problem: Problem) -> list[Ensemble]:
    return run_ensembles(models, problem, UPDATES, PATHS, SEED, dtype=problem.dtype)


PROBLEMS: dict[str, tuple[Callable[[], Any], float]] = {
    # the compiler of JAX orders sums by the number of points
    "jax": (jax_perceptron, 1e-5),
    "torch": (torch_perceptron, 0.0),
    "least squares": (least_squares, 0.0),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_paths_together_equal_those_of_each_model_alone(name: str) -> None:
    if name != "least squares":
        pytest.importorskip(name)
    make, tolerance = PROBLEMS[name]
    problem = make()
    models = all_models(problem)
    together = simulate(models, problem)
    for model, joint in zip(models, together, strict=True):
        (alone,) = simulate([model], problem)
        np.testing.assert_allclose(
            joint.final, alone.final, rtol=tolerance, atol=tolerance, err_msg=model.name
        )
        np.testing.assert_allclose(joint.loss_quantiles, alone.loss_quantiles, rtol=tolerance)
    ends = np.stack([one.final.mean(axis=0) for one in together])
    assert len(np.unique(ends, axis=0)) == len(models)  # streams and models differ


def test_an_update_of_all_models_is_one_call() -> None:
    problem = least_squares()
    models = all_models(problem)
    simulate(models, problem)
    reads = len(models) + 1  # the last model averages two reads
    assert (problem.calls, problem.points) == (UPDATES, UPDATES * PATHS * reads)


def test_models_with_gaussian_noise_keep_their_paths() -> None:
    """Gaussian noise needs all samples, so models share no call."""
    problem = LeastSquares(np.eye(3), np.ones(3))
    assert problem.gives_noise
    models = all_models(problem)
    for model, joint in zip(models, simulate(models, problem), strict=True):
        np.testing.assert_array_equal(joint.final, simulate([model], problem)[0].final)
