"""The declared order of each integrator, measured with one Brownian path for all step sizes."""

from itertools import pairwise

import numpy as np
import pytest

from analysis.models.descent import Descent
from analysis.models.langevin import SmeLangevin, SmeMsgd
from analysis.models.sme_asgd import SmeAsgd
from analysis.models.sme_sgd import NativeSgd, SmeSgd
from analysis.paper.theorem3 import _Equation
from asgd.problems.base import Problem
from asgd.problems.scalar import DoubleWell, Quadratic
from asgd.streams import stream

MU, PATHS = 0.6, 20_000


class Wavy(Problem):
    """A nonlinear gradient with noise that depends on x: grad f_i = x + sin 2x -+ c(x)."""

    dim, n_samples = 1, 2

    def __init__(self, noise=0.8):
        self.noise = noise

    def initial_point(self, rng):
        return np.array([1.5])

    def loss(self, x):
        return (x * x / 2 + np.sin(x) ** 2)[..., 0]

    def gradient(self, x, indices=None):
        assert indices is None
        return x + np.sin(2 * x)

    def hessian_vector(self, x, v):
        return (1 + 2 * np.cos(2 * x)) * v

    def gradient_covariance(self, x):
        return (self.noise * (1 + 0.5 * np.cos(x)))[..., None] ** 2

    def gradient_and_noise(self, x, rng):
        noise = self.noise * (1 + 0.5 * np.cos(x))
        return self.gradient(x), noise * rng.standard_normal(x.shape)


class Increments(np.random.Generator):
    """Normals of a coarse step as sums of those of the finest step, from one stream.

    The second half of the paths mirrors the first, so odd powers of the noise cancel in means.
    """

    def __init__(self, finer):
        super().__init__(stream(1, "brownian path").bit_generator)
        self.finer = finer

    def standard_normal(self, size=None, dtype=np.float64, out=None):
        if out is None:
            return self.step(size)
        # one step of (paths, 1), or several of (paths,)
        for step in out[None] if out.shape[-1] == 1 else out:
            step[...] = self.step(step.shape)
        return out

    def step(self, shape):
        paths, *rest = shape
        fine = super().standard_normal((self.finer, paths // 2, *rest))
        half = fine.sum(axis=0) / np.sqrt(self.finer)
        return np.concatenate([half, -half])


def run(make, updates, eta, paths, rng, noise=0.8):
    schedules = np.full(updates, eta), np.ones(updates)
    block = make(Wavy(noise), *schedules, np.full((paths, 1), 1.5), rng)
    for k in range(updates):
        block.step(k)
    return block.position()[:, 0].copy()


def sme_asgd(m, noise="matrix"):
    return lambda p, eta, b, x, rng: SmeAsgd(
        Descent(p, eta, b), MU, x, rng, noise=noise, substeps=m
    )


def langevin(m):
    return lambda p, eta, b, x, rng: SmeLangevin(
        Descent(p, eta, b), MU, x, rng, noise="matrix", substeps=m
    )


def msgd(m):
    return lambda p, eta, b, x, rng: SmeMsgd(Descent(p, eta, b), MU, x, rng, substeps=m)


def sme_sgd(m):
    return lambda p, eta, b, x, rng: SmeSgd(Descent(p, eta, b), x, rng, substeps=m)


def native_sgd(p, eta, b, x, rng):
    return NativeSgd(Descent(p, eta, b), x, rng)


MODELS = {
    "sme_asgd": (sme_asgd, SmeAsgd),
    "explicit": (lambda m: sme_asgd(m, "explicit"), SmeAsgd),
    "langevin": (langevin, SmeLangevin),
    "msgd": (msgd, SmeMsgd),
    "sme_sgd": (sme_sgd, SmeSgd),
}


def order(errors, steps):
    """Return the slope of log error against log step, by least squares."""
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


def order_of_refinements(values, substeps, norm):
    """Return the order of the changes by refinement, which shrink like the error itself."""
    errors = [norm(b - a) for a, b in pairwise(values)]
    return order(errors, 1 / np.array(substeps[:-1]))


@pytest.mark.parametrize("name", MODELS)
def test_strong_order(name):
    make, model = MODELS[name]
    substeps = (4, 8, 16, 32)
    x = [run(make(m), 6, 0.1, 5_000, Increments(substeps[-1] // m)) for m in substeps]
    observed = order_of_refinements(x, substeps, lambda change: np.sqrt(np.mean(change**2)))
    assert abs(observed - model.strong_order) < 0.3


@pytest.mark.parametrize("name", MODELS)
def test_weak_order(name):
    """Compare three moments; under weak noise the second order of Heun's drift would dominate."""
    make, model = MODELS[name]
    substeps = (2, 4, 8, 16)
    moments = []
    for m in substeps:
        x = run(make(m), 6, 0.1, 40_000, Increments(substeps[-1] // m), noise=2.0)
        moments.append(np.array([np.mean(x**power) for power in (1, 2, 3)]))
    observed = order_of_refinements(moments, substeps, np.linalg.norm)
    assert abs(observed - model.weak_order) < 0.3


def test_order_of_the_native_scheme_of_sgd():
    """The error against (S6) at time 0.5 is a power of the learning rate."""
    steps, substeps, errors = np.array([0.1, 0.05, 0.025]), 16, []
    for eta in steps:
        updates = round(0.5 / eta)
        native = run(native_sgd, updates, eta, PATHS, Increments(substeps))
        equation = run(sme_sgd(substeps), updates, eta, PATHS, Increments(1))
        errors.append(abs(np.mean(native - equation)))
    assert abs(order(errors, steps) - NativeSgd.weak_order) < 0.3


class Given(np.random.Generator):
    """Gives the rows of an array in place of random numbers."""

    def __init__(self, rows):
        super().__init__(np.random.SFC64(0))
        self.rows = iter(rows)

    def standard_normal(self, size=None, dtype=np.float64, out=None):
        for row in out:  # more rows than the test has updates
            row[...] = next(self.rows, np.nan)
        return out


@pytest.mark.parametrize("substeps", [1, 4])
@pytest.mark.parametrize("problem", [Quadratic(), DoubleWell()])
def test_equation_of_theorem3_is_the_integrator(problem, substeps):
    """The same increments give the same paths."""
    eta, updates, paths = 0.05, 40, 30
    z = stream(6, "given").standard_normal((updates * substeps, paths))
    ones, start = np.ones(updates), np.full((paths, 1), problem.initial)
    block = SmeAsgd(
        Descent(problem, eta * ones, ones), MU, start, Given(z), noise="matrix", substeps=substeps
    )
    equation = _Equation(problem, eta / substeps, 1 - (1 - MU) / substeps, paths)
    for k in range(updates):
        block.step(k)
        for row in z[k * substeps : (k + 1) * substeps]:
            equation.advance(row * np.sqrt(substeps))
        np.testing.assert_allclose(block.position()[:, 0], equation.x, rtol=1e-9, atol=1e-10)
    assert equation.x.std() > 0.05
