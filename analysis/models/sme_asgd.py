"""SME-ASGD, the stochastic modified equation of asynchronous SGD: (S1)-(S3), native scheme (S5)."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, Unpack

import numpy as np
import numpy.typing as npt

from analysis.models.blocks import PathModel
from analysis.models.descent import Descent, DescentBlock
from analysis.models.discrete import independent_lags
from analysis.models.ensemble import Ensemble, PathOptions, PerUpdate, run_ensembles
from analysis.models.noise import SNAPSHOTS, NoiseKind, staleness_noise
from asgd.arguments import count, number
from asgd.arrays import Array
from asgd.errors import InputError
from asgd.problems.base import Problem
from asgd.staleness.geometric import Geometric
from asgd.streams import Seed


class SmeAsgd(DescentBlock):
    """A block of paths of (S1)-(S3) in steps of dt/J, semi-implicit (An, Lu, Ying, section 2.2).

    The state is X and the expected read g, with Y = -sqrt(eta/(1-mu)) g, because g needs no
    rescaling when the learning rate changes. With retention r = 1 - (1-mu)/J a step is

        X' = X - (eta/J) g + (eta/sqrt(J)) Sigma^{1/2} z
        g' = r g + (1-r) grad f(X'),   H' = r H + (1-r) V(X')

    which for J = 1 is (S5): the recursion of ASGD with Gaussian noise. For d = 1, and with noise
    "explicit", the state holds Sigma, by (S4), instead of H.

    Attributes
    ----------
    strong_order, weak_order
        Orders in dt/J towards (S1)-(S3). The noise enters X and depends only on Y and H, so
        Euler's scheme equals Milstein's.
    """

    strong_order = 1.0
    weak_order = 1.0

    def __init__(
        self,
        descent: Descent,
        mu: float,
        x: Array,
        rng: np.random.Generator,
        *,
        noise: NoiseKind = "auto",
        substeps: int = 1,
        lag_noise: bool = True,
    ) -> None:
        super().__init__(descent, x, rng)
        self.substeps, self.retention = substeps, 1 - (1 - mu) / substeps
        self.noise, gradient = staleness_noise(
            noise, descent.problem, x, rng, self.retention, lag_noise
        )
        self.g = gradient.astype(x.dtype)

    def step(self, k: int) -> None:
        """Advance one update: J steps of length dt/J."""
        eta = self.learning_rate[k] / self.substeps
        amplitude = eta * math.sqrt(self.substeps)
        for _ in range(self.substeps):
            self.noise.kick(self.x, self.g, self.batch_size[k], eta, amplitude)
            self.noise.absorb(self.x, self.g)


def _short_calls(
    problem: Problem, noise: NoiseKind | Literal["batch"], dtype: npt.DTypeLike | None
) -> bool:
    """Return whether calls of an update are so short that threads wait for each other.

    This holds in one dimension with additive noise, except for normal increments in float64.
    """
    quick = noise == "two_point" or (noise != "samples" and np.dtype(dtype) == np.float32)
    return quick and problem.dim == 1 and problem.additive_noise


def sme_asgd(
    problem: Problem,
    learning_rate: PerUpdate,
    mu: float,
    updates: int,
    paths: int,
    seed: Seed,
    *,
    batch_size: PerUpdate = 1,
    noise: NoiseKind | Literal["batch"] = "auto",
    substeps: int = 1,
    **options: Unpack[PathOptions],
) -> Ensemble:
    """Simulate SME-ASGD for independent geometric staleness: (S1)-(S3), O(1) memory.

    >>> ensemble = analysis.sme_asgd(problem, 0.05, 0.75, updates=100, paths=64, seed=0)
    >>> ensemble.loss_mean.shape
    (101,)

    An, Lu, Ying, section 2.2; mini-batches by the exact Sigma_b (ours).

    Parameters
    ----------
    learning_rate
        eta, a number or one for each update.
    mu
        Geometric parameter, P(tau = l) = (1-mu) mu^l, in [0, 1).
    updates, paths
        Numbers of updates and of paths.
    batch_size
        Samples per gradient, all at one stale point: a number or one for each update.
    noise
        "matrix" carries (d, d) averages, "samples" needs no matrix, "auto" takes the cheaper;
        "batch" takes one mini-batch at a point of a random lag for each update, so that mean,
        covariance and tails are those of (A1) by construction; "auto" does so where other noise
        needs the gradients of all samples. "two_point" is "matrix" with +-1 increments: exact
        moments, wrong quantiles; "explicit" is "matrix" with (S4) instead of (S3).
    substeps
        1 is the native scheme (S5); large J approaches the continuous SME with steps dt/J.
    options
        See `run_ensemble`; the default of `threads` is 1 if more would not be faster.

    Raises
    ------
    InputError
        If an argument is invalid.
    """
    descent = Descent.of(problem, learning_rate, batch_size, updates)
    model = sme_asgd_paths(descent, mu, noise=noise, substeps=substeps)
    if options.get("threads") is None and _short_calls(problem, noise, options.get("dtype")):
        options["threads"] = 1
    return run_ensembles([model], problem, updates, paths, seed, **options)[0]


def sme_asgd_paths(
    descent: Descent,
    mu: float,
    *,
    noise: NoiseKind | Literal["batch"] = "auto",
    substeps: int = 1,
) -> PathModel:
    """Return the model of `sme_asgd` to simulate with others; arguments and errors as there."""
    mu, substeps = number(mu, "mu", least=0.0, below=1.0), count(substeps, "substeps")
    if noise == "batch" or (noise == "auto" and substeps == 1 and not descent.problem.gives_noise):
        if substeps > 1:
            raise InputError(f"noise = 'batch' with substeps = {substeps}: expected one step")
        exact, copies = independent_lags(descent, Geometric(mu))
        return PathModel(exact, "sme_asgd", copies)
    block = partial(SmeAsgd, descent, mu, noise=noise, substeps=substeps)
    return PathModel(block, "sme_asgd", 2 * SNAPSHOTS + 4)
