"""Exact moments of ASGD on problems with linear sample gradients, without Monte Carlo.

Geometric staleness, independent or from memoryless workers, and multiplicative noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from analysis.exact.linear_gradients import LinearGradients
from analysis.models.ensemble import PerUpdate, initial_point, per_update
from asgd.arguments import number
from asgd.arrays import Array
from asgd.errors import InputError
from asgd.problems.base import Problem
from asgd.streams import Seed, as_seed

Closure = Literal["iid", "sampling", "pool"]


class Moments(NamedTuple):
    """Moments of x_k for k = 0..K.

    Attributes
    ----------
    mean
        E x_k, shape (K + 1, d).
    second_moment
        E x_k x_k^T, shape (K + 1, d, d).
    """

    mean: Array
    second_moment: Array


@dataclass(frozen=True)
class MomentRecursion:
    """The moments of ASGD as a linear recursion s' = (F + G / b) s in one flat state vector.

    s holds, in this order, 1, E x, E m, E x x^T, E x m^T, E m m^T and E n, with the expected read
    m = sum_l w_l x_{k-l} and its second moment n = sum_l w_l x_{k-l} x_{k-l}^T. Its length is
    1 + 2 d + 4 d^2.

    Attributes
    ----------
    gradients
        The problem's coefficients.
    mu
        Geometric parameter of the staleness.
    closure
        Assumption on the random lags. "iid": independent at every update, the model of An, Lu,
        Ying, section 1; the moments are those of (A1) and of (S5). "pool": each snapshot is used
        once, as on a server with memoryless workers, (P1). "sampling": no lag noise.
    """

    gradients: LinearGradients
    mu: float
    closure: Closure = "iid"

    def __post_init__(self) -> None:
        number(self.mu, "mu", least=0.0, below=1.0)
        if self.closure not in get_args(Closure):
            accepted = ", ".join(get_args(Closure))
            raise InputError(f"closure = {self.closure!r}: expected one of {accepted}")

    def initial_state(self, x: Array) -> Array:
        """Return s_0 for a known x_0 of shape (d,)."""
        square = np.outer(x, x).ravel()
        return np.concatenate([[1.0], x, x, square, square, square, square])

    def split(self, state: Array) -> tuple[Array, ...]:
        """Return 1, E x, E m, E x x^T, E x m^T, E m m^T, E n; state of shape (..., n)."""
        d = self.gradients.dim
        sizes = [1, d, d] + [d * d] * 4
        one, x, m, *rest = np.split(state, np.cumsum(sizes)[:-1], axis=-1)
        squares = (block.reshape(*block.shape[:-1], d, d) for block in rest)
        return one[..., 0], x, m, *squares

    def advance(self, state: Array, learning_rate: float, inverse_batch: float) -> Array:
        """Return the state one update later; linear in `state` of shape (..., n).

        (S5), An, Lu, Ying, section 3, in expectation; (P1) for the pool closure.
        """
        eta, mu, problem = learning_rate, self.mu, self.gradients
        hessian = problem.curvature
        one, x, m, xx, xm, mm, n = self.split(state)
        x_new = x - eta * (m @ hessian.T - one[..., None] * problem.offset)
        m_new = mu * m + (1.0 - mu) * x_new

        reads = mm if self.closure == "sampling" else n
        push = problem.expected_square(m, reads, one) + inverse_batch * (
            problem.expected_second_moment(m, n, one) - problem.expected_square(m, n, one)
        )
        drift = xm @ hessian.T - x[..., :, None] * problem.offset
        xx_new = xx - eta * (drift + _transpose(drift)) + eta**2 * push
        x_new_m = xm - eta * (hessian @ mm - problem.offset[:, None] * m[..., None, :])
        xm_new = mu * x_new_m + (1.0 - mu) * xx_new
        mm_new = mu**2 * mm + mu * (1.0 - mu) * (x_new_m + _transpose(x_new_m))
        mm_new = mm_new + (1.0 - mu) ** 2 * xx_new
        # one worker has no lag; rounding in n - mm would grow
        if self.closure == "pool" and mu > 0.0:
            lag = n - mm
            used = eta * hessian @ lag
            xm_new = xm_new + (1.0 - mu) * used
            mm_new = mm_new + (1.0 - mu) ** 2 * (lag + used + _transpose(used))
        n_new = mu * n + (1.0 - mu) * xx_new

        blocks = [one[..., None], x_new, m_new]
        flat = [b.reshape(*b.shape[:-2], -1) for b in (xx_new, xm_new, mm_new, n_new)]
        return np.concatenate(blocks + flat, axis=-1)

    def transition(self, learning_rate: float) -> tuple[Array, Array]:
        """Return F and G of s' = (F + G / b) s, shape (n, n) each."""
        d = self.gradients.dim
        identity = np.eye(1 + 2 * d + 4 * d * d)
        fixed = self.advance(identity, learning_rate, 0.0).T
        return fixed, self.advance(identity, learning_rate, 1.0).T - fixed

    def loss_weights(self) -> Array:
        """Return the vector w with E f(x) = w . s, shape (n,)."""
        d, problem = self.gradients.dim, self.gradients
        head = np.concatenate([[problem.loss_at_zero], -problem.offset, np.zeros(d)])
        return np.concatenate([head, 0.5 * problem.curvature.ravel(), np.zeros(3 * d * d)])

    def run(self, x: Array, learning_rate: Array, batch: Array) -> Array:
        """Return the states s_0..s_K, shape (K + 1, n).

        Parameters
        ----------
        x
            x_0, shape (d,).
        learning_rate, batch
            Of each update, shape (K,) each.
        """
        states = np.empty((len(batch) + 1, 1 + 2 * len(x) + 4 * len(x) ** 2))
        states[0] = self.initial_state(x)
        current = np.nan
        for k, (rate, b) in enumerate(zip(learning_rate, batch, strict=True)):
            if rate != current:
                current, (fixed, noise) = rate, self.transition(rate)
            states[k + 1] = fixed @ states[k] + noise @ states[k] / b
        return states


def _transpose(matrix: Array) -> Array:
    return np.swapaxes(matrix, -1, -2)


def asgd_moments(
    problem: Problem,
    learning_rate: PerUpdate,
    mu: float,
    updates: int,
    *,
    batch_size: PerUpdate = 1,
    initial: Array | None = None,
    closure: Closure = "iid",
    seed: Seed = 0,
) -> Moments:
    """Return the exact mean and second moment of ASGD at every update.

    >>> moments = analysis.asgd_moments(problem, 0.05, mu=0.75, updates=100)
    >>> moments.mean.shape, moments.second_moment.shape
    ((101, 1), (101, 1, 1))

    The moments of (A1) with independent geometric staleness; the native scheme (S5) has the same
    (An, Lu, Ying, section 3). `closure="pool"`: the moments of a parameter server with
    P = 1 / (1 - mu) memoryless workers, (P1) (ours).

    Parameters
    ----------
    problem
        Sample gradients linear in x: quadratic or least squares, d <= 20.
    learning_rate, batch_size
        One value, or one for each update, shape (updates,).
    mu
        Geometric parameter of the staleness, in [0, 1).
    initial
        x_0, shape (d,); default `problem.initial_point` from the stream "initial" of the seed.

    Returns
    -------
    Moments
        mean (updates + 1, d) and second_moment (updates + 1, d, d).

    Raises
    ------
    InputError
        The problem's gradients are not linear, or an argument is outside its range.
    """
    recursion = MomentRecursion(LinearGradients.of(problem), mu, closure)
    x = initial_point(problem, initial, as_seed(seed))
    rates = per_update(learning_rate, updates, "learning_rate")
    batch = per_update(batch_size, updates, "batch_size", fractional=True)
    states = recursion.run(x, rates, batch)
    _, mean, _, second, *_ = recursion.split(states)
    return Moments(mean, second)


def expected_loss(problem: Problem, moments: Moments) -> Array:
    """Return E f(x_k) from the moments of x_k, shape (K + 1,); f quadratic."""
    g = LinearGradients.of(problem)
    quadratic = np.einsum("pq,kpq->k", g.curvature, moments.second_moment) / 2
    return np.asarray(quadratic - moments.mean @ g.offset + g.loss_at_zero)


class StationaryVariance(NamedTuple):
    """Stationary E x^2 and E m^2 of the iterate and of the expected read."""

    iterate: float
    expected_read: float


def stationary_variance(
    curvature: float, noise_variance: float, learning_rate: float, mu: float
) -> StationaryVariance:
    """Return the exact stationary variances of ASGD on f = (curvature / 2) x^2, additive noise.

    >>> rest = analysis.stationary_variance(2.0, 4.0, learning_rate=0.05, mu=0.75)
    >>> rest.iterate > rest.expected_read
    True

    For independent lags, unlike those of a real server. With h = eta a and T = eta s^2 / 2 (ours):

        E m^2 = (T/a) (1 + mu) / Delta,   E x^2 = (T/a) (1 + mu + 2 mu h/(1-mu)) / Delta,
        Delta = 1 + mu - (1-mu) h/2 - mu h^2/(1-mu)

    Independent geometric staleness, mu in [0, 1); curvature and learning_rate > 0,
    noise_variance >= 0. To first order in h, E x^2 is (L3) times 1 + (1/2 + mu) h.

    Raises
    ------
    InputError
        An argument is outside its range, or the variance grows without bound at this learning
        rate (Delta <= 0).
    """
    number(curvature, "curvature", above=0.0)
    number(noise_variance, "noise_variance", least=0.0)
    number(learning_rate, "learning_rate", above=0.0)
    number(mu, "mu", least=0.0, below=1.0)
    step, keep = learning_rate * curvature, 1.0 - mu
    denominator = 1.0 + mu - keep * step / 2.0 - mu * step**2 / keep
    if not denominator > 0.0:
        raise InputError(
            f"learning_rate = {learning_rate}: expected less, because the variance grows without "
            f"bound at mu = {mu}, curvature = {curvature}"
        )
    base = learning_rate * noise_variance / (2.0 * curvature) / denominator
    return StationaryVariance(base * (1.0 + mu + 2.0 * mu * step / keep), base * (1.0 + mu))
