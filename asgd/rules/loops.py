"""Compiled loops of the rules for long vectors: one pass over memory, and no intermediate results.

Each does what the `update` of its rule does, in the same order, so that no bit differs.
"""

from __future__ import annotations

import numpy as np

from asgd.arrays import Array
from asgd.compiled import READ, WRITTEN, compiled


@compiled(WRITTEN, READ, "float64")
def sgd_loop(x: Array, gradient: Array, eta: float) -> None:
    """Apply a gradient by plain SGD."""
    rate = x.dtype.type(eta)
    for i in range(x.size):
        x[i] -= gradient[i] * rate


@compiled(WRITTEN, READ, WRITTEN, *["float64"] * 2)
def heavy_ball_loop(
    x: Array, gradient: Array, velocity: Array, eta: float, momentum: float
) -> None:
    """Apply a gradient by the heavy ball."""
    rate, beta = x.dtype.type(eta), x.dtype.type(momentum)
    for i in range(x.size):
        velocity[i] = velocity[i] * beta + gradient[i] * rate
        x[i] -= velocity[i]


@compiled(WRITTEN, READ, WRITTEN, *["float64"] * 2)
def nesterov_loop(x: Array, gradient: Array, velocity: Array, eta: float, momentum: float) -> None:
    """Apply a gradient with the momentum of Nesterov."""
    rate, beta = x.dtype.type(eta), x.dtype.type(momentum)
    for i in range(x.size):
        step = gradient[i] * rate
        velocity[i] = velocity[i] * beta + step
        x[i] -= step + velocity[i] * beta


@compiled(WRITTEN, READ, *[WRITTEN] * 2, *["float64"] * 5)
def adam_loop(
    x: Array,
    gradient: Array,
    first: Array,
    second: Array,
    beta1: float,
    beta2: float,
    epsilon: float,
    rate: float,
    kept: float,
) -> None:
    """Apply a gradient by Adam, after multiplying x with `kept`."""
    kind = x.dtype.type
    b1, b2, small, eta, share = kind(beta1), kind(beta2), kind(epsilon), kind(rate), kind(kept)
    for i in range(x.size):
        first[i] = first[i] * b1 + gradient[i]
        second[i] = second[i] * b2 + gradient[i] * gradient[i]
        x[i] = x[i] * share - first[i] / (np.sqrt(second[i]) + small) * eta


@compiled(WRITTEN, READ, WRITTEN, *["float64"] * 3)
def rmsprop_loop(
    x: Array, gradient: Array, second: Array, beta2: float, epsilon: float, rate: float
) -> None:
    """Apply a gradient by RMSProp."""
    b2, small, eta = x.dtype.type(beta2), x.dtype.type(epsilon), x.dtype.type(rate)
    for i in range(x.size):
        second[i] = second[i] * b2 + gradient[i] * gradient[i]
        x[i] -= gradient[i] / (np.sqrt(second[i]) + small) * eta


@compiled(WRITTEN, READ, READ, *["float64"] * 2)
def delay_compensated_loop(
    x: Array, gradient: Array, read: Array, eta: float, compensation: float
) -> None:
    """Apply a gradient with delay compensation."""
    rate, share = x.dtype.type(eta), x.dtype.type(compensation)
    for i in range(x.size):
        step = (x[i] - read[i]) * gradient[i] * gradient[i] * share
        x[i] -= (step + gradient[i]) * rate
