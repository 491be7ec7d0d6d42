"""Problems with linear sample gradients: coefficients for the closed moment equations.

grad f_i(x) = A_i x - c_i for every sample. Then f is quadratic, its mean gradient is A x - c, and
the second moment V of the sample gradients is quadratic in x, so E V needs only E x and E x x^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array
from asgd.errors import InputError
from asgd.problems.base import Problem
from asgd.streams import stream

LARGEST_DIM = 20


@dataclass(frozen=True)
class LinearGradients:
    """The moments of grad f_i(x) = A_i x - c_i over the samples i.

    Attributes
    ----------
    curvature
        A, the mean of A_i and the Hessian of f, shape (d, d).
    offset
        c, the mean of c_i, shape (d,).
    quadratic
        Mean of A_i[p, q] A_i[r, s], shape (d, d, d, d), indexed [p, r, q, s].
    linear
        Mean of A_i[p, q] c_i[r], shape (d, d, d), indexed [p, r, q].
    constant
        Mean of c_i c_i^T, shape (d, d).
    loss_at_zero
        f(0).
    """

    curvature: Array
    offset: Array
    quadratic: Array
    linear: Array
    constant: Array
    loss_at_zero: float

    @classmethod
    def of(cls, problem: Problem) -> LinearGradients:
        """Compute the coefficients from the sample gradients.

        Raises
        ------
        InputError
            The gradients are not linear in x, or d exceeds 20; the moment equations carry four
            d x d matrices.
        """
        d = problem.dim
        if d > LARGEST_DIM:
            raise InputError(
                f"problem.dim = {d}: expected at most {LARGEST_DIM} for closed moments"
            )
        origin = problem.sample_gradients(np.zeros(d))
        rows = problem.sample_gradients(np.eye(d)) - origin
        slopes = np.moveaxis(rows, 0, -1)
        _check_linear(problem, slopes, origin)
        offsets, n = -origin, problem.n_samples
        return cls(
            curvature=slopes.mean(axis=0),
            offset=offsets.mean(axis=0),
            quadratic=np.einsum("npq,nrs->prqs", slopes, slopes, optimize=True) / n,
            linear=np.einsum("npq,nr->prq", slopes, offsets, optimize=True) / n,
            constant=offsets.T @ offsets / n,
            loss_at_zero=float(problem.loss(np.zeros(d))),
        )

    @property
    def dim(self) -> int:
        """Number of parameters d."""
        return len(self.offset)

    @property
    def minimiser(self) -> Array:
        """The point where grad f = 0, shape (d,)."""
        return np.asarray(np.linalg.solve(self.curvature, self.offset), dtype=float)

    def expected_second_moment(
        self, first: Array, second: Array, one: npt.ArrayLike = 1.0
    ) -> Array:
        """Return E V(r) for a random point r.

        Parameters
        ----------
        first
            E r, shape (..., d).
        second
            E r r^T, shape (..., d, d).
        one
            E 1, shape (...); other than 1 only for the columns of a linear map.

        Returns
        -------
        Array
            Shape (..., d, d).
        """
        cross = np.einsum("prq,...q->...pr", self.linear, first)
        constant = np.asarray(one)[..., None, None] * self.constant
        quadratic = np.einsum("prqs,...qs->...pr", self.quadratic, second)
        return np.asarray(quadratic - cross - np.swapaxes(cross, -1, -2) + constant)

    def expected_square(self, first: Array, second: Array, one: npt.ArrayLike = 1.0) -> Array:
        """Return E grad f(r) grad f(r)^T, arguments and shape as `expected_second_moment`."""
        cross = np.einsum("pq,r,...q->...pr", self.curvature, self.offset, first)
        constant = np.asarray(one)[..., None, None] * np.outer(self.offset, self.offset)
        quadratic = self.curvature @ second @ self.curvature.T
        return np.asarray(quadratic - cross - np.swapaxes(cross, -1, -2) + constant)

    def modes(self) -> tuple[Array, Array]:
        """Return curvature and sampling variance at the minimiser per Hessian mode, (d,) each.

        The variance of mode i is q_i^T S q_i with q_i the Hessian's eigenvector.
        """
        values, vectors = np.linalg.eigh(self.curvature)
        point = self.minimiser
        covariance = self.expected_second_moment(point, np.outer(point, point))
        return values, np.einsum("pi,pq,qi->i", vectors, covariance, vectors)


def _check_linear(problem: Problem, slopes: Array, origin: Array) -> None:
    x = stream(0, "linearity check").standard_normal(problem.dim)
    predicted = slopes @ x + origin
    error = np.abs(problem.sample_gradients(x) - predicted).max()
    if error > 1e-8 * max(1.0, float(np.abs(predicted).max())):
        raise InputError(
            f"problem = {type(problem).__name__}: expected sample gradients linear in x (quadratic "
            "or least squares), because closed moments exist for no others"
        )
