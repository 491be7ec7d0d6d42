"""The problems of `bench_methods` that are not built in."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from asgd.arrays import Array
from asgd.problems.base import Indices, Problem
from asgd.streams import stream


class Quadratic(Problem):
    """f = x^T A x / 2 with curvatures from 1 to 1/100, and noise that does not depend on x."""

    dim, n_samples, additive_noise = 100, 1000, True

    def __init__(self, noise: float = 0.5) -> None:
        self.curvature = np.geomspace(0.01, 1.0, self.dim)
        draws = stream(0, "bench_methods").standard_normal((self.n_samples, self.dim))
        self.shifts = noise * (draws - draws.mean(axis=0))

    def initial_point(self, rng: np.random.Generator) -> Array:
        """Return ones."""
        return np.ones(self.dim)

    def loss(self, x: Array) -> Array:
        """Return f(x)."""
        return np.asarray((self.curvature * x * x).sum(axis=-1) / 2)

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        """Return the mean gradient over a batch."""
        exact: Array = self.curvature * x
        return exact if indices is None else exact + self.shifts[indices].mean(axis=-2)


class Perceptron(Problem):
    """The digits by one layer of hidden units: softmax(V tanh(W u)), mean cross-entropy.

    x contains the rows of W, then those of V. The hidden units have a constant beside them, the 64
    pixels have none. The seed of the run, or a given one, determines the start.
    """

    def __init__(self, hidden: int = 16, start: int | None = None) -> None:
        self._seed = start
        data = load_digits()
        self._pixels = data.data / 16.0
        self.labels = data.target
        self.n_samples, inputs = self._pixels.shape
        self._shapes = (hidden, inputs), (10, hidden + 1)
        self._split = hidden * inputs
        self.dim = self._split + 10 * (hidden + 1)

    def initial_point(self, rng: np.random.Generator) -> Array:
        """Return normal weights of variance 1 / inputs."""
        rng = rng if self._seed is None else stream(self._seed, "perceptron")
        drawn = [rng.standard_normal(shape) / np.sqrt(shape[1]) for shape in self._shapes]
        return np.concatenate([one.ravel() for one in drawn])

    def loss(self, x: Array) -> Array:
        """Return f(x)."""
        scores = self._respond(x, self._pixels)[0]
        right = scores[..., np.arange(self.n_samples), self.labels]
        top = scores.max(axis=-1)
        total = np.log(np.exp(scores - top[..., None]).sum(axis=-1)) + top
        return np.asarray((total - right).mean(axis=-1))

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        """Return the mean gradient over a batch."""
        if indices is None:
            indices = np.arange(self.n_samples)
        pixels = self._pixels[indices]
        scores, active, outer = self._respond(x, pixels)
        error = np.exp(scores - scores.max(axis=-1, keepdims=True))
        error /= error.sum(axis=-1, keepdims=True)
        error -= self.labels[indices][..., None] == np.arange(10)
        error /= indices.shape[-1]
        back = (error @ outer[..., :-1]) * (1.0 - active * active)
        to_outer = np.concatenate(
            [_transposed(error) @ active, error.sum(axis=-2)[..., None]], axis=-1
        )
        parts: list[Any] = [_transposed(back) @ pixels, to_outer]
        return np.concatenate([one.reshape(*x.shape[:-1], -1) for one in parts], axis=-1)

    def _respond(self, x: Array, pixels: Array) -> tuple[Array, Array, Array]:
        """Return scores (..., b, 10), hidden units (..., b, hidden) and V (..., 10, hidden + 1)."""
        inner = x[..., : self._split].reshape(*x.shape[:-1], *self._shapes[0])
        outer = x[..., self._split :].reshape(*x.shape[:-1], *self._shapes[1])
        active = np.tanh(pixels @ _transposed(inner))
        scores = active @ _transposed(outer[..., :-1]) + outer[..., None, :, -1]
        return scores, active, outer


def _transposed(matrices: Array) -> Array:
    return np.swapaxes(matrices, -1, -2)
