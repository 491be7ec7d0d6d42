"""The exact decay of E x^2: on a server of memoryless workers, and under independent lags (ours).

If workers are memoryless, the next turn does not depend on the past, so the second moments of the
point x, the velocity v of the heavy ball and the workers' snapshots s_i follow a closed linear
recursion. Workers of equal rate are interchangeable: a state holds E x^2, E x v, E v^2; per group
of workers E x s, E v s, E s^2; and per pair of groups E s s' of two workers.

If lags are independent, the choice of a lag is noise that is uncorrelated with the past, and E x^2
follows a renewal equation (`independent_limit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from analysis.exact.stability import circle_points, max_stable_learning_rate
from asgd.arrays import Array
from asgd.staleness.law import StalenessLaw

_SCAN = 400  # steps scanned for the first without decay
_DENSE = 300  # number of moments up to which the full matrix is formed
_TAIL = 1e-12  # mass of a law that is cut off


@dataclass(frozen=True)
class MemorylessServer:
    """Workers in groups of equal rate.

    Attributes
    ----------
    sizes
        Workers of each group, shape (groups,).
    chance
        Probability that a given worker of the group is next, shape (groups,).
    momentum
        beta of the heavy ball.
    """

    sizes: Array
    chance: Array
    momentum: float = 0.0

    @classmethod
    def of_rates(cls, rates: Array, momentum: float = 0.0) -> MemorylessServer:
        """Group workers by their push rates, shape (workers,)."""
        different, sizes = np.unique(rates, return_counts=True)
        return cls(sizes.astype(float), different / np.sum(rates), momentum)

    @property
    def moments(self) -> int:
        """Length of a state."""
        groups = len(self.sizes)
        return 3 + 3 * groups + len(self._pairs[0])

    @cached_property
    def _pairs(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        return np.triu_indices(len(self.sizes))

    def advance(self, state: Array, step: float) -> Array:
        """Return the moments one update later, shape (..., moments), linear in the state.

        Parameters
        ----------
        step
            Learning rate times curvature.
        """
        beta, h, p, n = self.momentum, step, self.chance, self.sizes
        groups, (one, other) = len(n), self._pairs
        xx, xv, vv = (state[..., i, None] for i in range(3))
        xs, vs, own, pair = np.split(state[..., 3:], np.arange(1, 4) * groups, axis=-1)
        both = np.zeros((*state.shape[:-1], groups, groups))
        both[..., one, other] = both[..., other, one] = pair
        # the new velocity and point, by the group of the used snapshot
        velocity2 = beta**2 * vv - 2.0 * beta * h * vs + h**2 * own
        moved = beta * xv - h * xs + velocity2  # E of new point times new velocity
        point2 = xx + 2.0 * (beta * xv - h * xs) + velocity2
        # the snapshot of a given worker stays if another has the turn: sum over the others
        used = both @ (n * p) - p * np.diagonal(both, axis1=-2, axis2=-1)
        stays = beta * vs * (1.0 - p) - h * used
        new_pair = both * (1.0 - p[:, None] - p[None, :])
        carried = (xs + beta * vs)[..., None, :] - h * both  # of the new point by group used
        new_pair = new_pair + p[:, None] * carried + p[None, :] * np.swapaxes(carried, -1, -2)
        alone = np.flatnonzero(n == 1)  # groups of one worker have no pair
        new_pair[..., alone, alone] = 0.0
        return np.concatenate(
            [
                (point2 @ (n * p))[..., None],
                (moved @ (n * p))[..., None],
                (velocity2 @ (n * p))[..., None],
                xs * (1.0 - p) + stays + p * point2,
                stays + p * moved,
                own * (1.0 - p) + p * point2,
                new_pair[..., one, other],
            ],
            axis=-1,
        )

    def factor(self, step: float) -> float:
        """Return the asymptotic growth of E x^2 per update: the spectral radius."""
        if self.moments <= _DENSE:
            matrix = self.advance(np.eye(self.moments), step)
            return float(np.abs(np.linalg.eigvals(matrix)).max())
        from scipy.sparse.linalg import LinearOperator, eigs

        shape = (self.moments, self.moments)
        operator = LinearOperator(
            shape, matvec=lambda s: self.advance(s.ravel(), step), dtype=float
        )
        # The moments of points that are all one are not orthogonal to the dominant vector.
        start = np.ones(self.moments)
        largest = eigs(operator, k=1, v0=start, tol=1e-9, return_eigenvectors=False)
        return float(np.abs(largest[0]))

    def limit(self) -> float:
        """Return the smallest step h = eta a at which E x^2 no longer decays."""
        from scipy.optimize import brentq

        def excess(step: float) -> float:
            return self.factor(step) - 1.0

        workers = float(self.sizes.sum())
        low = 0.1 * (1.0 - self.momentum) / workers
        grid = np.geomspace(low, 4.0, _SCAN if self.moments <= _DENSE else _SCAN // 10)
        first = next(i for i, step in enumerate(grid) if excess(step) > 0)
        return float(brentq(excess, grid[first - 1], grid[first], xtol=1e-14))


def independent_limit(
    law: StalenessLaw, *, momentum: float = 0.0, staleness_aware: bool = False
) -> float:
    """Return the smallest step h = eta a at which E x^2 no longer decays.

    Every update draws its lag l independently and moves by h c_l x_{k-l}, c_l = 1, or 1 / (1 + l)
    for a staleness-aware step. That is its mean plus noise, and with the impulse response psi of
    the mean and phi_k = sum_l w_l c_l psi_{k-l} noise of variance one at update 0 causes noise of
    variance h^2 (sum_l w_l c_l^2 psi_{k-l}^2 - phi_k^2) at update k + 1. E x^2 decays while these
    sum to less than one:

        h^2 (sum_l w_l c_l^2 sum psi_k^2 - sum phi_k^2) < 1                                    (Y2)

    The sums are means over the unit circle, by Parseval's identity.

    Parameters
    ----------
    law
        Staleness law.
    momentum, staleness_aware
        As in `max_stable_learning_rate`.
    """
    from scipy.optimize import brentq

    weights = law.weights(law.support_length(_TAIL))
    share = 1.0 / np.arange(1, len(weights) + 1) if staleness_aware else np.ones(len(weights))
    points = circle_points(len(weights))
    s = np.exp(-2j * np.pi * np.arange(points // 2 + 1) / points)
    read = np.fft.rfft(weights * share, points)
    noise = weights @ share**2 - np.abs(read) ** 2
    noise[1:-1] *= 2.0  # the other half of the circle
    own = (1.0 - s) * (1.0 - momentum * s)

    def excess(step: float) -> float:
        response = noise / np.abs(own + step * s * read) ** 2
        return float(step**2 * response.sum() / points) - 1.0

    of_mean = max_stable_learning_rate(law, 1.0, momentum=momentum, staleness_aware=staleness_aware)
    grid = of_mean * np.geomspace(1e-4, 1.0 - 1e-9, _SCAN // 4)
    above = next((i for i, step in enumerate(grid) if excess(step) > 0), 0)
    if not above:  # lags that hardly vary
        return of_mean
    return float(brentq(excess, grid[above - 1], grid[above], xtol=1e-14))
