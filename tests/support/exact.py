"""Problems with known answers, and moments known in closed form."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.signal import fftconvolve

from asgd.problems.base import Array, Indices, Problem
from asgd.problems.linear import LeastSquares
from asgd.problems.scalar import Quadratic
from asgd.staleness.law import StalenessLaw

CHECK_CURVATURE, CHECK_NOISE = 2.0, 2.0


# E x^2 for f = x^2, sampling variance 4, x_0 = 1: (eta, P, k, pool, iid, sampling).
SERVER_TABLE = [
    (0.05, 8, 16, 0.09915, 0.10456, 0.09469),
    (0.05, 8, 600, 0.08911, 0.09104, 0.08763),
    (0.1, 8, 16, 0.48064, 0.52740, 0.43962),
    (0.1, 8, 600, 0.27660, 0.29542, 0.25101),
    (0.2, 4, 16, 0.61090, 0.69663, 0.49715),
    (0.2, 4, 600, 0.59091, 0.68033, 0.48824),
    (0.3, 8, 16, 3.935, 4.772, 1.842),
    (0.3, 8, 600, 1857, 6.0e6, 1.678),
]


class Diagonal(Problem):
    """f = (1/2) sum_j a_j x_j^2 with two samples, f -+ s.x; nothing of shape (d, d) is needed."""

    def __init__(self, curvature: Array, push: float) -> None:
        self.dim, self.n_samples = len(curvature), 2
        self.curvature, self.push = curvature, push

    def initial_point(self, rng: np.random.Generator) -> Array:
        return np.ones(self.dim)

    def loss(self, x: Array) -> Array:
        return (x * x) @ self.curvature / 2

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        slope = self.curvature * x
        if indices is None:
            return slope
        return slope + self.push * (2.0 * indices.mean(axis=-1, keepdims=True) - 1.0)


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


def impulse_response(
    law: StalenessLaw, learning_rate: float, curvature: npt.ArrayLike, updates: int
) -> Array:
    """Return h_k, the impulse response after k updates, shape (updates + 1, ...).

    h_0 = 1, h_{k+1} = h_k - eta a sum_l w_l h_{k-l}, h = 0 before 0.
    """
    return _follow(law, learning_rate * np.asarray(curvature, dtype=float), updates, 0.0)


def _follow(law: StalenessLaw, step: Array, updates: int, before: float) -> Array:
    """Solve y_{k+1} = y_k - step sum_l w_l y_{k-l} from y_0 = 1 with y = `before` before 0."""
    reversed_weights = law.weights(law.support_length())[::-1]
    length = len(reversed_weights)
    y = np.full((length + updates, *step.shape), before)
    y[length - 1] = 1.0
    for k in range(length - 1, length - 1 + updates):
        read = np.tensordot(reversed_weights, y[k - length + 1 : k + 1], axes=1)
        y[k + 1] = y[k] - step * read
    return y[length - 1 :]


class ModeMoments(NamedTuple):
    """Mean and variance of x_k along Hessian modes, both of shape (K + 1, ...)."""

    mean: Array
    variance: Array


def mode_moments(
    law: StalenessLaw,
    learning_rate: float,
    curvature: npt.ArrayLike,
    noise_variance: npt.ArrayLike,
    updates: int,
    *,
    batch_size: npt.ArrayLike = 1,
    initial: npt.ArrayLike = 1.0,
) -> ModeMoments:
    """Return mean and variance of each mode under any law, additive noise, closure "sampling".

    Var x_k = eta^2 s^2 sum_{j<k} h_{k-1-j}^2 / b_j with h of `impulse_response`.
    """
    step = learning_rate * np.asarray(curvature, dtype=float)
    mean = np.asarray(initial) * _follow(law, step, updates, 1.0)
    power = _follow(law, step, updates, 0.0)[:updates] ** 2
    share = np.broadcast_to(1.0 / np.asarray(batch_size, dtype=float), updates)
    shares = np.broadcast_to(share.reshape(-1, *[1] * step.ndim), power.shape)
    variance = np.zeros_like(mean)
    noise = learning_rate**2 * np.asarray(noise_variance)
    variance[1:] = noise * fftconvolve(power, shares, axes=0)[:updates]
    return ModeMoments(mean, variance)


def server_transition(step: float, workers: int) -> Array:
    """Return the linear part of a server's second-moment recursion, shape (4, 4).

    State E x^2, E x s, E s^2, E s s' over the snapshots s, s' that workers hold, for memoryless
    workers of equal rates; `step` is learning rate times curvature.
    """
    keep = 1.0 - 1.0 / workers
    new = np.array([1.0, -2.0 * step, step**2, 0.0])
    old = np.array([0.0, 1.0, 0.0, -step])
    own, pair = np.array([0.0, 0.0, 1.0, 0.0]), np.array([0.0, 0.0, 0.0, 1.0])
    others = (2.0 * old + (workers - 2) * pair) / workers if workers > 1 else 0.0 * pair
    return np.array([new, new / workers + keep * old, new / workers + keep * own, others])


def server_moments(
    curvature: float,
    noise_variance: float,
    learning_rate: float,
    workers: int,
    updates: int,
    *,
    initial: float = 1.0,
) -> ModeMoments:
    """Return mean and variance of x_k on the server of `server_transition`, additive noise."""
    step, move = learning_rate * curvature, 1.0 / workers
    noise = learning_rate**2 * noise_variance * np.array([1.0, move, move, 0.0])
    transition = server_transition(step, workers)
    second, first = np.empty((updates + 1, 4)), np.empty((updates + 1, 2))
    second[0], first[0] = initial**2, initial
    for k in range(updates):
        second[k + 1] = transition @ second[k] + noise
        x = first[k, 0] - step * first[k, 1]
        first[k + 1] = x, move * x + (1.0 - move) * first[k, 1]
    return ModeMoments(first[:, 0], second[:, 0] - first[:, 0] ** 2)


def server_second_moment(learning_rate: float, workers: int, updates: int) -> Array:
    """Return E x_k^2 of `check_quadratic` on the same server, shape (updates + 1,)."""
    variance = CHECK_NOISE**2
    exact = server_moments(CHECK_CURVATURE, variance, learning_rate, workers, updates)
    return exact.variance + exact.mean**2


# Values of `server_second_moment`: (learning rate, workers, update, value)
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


class MomentODE(NamedTuple):
    """d/dt (E X^2, E XY, E Y^2) = matrix @ . + forcing of one mode in SME time (B1)."""

    matrix: Array
    forcing: Array
    eigenvalues: npt.NDArray[np.complex128]
    stationary: Array


def moment_ode(
    curvature: float, noise_variance: float, learning_rate: float, mu: float, batch_size: float = 1
) -> MomentODE:
    """Return (B1) of f = (curvature / 2) x^2 with additive noise."""
    kappa = np.sqrt((1.0 - mu) / learning_rate)
    noise = learning_rate**1.5 / np.sqrt(1.0 - mu) * noise_variance / batch_size
    matrix = np.array(
        [[0.0, 2.0, 0.0], [-curvature, -kappa, 1.0], [0.0, -2.0 * curvature, -2.0 * kappa]]
    )
    root = np.sqrt(complex(kappa**2 - 4.0 * curvature))
    second = noise * (1.0 / (2.0 * kappa) + kappa / (2.0 * curvature))
    return MomentODE(
        matrix=matrix,
        forcing=np.array([noise, 0.0, 0.0]),
        eigenvalues=np.array([-kappa, -kappa - root, -kappa + root]),
        stationary=np.array([second, -noise / 2.0, curvature * noise / (2.0 * kappa)]),
    )
