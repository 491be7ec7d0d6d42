"""Problems with known answers, and moments known in closed form."""

from __future__ import annotations

import numpy as np

from asgd.problems import LeastSquares, Quadratic

CHECK_CURVATURE, CHECK_NOISE = 2.0, 2.0


def check_quadratic() -> Quadratic:
    """f = x^2, samples (x -+ 1)^2 - 1, V = 4 x^2 + 4, x_0 = 1."""
    return Quadratic(CHECK_CURVATURE, CHECK_NOISE, initial=1.0)


def small_least_squares(l2: float = 0.0) -> LeastSquares:
    """Four samples, two features: minimiser (1, 2) and minimal loss 0.02 for l2 = 0.

    The features are orthogonal with A^T A / n = diag(1, 4); the residuals at the minimiser are
    -+0.2, orthogonal to both features.
    """
    features = np.array([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0]])
    residual = 0.2 * np.array([1.0, -1.0, -1.0, 1.0])
    return LeastSquares(features, features @ np.array([1.0, 2.0]) + residual, l2)


def server_second_moment(
    learning_rate: float,
    workers: int,
    updates: int,
    curvature: float = CHECK_CURVATURE,
    noise: float = CHECK_NOISE,
    initial: float = 1.0,
) -> np.ndarray:
    """Return E x_k^2, shape (updates + 1,), of a server with memoryless workers of equal rates.

    f = (a/2) x^2 with additive noise. a = E x^2, b = E x s, c = E s^2, d = E s s' over the
    snapshots s, s' that workers hold; the next worker is uniform and independent of everything.
    """
    step, stay = learning_rate * curvature, 1.0 - 1.0 / workers
    a = b = c = d = initial**2
    history = [a]
    for _ in range(updates):
        crossed = b - step * d
        a = a - 2.0 * step * b + step**2 * c + (learning_rate * noise) ** 2
        b = a / workers + stay * crossed
        c = a / workers + stay * c
        d = 2.0 / workers * crossed + (1.0 - 2.0 / workers) * d
        history.append(a)
    return np.array(history)


# E x_k^2 of that server: (learning rate, workers, update, value)
SERVER_VALUES = [
    (0.05, 8, 16, 0.09915),
    (0.05, 8, 600, 0.08911),
    (0.1, 8, 16, 0.48064),
    (0.1, 8, 600, 0.27660),
    (0.2, 4, 16, 0.61090),
    (0.2, 4, 600, 0.59091),
    (0.3, 8, 16, 3.935),
    (0.3, 8, 600, 1857.0),
]
