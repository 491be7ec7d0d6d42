"""SME-SGD, the second-order modified equation of SGD, (S6): the baseline without asynchrony."""

from __future__ import annotations

import math
from functools import partial
from typing import Unpack

import numpy as np

from analysis.models.blocks import PathModel
from analysis.models.descent import Descent, DescentBlock, SampledDescent
from analysis.models.ensemble import Ensemble, PathOptions, PerUpdate, run_ensembles
from asgd.arguments import count
from asgd.arrays import Array
from asgd.errors import InputError
from asgd.problems.base import Problem
from asgd.streams import Seed


class SmeSgd(DescentBlock):
    """A block of paths of (S6) in steps of eta/J: Heun's drift, noise at the start of the step.

        dX = -(grad f + (eta/2) Hess f grad f)(X) dt + sqrt(eta) (S(X)/b)^{1/2} dB

    (Li, Tai, E; eta/2 because grad |grad f|^2 = 2 Hess f grad f.) Euler's drift has an error as
    large as the correction term and would cancel it; Heun's is accurate enough.

    Attributes
    ----------
    strong_order, weak_order
        Orders in eta/J towards (S6). The noise depends on X, so the strong order is Euler's.
    """

    strong_order = 0.5
    weak_order = 1.0

    def __init__(
        self,
        descent: Descent,
        x: Array,
        rng: np.random.Generator,
        *,
        substeps: int = 1,
    ) -> None:
        super().__init__(descent, x, rng)
        self.substeps = substeps

    def step(self, k: int) -> None:
        """Advance one update: J steps of length eta/J."""
        eta = self.learning_rate[k]
        time_step = eta / self.substeps
        for _ in range(self.substeps):
            gradient, noise = self.problem.gradient_and_noise(self.x, self.rng)
            kick = math.sqrt(eta * time_step / self.batch_size[k]) * noise
            first = self._slope(self.x, gradient, eta)
            predicted = self.x - time_step * first + kick
            second = self._slope(predicted, self.problem.gradient(predicted), eta)
            self.x -= time_step / 2 * (first + second)
            self.x += kick

    def _slope(self, x: Array, gradient: Array, eta: float) -> Array:
        return gradient + eta / 2 * self.problem.hessian_vector(x, gradient)


class NativeSgd(SampledDescent):
    """A block of paths of x' = x - eta grad f(x) + eta (S(x)/b)^{1/2} z.

    The native scheme of (S6): its drift equals the flow of (S6) over one update up to O(eta^3),
    with one gradient per update. The noise may be that of a mini-batch (`sampled_gradient`).

    Attributes
    ----------
    weak_order
        Order in eta towards (S6) at fixed time.
    """

    weak_order = 2.0

    def read(self, k: int) -> list[Array]:
        """Return the current points."""
        return [self.x]


def sme_sgd(
    problem: Problem,
    learning_rate: PerUpdate,
    updates: int,
    paths: int,
    seed: Seed,
    *,
    batch_size: PerUpdate = 1,
    native: bool = False,
    substeps: int = 1,
    **options: Unpack[PathOptions],
) -> Ensemble:
    """Simulate SME-SGD, (S6), which ignores asynchrony.

    >>> analysis.sme_sgd(problem, 0.05, updates=100, paths=64, seed=0).loss_mean.shape
    (101,)

    Arguments that are not listed are those of `sme_asgd`.

    Parameters
    ----------
    native
        True uses the recursion of SGD, which (S6) approximates to second order. It takes one
        gradient per update instead of two gradients and two Hessian-vector products.
    substeps
        Steps per update, of length eta/substeps, if `native` is False.

    Raises
    ------
    InputError
        If an argument is invalid.
    """
    descent = Descent.of(problem, learning_rate, batch_size, updates)
    if count(substeps, "substeps") > 1 and native:
        raise InputError(f"substeps = {substeps}: expected 1 with native = True")
    model = native_sgd_paths(descent)
    if not native:
        model = PathModel(partial(SmeSgd, descent, substeps=substeps), "sme_sgd", 8)
    return run_ensembles([model], problem, updates, paths, seed, **options)[0]


def native_sgd_paths(descent: Descent) -> PathModel:
    """Return the model of `sme_sgd` with `native` to simulate with others."""
    return PathModel(partial(NativeSgd, descent), "sme_sgd/native", 3)
