"""The largest eigenvalues of a large symmetric operator, by Lanczos iterations (ARPACK)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from asgd.arrays import Array
from asgd.errors import UnreliableEstimateError


def largest_eigenvalues(
    product: Callable[[Array], Array], start: Array, count: int, tolerance: float
) -> tuple[Array, Array]:
    """Return eigenvalues, largest first, and the eigenvector of the first, shape (d,).

    Memory O(count d). Where some do not converge, the others are returned.

    Parameters
    ----------
    product
        Returns the product of the operator with a vector, both of shape (d,).
    start
        The first vector, shape (d,).
    count
        Number of eigenvalues.
    tolerance
        Relative, of the eigenvalues.

    Raises
    ------
    UnreliableEstimateError
        No eigenvalue converged.
    """
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

    d = len(start)
    operator = LinearOperator((d, d), matvec=lambda v: product(v.ravel()), dtype=np.float64)
    basis = min(2 * count + 8, d)
    try:
        values, vectors = eigsh(operator, count, which="LA", v0=start, ncv=basis, tol=tolerance)
    except ArpackNoConvergence as error:
        values, vectors = np.real(error.eigenvalues), np.real(error.eigenvectors)
        if not len(values):
            raise UnreliableEstimateError(
                f"leading curvature: no eigenvalue of {d} converged", math.nan
            ) from None
    except ArpackError:  # a Hessian of zeros, where a network is saturated
        if np.any(product(start)):
            raise
        return np.zeros(count), start / np.linalg.norm(start)
    order = np.argsort(values)[::-1]
    return np.asarray(values[order]), np.asarray(vectors[:, order[0]])
