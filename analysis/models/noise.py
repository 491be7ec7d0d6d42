"""The noise Sigma^{1/2} z of one update under geometric staleness, carried along each path.

Sigma_k = sum_l w_l [grad f grad f^T + S/b](x_{k-l}) - g_k g_k^T with w_l = (1-mu) mu^l: the first
part is the random choice of a lag, the second the random choice of b samples at one stale point.
The implementations share `kick` (moves x by one update) and `absorb` (takes a new point and moves
the expected read g).
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, get_args

import numpy as np

from asgd.arrays import Array
from asgd.errors import InputError
from asgd.problems.base import Problem
from asgd.streams import standard_normals

NoiseKind = Literal["auto", "matrix", "samples", "two_point", "explicit"]

# Up to this dimension (d, d) matrices are cheaper than draws over all samples.
MATRIX_DIM = 4
# In one dimension, increments are drawn at once for up to this many updates and numbers: few calls,
# long enough for other threads to run, and small enough for the second-level cache.
DRAWN_UPDATES, DRAWN_NUMBERS = 16, 2**15
# Snapshots per path of `SnapshotNoise`: enough for nearly Gaussian sums.
SNAPSHOTS = 8


def standard_increments(out: Array, rng: np.random.Generator, two_point: bool) -> Array:
    """Fill `out` with independent numbers of mean 0 and variance 1, and return it.

    Two-point numbers are +-1 with equal probability. Their moments up to the third are those of
    N(0, 1), so they keep means and covariances of a path but not its tails.
    """
    if not two_point:
        return standard_normals(out, rng)
    from analysis.models.compiled import signs

    signs(out.reshape(-1), rng.bit_generator.random_raw(-(-out.size // 64)))
    return out


def psd_factor(matrices: Array) -> Array:
    """Return lower triangular L with L L^T = A for positive semi-definite A, shape (..., d, d).

    A Cholesky factor that sets a column to zero if its pivot is not positive, so it accepts
    singular matrices and rounding errors. Each of the d columns takes one pass of array operations
    over all matrices.
    """
    # numpy.linalg.eigh works too, but takes several times as long: it loops over the matrices.
    rest = matrices.copy()
    factor = np.zeros_like(rest)
    floor = 64 * np.finfo(rest.dtype).eps * np.einsum("...ii->...i", matrices)
    for j in range(rest.shape[-1]):
        pivot = rest[..., j, j]
        positive = pivot > floor[..., j]
        scale = np.where(positive, 1 / np.sqrt(np.where(positive, pivot, 1)), 0)
        column = rest[..., j:, j] * scale[..., None]
        factor[..., j:, j] = column
        rest[..., j:, j:] -= column[..., :, None] * column[..., None, :]
    return factor


class StalenessNoise(Protocol):
    """Noise of covariance Sigma under geometric staleness, for one block of paths."""

    def kick(self, x: Array, g: Array, batch: float, eta: float, amplitude: float) -> None:
        """Add -eta g + amplitude Sigma^{1/2} z to x, shape (paths, d), in place.

        g has the same shape and is the expected read; all arrays are contiguous.
        """

    def absorb(self, x: Array, g: Array) -> None:
        """Take in a new point, shape (paths, d); g' = r g + (1 - r) grad f(x), in place."""


def staleness_noise(
    kind: NoiseKind,
    problem: Problem,
    x: Array,
    rng: np.random.Generator,
    retention: float,
    lag_noise: bool = True,
) -> tuple[StalenessNoise, Array]:
    """Return the noise of paths that start at x with constant past, and grad f(x).

    Parameters
    ----------
    kind
        "matrix" carries (d, d) averages; "two_point" the same with +-1 increments; "explicit"
        carries Sigma itself; "samples" needs no matrix; "auto" is "matrix" up to d = 4, then
        "samples".
    retention
        Factor of the old average in the new one: mu for one step per update.
    lag_noise
        False omits the random choice of the lag: closure "sampling".

    Raises
    ------
    InputError
        If `kind` is none of the above.
    """
    if kind not in get_args(NoiseKind):
        raise InputError(f"noise = {kind!r}: expected {', '.join(get_args(NoiseKind))}")
    if kind == "samples" or (kind == "auto" and problem.dim > MATRIX_DIM):
        snapshots = SnapshotNoise(problem, x, rng, retention, lag_noise)
        return snapshots, snapshots.newest
    gradient = problem.gradient(x)
    if kind == "explicit":
        return ExplicitNoise(problem, x, rng, retention, lag_noise), gradient
    carrier = ScalarNoise if problem.dim == 1 else MatrixNoise
    return carrier(problem, x, rng, retention, lag_noise, kind == "two_point"), gradient


class _Carrier:
    """Base of the implementations, with the arguments of `staleness_noise`."""

    def __init__(
        self,
        problem: Problem,
        x: Array,
        rng: np.random.Generator,
        retention: float,
        lag_noise: bool = True,
        two_point: bool = False,
    ) -> None:
        self.problem, self.rng, self.retention = problem, rng, retention
        self.lag_noise, self.two_point = lag_noise, two_point
        self.start(x)

    def start(self, x: Array) -> None:
        """Start from a constant past at x."""


class ScalarNoise(_Carrier):
    """Sigma for d = 1 by (S4), in place: Gamma, from the choice of the lag, and s = E_l S.

    Gamma equals h - g^2 of (S3) but is computed without a difference, so it is never negative.
    Additive noise leaves s constant. An update is two compiled loops around the gradient.
    """

    def start(self, x: Array) -> None:
        """Start from a constant past at x."""
        from analysis.models import compiled

        self._compiled = compiled
        self.gamma, self.s = np.zeros(len(x), x.dtype), self._sampling(x)
        rows = min(DRAWN_UPDATES, max(1, DRAWN_NUMBERS // len(x)))
        self._drawn, self._used = np.empty((rows, len(x)), x.dtype), rows

    def kick(self, x: Array, g: Array, batch: float, eta: float, amplitude: float) -> None:
        """Move x by the square root of the variance."""
        if self._used == len(self._drawn):
            standard_increments(self._drawn, self.rng, self.two_point)
            self._used = 0
        z = self._drawn[self._used]
        self._used += 1
        self._compiled.kick(x[:, 0], g[:, 0], self.gamma, self.s, z, batch, eta, amplitude)

    def absorb(self, x: Array, g: Array) -> None:
        """Relax g, Gamma and s towards their values at x."""
        gradient = self.problem.gradient(x).astype(x.dtype, copy=False).reshape(-1)
        self._compiled.relax(g[:, 0], self.gamma, gradient, self.retention, self.lag_noise)
        if not self.problem.additive_noise:
            _relax(self.s, self._sampling(x), self.retention)

    def _sampling(self, x: Array) -> Array:
        return self.problem.gradient_covariance(x).astype(x.dtype).reshape(-1)


class MatrixNoise(_Carrier):
    """Sigma with (d, d) matrices per path: H of (S3) in two parts, h and s, and its factor."""

    def start(self, x: Array) -> None:
        """Start from a constant past at x."""
        self.h = outer(self.problem.gradient(x).astype(x.dtype))
        self.s = self.problem.gradient_covariance(x).astype(x.dtype)
        self._z = np.empty_like(x)

    def kick(self, x: Array, g: Array, batch: float, eta: float, amplitude: float) -> None:
        """Move x by a Cholesky factor."""
        covariance = self.s / batch
        if self.lag_noise:
            covariance += self.h
            covariance -= outer(g)
        z = standard_increments(self._z, self.rng, self.two_point)
        noise = np.einsum("pij,pj->pi", psd_factor(covariance), z)
        _move(x, g, eta, amplitude, noise)

    def absorb(self, x: Array, g: Array) -> None:
        """Relax g, h and s towards their values at x."""
        gradient = self.problem.gradient(x)
        if self.lag_noise:
            _relax(self.h, outer(gradient), self.retention)
        _relax(self.s, self.problem.gradient_covariance(x).astype(x.dtype), self.retention)
        _approach(g, gradient, self.retention)


class ExplicitNoise(_Carrier):
    """Sigma itself, (S4), in two parts: Gamma, from the choice of the lag, and s = E_l S.

        dGamma = -kappa Gamma dt + kappa (grad f(X) + kappa Y)(grad f(X) + kappa Y)^T dt

    where kappa Y = -g. One step is Gamma' = r Gamma + r (1-r) (grad f - g)(grad f - g)^T, which
    equals h' - g' g'^T of (S3) exactly.
    """

    def start(self, x: Array) -> None:
        """Start from a constant past at x."""
        self.s = self.problem.gradient_covariance(x).astype(x.dtype)
        self.gamma = np.zeros_like(self.s)
        self._z = np.empty_like(x)

    def kick(self, x: Array, g: Array, batch: float, eta: float, amplitude: float) -> None:
        """Move x by a Cholesky factor."""
        z = standard_increments(self._z, self.rng, two_point=False)
        factor = psd_factor(self.gamma + self.s / batch)
        _move(x, g, eta, amplitude, np.einsum("pij,pj->pi", factor, z))

    def absorb(self, x: Array, g: Array) -> None:
        """Relax g, Gamma and s towards their values at x."""
        gradient = self.problem.gradient(x)
        if self.lag_noise:
            self.gamma += (1 - self.retention) * outer(gradient - g)
            self.gamma *= self.retention
        _relax(self.s, self.problem.gradient_covariance(x).astype(x.dtype), self.retention)
        _approach(g, gradient, self.retention)


class SnapshotNoise(_Carrier):
    """Sigma without matrices, from a few snapshots kept for each path (ours).

    Each of R slots holds the gradient G and one draw xi ~ N(0, S) of a past point, and takes the
    new point with probability 1 - mu at every step, so its age is geometric. The noise is

        (1/sqrt(R)) sum_r eps_r (G_r - g + xi_r / sqrt(b)),   eps_r = +-1, fresh for every update

    Fresh signs decorrelate updates that use the same slot, so one draw per point is enough.
    Averaged over the random replacements the covariance is exactly Sigma, and for linear gradients
    the first and second moments of x are exactly those of (S5). Memory: 2 R d per path.
    """

    def start(self, x: Array) -> None:
        """Start from a constant past at x."""
        shape = (len(x), SNAPSHOTS, self.problem.dim)
        self.gradients = np.empty(shape if self.lag_noise else (0, 0, 0), x.dtype)
        self.noises = np.empty(shape, x.dtype)
        for slot in range(SNAPSHOTS):
            self.newest, self.noises[:, slot] = self.problem.gradient_and_noise(x, self.rng)
        if self.lag_noise:
            self.gradients[:] = self.newest[:, None, :]

    def kick(self, x: Array, g: Array, batch: float, eta: float, amplitude: float) -> None:
        """Move x by the signed sum over the slots."""
        signs = np.empty((len(g), 1, SNAPSHOTS), g.dtype)
        standard_increments(signs, self.rng, two_point=True)
        signs /= math.sqrt(SNAPSHOTS)
        noise: Array = np.matmul(signs, self.noises)[:, 0]
        noise *= 1 / math.sqrt(batch)
        if self.lag_noise:
            noise += np.matmul(signs, self.gradients)[:, 0]
            noise -= signs.sum(axis=2) * g
        _move(x, g, eta, amplitude, noise)

    def absorb(self, x: Array, g: Array) -> None:
        """Put x into each slot with probability 1 - r, and relax g."""
        self.newest, noise = self.problem.gradient_and_noise(x, self.rng)
        path, slot = np.nonzero(self.rng.random((len(x), SNAPSHOTS)) >= self.retention)
        self.noises[path, slot] = noise[path]
        if self.lag_noise:
            self.gradients[path, slot] = self.newest[path]
        _approach(g, self.newest, self.retention)


def _move(x: Array, g: Array, eta: float, amplitude: float, noise: Array) -> None:
    """Add -eta g + amplitude noise to x; overwrites `noise`."""
    noise *= amplitude
    noise -= eta * g
    x += noise


def _approach(g: Array, gradient: Array, retention: float) -> None:
    """Replace g by retention * g + (1 - retention) * gradient; equal values stay equal."""
    change = gradient - g
    change *= 1 - retention
    g += change


def _relax(average: Array, new: Array, retention: float) -> None:
    """Replace an average by retention * average + (1 - retention) * new; overwrites `new`."""
    average *= retention
    new *= 1 - retention
    average += new


def outer(v: Array) -> Array:
    """Return v v^T, shape (..., d, d) for (..., d)."""
    return v[..., :, None] * v[..., None, :]
