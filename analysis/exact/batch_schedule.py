"""Optimal mini-batch schedules: the paper's closed form and the optimum of the exact moments.

`optimal_batch_schedule` is (B4) of An, Lu, Ying, section 4; it uses only the slowest decay rate.
`minimise_final_loss` (ours) minimises the final expected loss of the full moment recursion of ASGD
for a given number of gradients. That loss is a sum of products of powers of 1/b_k with
coefficients >= 0, so it is convex in log b, and its local minimum is global.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from analysis.exact.linear_gradients import LinearGradients
from analysis.exact.moments import Closure, MomentRecursion
from asgd.arrays import Array, Integers
from asgd.errors import InputError
from asgd.problems.base import Problem, starting_point

Batches = Integers


def decay_rate(curvature: npt.ArrayLike, learning_rate: float, mu: float) -> float:
    """Return the rate of the slowest second moment per unit of SME time (B2).

    rho = Re(kappa - sqrt(kappa^2 - 4 a)) of the slowest of the Hessian eigenvalues `curvature`.
    """
    kappa = np.sqrt((1.0 - mu) / learning_rate)
    smallest = float(np.min(np.asarray(curvature, dtype=float)))
    return float((kappa - np.sqrt(complex(kappa**2 - 4.0 * smallest))).real)


def stationary_loss(
    curvature: npt.ArrayLike, noise_variance: npt.ArrayLike, learning_rate: float, mu: float
) -> float:
    """Return c: the stationary loss above the minimum is c / b, summed over the modes (B3)."""
    a, s2 = np.asarray(curvature, dtype=float), np.asarray(noise_variance, dtype=float)
    return float((a * s2 / 4.0 * (learning_rate**2 / (1.0 - mu) + learning_rate / a)).sum())


def optimal_batch_schedule(
    curvature: npt.ArrayLike,
    noise_variance: npt.ArrayLike,
    learning_rate: float,
    mu: float,
    updates: int,
    *,
    sample_cost: float | None = None,
    budget: int | None = None,
) -> Batches:
    """Return the closed-form optimal schedule: batch one, then exponential growth (B4).

    >>> batches = analysis.optimal_batch_schedule(2.0, 4.0, 0.01, 0.8, 400, budget=1659)
    >>> int(batches[0]), int(batches[-1]), int(batches.sum())
    (1, 33, 1659)

    An, Lu, Ying, section 4. In d dimensions the slowest mode gives rho and the sum over the modes
    gives c. `asgd.with_batch_sizes` puts the schedule into a configuration. For linear gradients
    `LinearGradients.of(problem).modes()` returns the first two arguments.

    Parameters
    ----------
    curvature, noise_variance
        Hessian eigenvalues, and variance of a sample gradient along each, shape () or (d,).
    sample_cost
        c_u, the loss that one extra sample per unit of SME time is worth. Either this or budget.
    budget
        Total number of gradients, >= updates. The schedule meets it exactly; a run of several
        workers meets it nearly, see `asgd.with_batch_sizes`.

    Returns
    -------
    Batches
        Batch size of each update, shape (updates,).

    Raises
    ------
    InputError
        Both or neither of sample_cost and budget, or an argument outside its range.
    """
    _check_mode(curvature, noise_variance, learning_rate, mu)
    if (sample_cost is None) == (budget is None):
        raise InputError("sample_cost, budget: expected exactly one of them")
    rho = decay_rate(curvature, learning_rate, mu)
    remaining = np.arange(updates, 0, -1) * np.sqrt(learning_rate * (1.0 - mu))
    growth = np.exp(-rho * remaining / 2.0)
    if budget is not None:
        _check_budget(budget, updates)
        return _round_to(np.maximum(1.0, growth * _scale(growth, budget)), budget)
    if sample_cost is None or not sample_cost > 0:
        raise InputError(f"sample_cost = {sample_cost}: expected a positive number")
    c = stationary_loss(curvature, noise_variance, learning_rate, mu)
    level = np.sqrt(rho * c / sample_cost)
    return np.asarray(np.maximum(1.0, level * growth).round(), dtype=np.int64)


def uniform_schedule(updates: int, budget: int) -> Batches:
    """Return equal batches, or two neighbouring sizes mixed evenly, shape (updates,)."""
    _check_budget(budget, updates)
    return np.diff(np.arange(updates + 1) * budget // updates).astype(np.int64)


@dataclass(frozen=True)
class BatchPlan:
    """The batch sequence with the least final loss.

    Attributes
    ----------
    batch_size
        Integer batch of each update, shape (updates,); sums to the budget.
    final_loss
        E f(x_K) - min f for this sequence.
    lower_bound
        Lower bound on the final loss of every sequence with this budget, integer or real.
    """

    batch_size: Batches
    final_loss: float
    lower_bound: float


class FinalLoss:
    """E f(x_K) - min f and its derivatives as a function of the batch sequence.

    Parameters
    ----------
    problem
        Sample gradients linear in x, d <= 20.
    learning_rate, mu
        Step size and geometric parameter of the staleness.
    initial
        x_0, shape (d,); default the problem's initial point under this seed.
    closure
        As in `analysis.exact.moments.MomentRecursion`.
    """

    def __init__(
        self,
        problem: Problem,
        learning_rate: float,
        mu: float,
        *,
        initial: Array | None = None,
        closure: Closure = "iid",
        seed: int = 0,
    ) -> None:
        gradients = LinearGradients.of(problem)
        recursion = MomentRecursion(gradients, mu, closure)
        start = starting_point(problem, seed) if initial is None else initial
        self._start = recursion.initial_state(np.asarray(start, dtype=float))
        self._fixed, self._noise = recursion.transition(learning_rate)
        self._weights = recursion.loss_weights()
        self._weights[0] -= float(problem.loss(gradients.minimiser))

    def value(self, batch: Array | Batches) -> float:
        """Return the loss for batches of shape (K,)."""
        return float(self._weights @ self._forward(np.asarray(batch, dtype=float))[0][-1])

    def value_and_weights(self, batch: Array) -> tuple[float, Array]:
        """Return the loss and c_k = d loss / d(1/b_k), shape (K,), by the adjoint recursion.

        c_k is the final effect of the sampling noise of update k with batch one.
        """
        states, pushes = self._forward(batch)
        adjoint, weights = self._weights, np.empty(len(batch))
        for k in range(len(batch) - 1, -1, -1):
            weights[k] = adjoint @ pushes[k]
            adjoint = adjoint @ self._fixed + (adjoint @ self._noise) / batch[k]
        # rounding can make a vanishing weight negative
        return float(self._weights @ states[-1]), np.maximum(weights, 0.0)

    def _forward(self, batch: Array) -> tuple[Array, Array]:
        states = np.empty((len(batch) + 1, len(self._start)))
        pushes = np.empty((len(batch), len(self._start)))
        states[0] = self._start
        for k, b in enumerate(batch):
            pushes[k] = self._noise @ states[k]
            states[k + 1] = self._fixed @ states[k] + pushes[k] / b
        return states, pushes


def minimise_final_loss(final_loss: FinalLoss, updates: int, budget: int) -> BatchPlan:
    """Return the batch sequence with the least final loss for a given number of gradients.

    Ours. With additive noise b_k ~ sqrt(c_k) where that exceeds one. c_k follows the squared
    impulse response, so for complex eigenvalues the batch oscillates with it. The real-valued
    optimum is rounded to integers and improved by moving single samples.

    Parameters
    ----------
    final_loss
        The loss to minimise.
    updates
        Number of updates K.
    budget
        Total number of gradients, >= updates; the schedule meets it exactly.
    """
    _check_budget(budget, updates)
    real, lower_bound = minimise_real(final_loss, updates, budget)
    best = _round_to(real, budget)
    best_value = final_loss.value(best)
    for _ in range(20):
        _, weights = final_loss.value_and_weights(best.astype(float))
        candidate = _fill_integers(weights, best)
        value = final_loss.value(candidate)
        if not value < best_value:
            break
        best, best_value = candidate, value
    return BatchPlan(best, best_value, lower_bound)


class DifferentiableLoss(Protocol):
    """A loss of the batch sequence that can be differentiated in 1/b_k, such as `FinalLoss`."""

    def value_and_weights(self, batch: Array) -> tuple[float, Array]:
        """Return the loss and its derivatives."""


def minimise_real(final_loss: DifferentiableLoss, updates: int, budget: int) -> tuple[Array, float]:
    """Minimise over real batches b >= 1 of the given sum; return them and a lower bound.

    Each step solves the problem for fixed adjoint weights, exact for additive noise, and is halved
    in log b until the loss falls. log E f is convex in log b, so the minimum of its tangent plane
    over the same batches is a lower bound.

    General optimisers reach the same value (`scripts/bench_control.py`); this needs two gradients
    for additive noise.
    """
    batch = np.full(updates, budget / updates)
    value, weights = final_loss.value_and_weights(batch)
    if not weights.any():
        return batch, value
    lower_bound = 0.0
    for _ in range(100):
        slope = weights / (batch * value)
        lowest = np.maximum(1.0, slope * _scale(slope, budget))
        tangent = value * float(np.exp(-slope @ np.log(lowest / batch)))
        lower_bound = max(lower_bound, tangent)
        if value <= lower_bound * (1.0 + 1e-9):
            break
        target, fraction = _fill(weights, budget), 1.0
        while fraction > 1e-6:
            trial = np.exp((1.0 - fraction) * np.log(batch) + fraction * np.log(target))
            trial = _fill(trial**2, budget)
            trial_value, trial_weights = final_loss.value_and_weights(trial)
            if trial_value < value:
                break
            fraction /= 2.0
        else:
            break
        batch, value, weights = trial, trial_value, trial_weights
    return batch, lower_bound


def _fill(weights: Array, budget: int) -> Array:
    """Minimise sum_k c_k / b_k over real b_k >= 1 of the given sum: b = max(1, level sqrt(c))."""
    root = np.sqrt(weights)
    return np.maximum(1.0, root * _scale(root, budget))


def _scale(shape: Array, budget: int) -> float:
    """Return the level at which max(1, level shape) sums to the budget."""
    from scipy.optimize import brentq

    # for one update the level is `top`; rounding must not remove the change of sign
    top = budget / shape.max() * (1.0 + 1e-9)
    if budget <= len(shape):
        return 0.0
    return float(brentq(lambda level: np.maximum(1.0, level * shape).sum() - budget, 0.0, top))


def _round_to(batch: Array, budget: int) -> Batches:
    """Round to integers >= 1 of the given sum; the largest remainders round up."""
    floor = np.floor(batch + 1e-9).astype(np.int64)
    missing = budget - int(floor.sum())
    floor[np.argsort(floor - batch, kind="stable")[:missing]] += 1
    return floor


def _fill_integers(weights: Array, batch: Batches) -> Batches:
    """Minimise sum_k c_k / b_k over integers b_k >= 1 of the same sum by moving single samples.

    The terms are convex in b_k, so a sequence that no single move improves is optimal.
    """
    batch = batch.copy()
    for _ in range(int(batch.sum())):
        gain = weights / (batch * (batch + 1))
        loss = np.where(batch > 1, weights / (batch * np.maximum(batch - 1, 1)), np.inf)
        to, source = int(np.argmax(gain)), int(np.argmin(loss))
        if gain[to] <= loss[source] * (1.0 + 1e-12):
            break
        batch[to] += 1
        batch[source] -= 1
    return batch


def _check_budget(budget: int, updates: int) -> None:
    if updates < 1:
        raise InputError(f"updates = {updates}: expected at least 1")
    if budget < updates:
        raise InputError(f"budget = {budget}: expected at least one gradient per update, {updates}")


def _check_mode(
    curvature: npt.ArrayLike, noise_variance: npt.ArrayLike, learning_rate: float, mu: float
) -> None:
    if not np.all(np.asarray(curvature) > 0):
        raise InputError(f"curvature = {np.asarray(curvature)}: expected positive numbers")
    if not np.all(np.asarray(noise_variance) >= 0):
        raise InputError(f"noise_variance = {np.asarray(noise_variance)}: expected numbers >= 0")
    if not learning_rate > 0:
        raise InputError(f"learning_rate = {learning_rate}: expected a positive number")
    if not 0.0 <= mu < 1.0:
        raise InputError(f"mu = {mu}: expected 0 <= mu < 1")
