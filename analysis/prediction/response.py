"""The mean response of one mode to a push, under any staleness law."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from analysis.models.history import History
from asgd.arrays import Array, Integers
from asgd.staleness.geometric import Geometric
from asgd.staleness.law import StalenessLaw


class ExpectedRead:
    """sum_l w_l v_{k-l} of a sequence v_0, v_1, ... under a law; O(1) memory if geometric.

    Parameters
    ----------
    law
        The staleness law.
    first, before
        v_0, and the constant value of v before it; both of the same shape.
    """

    def __init__(self, law: StalenessLaw, first: Array, before: Array) -> None:
        self._mu = law.mu if isinstance(law, Geometric) else None
        if self._mu is not None:
            self._average = (1 - self._mu) * first + self._mu * before
        else:
            self._history = History(law.weights(law.support_length()), before)
            self._history.push(first)

    def push(self, value: Array) -> None:
        """Append the next value."""
        if self._mu is None:
            self._history.push(value)
        else:
            self._average = self._mu * self._average + (1 - self._mu) * value

    def value(self) -> Array:
        """Return the current average."""
        return self._history.average() if self._mu is None else self._average


def response_power(
    law: StalenessLaw, learning_rate: float, curvature: Array, lags: Integers
) -> Array:
    """Return sum_{i<m} h_i h_i^T over modes at the given lags m.

    Parameters
    ----------
    curvature
        Shape (..., n): the n modes of one product.
    lags
        Ascending, shape (q,).

    Returns
    -------
    Array
        Shape (q, ..., n, n).
    """
    return _power(law, learning_rate, curvature, lags, lambda h: h[..., :, None] * h[..., None, :])


def power_of_squares(
    law: StalenessLaw, learning_rate: float, curvature: Array, lags: Integers
) -> Array:
    """Return sum_{i<m} h_i^2 by mode at the given lags, shape (q, ...); see `response_power`."""
    return _power(law, learning_rate, curvature, lags, np.square)


def _power(
    law: StalenessLaw,
    learning_rate: float,
    curvature: Array,
    lags: Integers,
    square: Callable[[Array], Array],
) -> Array:
    step = learning_rate * curvature
    h = np.ones_like(step)
    read = ExpectedRead(law, h, np.zeros_like(h))
    total = np.zeros_like(square(h))
    out, row = np.empty((len(lags), *total.shape)), 0
    for m in range(int(lags[-1]) + 1):
        while row < len(lags) and lags[row] == m:
            out[row] = total
            row += 1
        total += square(h)
        h = h - step * read.value()
        read.push(h)
    return out
