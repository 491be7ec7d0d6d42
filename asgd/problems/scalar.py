"""One-dimensional problems with two samples f_1 = f - c x and f_2 = f + c x.

The sample gradients are f'(x) - c and f'(x) + c: additive noise of variance c^2 at every x.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np

from asgd.arrays import Array
from asgd.problems.base import Indices, Problem


class ScalarProblem(Problem):
    """f over R with samples f -+ c x; subclasses give f and its first two derivatives.

    Parameters
    ----------
    noise
        The constant c, the standard deviation of a sample gradient.
    initial
        x_0.
    """

    dim = 1
    n_samples = 2
    additive_noise = True

    def __init__(self, noise: float = 2.0, initial: float = 1.0) -> None:
        self.noise = noise
        self.initial = initial

    @abstractmethod
    def value(self, x: Array) -> Array:
        """Return f elementwise."""

    @abstractmethod
    def derivative(self, x: Array) -> Array:
        """Return f' elementwise."""

    @abstractmethod
    def second_derivative(self, x: Array) -> Array:
        """Return f'' elementwise."""

    def initial_point(self, rng: np.random.Generator) -> Array:
        """Return x_0 = `initial`, shape (1,); nothing is drawn."""
        return np.array([self.initial])

    def loss(self, x: Array) -> Array:
        """Return f(x), shape (...)."""
        return self.value(x[..., 0])

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        """Return f'(x) plus c times the mean sign of the batch, shape (..., 1)."""
        slope = self.derivative(x)
        if indices is None:
            return slope
        signs: Array = (2.0 * indices.mean(axis=-1, keepdims=True) - 1.0).astype(slope.dtype)
        return slope + self.noise * signs

    def sample_gradients(self, x: Array) -> Array:
        """Return f'(x) - c and f'(x) + c, shape (..., 2, 1)."""
        signs = np.array([[-self.noise], [self.noise]], dtype=x.dtype)
        return self.derivative(x)[..., None, :] + signs

    def second_moment(self, x: Array) -> Array:
        """Return f'(x)^2 + c^2, shape (..., 1, 1)."""
        return self.derivative(x)[..., None] ** 2 + self.noise**2

    def gradient_covariance(self, x: Array) -> Array:
        """Return c^2, shape (..., 1, 1)."""
        return np.full((*x.shape, 1), self.noise**2, dtype=x.dtype)

    def gradient_and_noise(self, x: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        """Return f'(x) and a draw xi ~ N(0, c^2), both of shape (..., 1)."""
        z = rng.standard_normal(x.shape, dtype=x.dtype.type)
        z *= self.noise
        return self.derivative(x), z

    def hessian_vector(self, x: Array, v: Array) -> Array:
        """Return f''(x) v, shape (..., 1)."""
        return self.second_derivative(x) * v


class Quadratic(ScalarProblem):
    """f = (a/2) x^2 with curvature a.

    With a = 2 and c = 2 the samples are (x -+ 1)^2 - 1 and V(x) = 4 x^2 + 4 (An, Lu, Ying).
    """

    def __init__(self, curvature: float = 2.0, noise: float = 2.0, initial: float = 1.0) -> None:
        super().__init__(noise, initial)
        self.curvature = curvature

    def value(self, x: Array) -> Array:
        """Return (a/2) x^2."""
        return 0.5 * self.curvature * x * x

    def derivative(self, x: Array) -> Array:
        """Return a x."""
        return self.curvature * x

    def second_derivative(self, x: Array) -> Array:
        """Return a."""
        return np.full_like(x, self.curvature)


class Quartic(ScalarProblem):
    """f = x^4 / 4: convex, with a gradient that is not Lipschitz."""

    def value(self, x: Array) -> Array:
        """Return x^4 / 4."""
        return 0.25 * (x * x) ** 2

    def derivative(self, x: Array) -> Array:
        """Return x^3."""
        return x * x * x

    def second_derivative(self, x: Array) -> Array:
        """Return 3 x^2."""
        return 3.0 * x * x


class DoubleWell(ScalarProblem):
    """f = x^2/2 - 2 log cosh x: Lipschitz gradient, minima near x = -1.915 and 1.915."""

    def value(self, x: Array) -> Array:
        """Return x^2/2 - 2 log cosh x, without computing cosh, which overflows."""
        size = np.abs(x)
        log_cosh = size + np.log1p(np.exp(-2.0 * size)) - math.log(2.0)
        return 0.5 * x * x - 2.0 * log_cosh

    def derivative(self, x: Array) -> Array:
        """Return x - 2 tanh x."""
        return x - 2.0 * np.tanh(x)

    def second_derivative(self, x: Array) -> Array:
        """Return 2 tanh(x)^2 - 1."""
        return 2.0 * np.tanh(x) ** 2 - 1.0
