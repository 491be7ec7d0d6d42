"""The noise of one update under geometric staleness, Sigma^{1/2} z, carried along each path.

Sigma_k = sum_l w_l [grad f grad f^T + S/b](x_{k-l}) - g_k g_k^T with w_l = (1-mu) mu^l: the first
part is the random choice of a lag, the second the random choice of b samples at one stale point.
Four ways to have it, all with `draw` (noise of the next update) and `absorb` (a new point, which
also tells how the expected read g moves).
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, get_args

import numpy as np

from asgd.errors import InputError
from asgd.problems.base import Array, Problem

NoiseKind = Literal["auto", "matrix", "samples", "two_point", "explicit"]

# Up to this dimension (d, d) matrices are cheaper than draws over all samples.
MATRIX_DIM = 4
# Snapshots kept for each path by `SnapshotNoise`: enough for nearly Gaussian sums.
SNAPSHOTS = 8


def standard_increments(out: Array, rng: np.random.Generator, two_point: bool) -> Array:
    """Fill `out` with independent numbers of mean 0 and variance 1, and return it.

    Two-point numbers are +-1 with equal chance: moments up to the third are those of N(0, 1), so
    means and covariances of a path are kept and its tails are not.
    """
    if not two_point:
        if out.dtype == np.float32:
            return _box_muller(out, rng)
        return rng.standard_normal(out=out)
    words = rng.bit_generator.random_raw(-(-out.size // 64))
    signs = np.unpackbits(words.view(np.uint8), count=out.size).reshape(out.shape)
    np.multiply(signs, out.dtype.type(2), out=out)
    out -= 1
    return out


class Signs:
    """Independent signs for the same array again and again: one bit of a drawn word each.

    A word for each number serves as many steps as it has bits, and a sign is flipped in place.
    """

    def __init__(self, like: Array, rng: np.random.Generator) -> None:
        self._rng = rng
        unsigned = np.dtype(f"u{like.itemsize}")
        self._bits, self._top = np.empty(like.shape, unsigned), np.empty(like.shape, unsigned)
        self._width = 8 * like.itemsize
        self._mask = unsigned.type(1 << (self._width - 1))
        self._left = 0

    def flip(self, values: Array) -> None:
        """Multiply each value by +-1 with equal chance, in place."""
        if self._left == 0:
            words = -(-self._bits.nbytes // 8)
            drawn = self._rng.bit_generator.random_raw(words).view(self._bits.dtype)
            self._bits[...] = drawn[: self._bits.size].reshape(self._bits.shape)
            self._left = self._width
        np.bitwise_and(self._bits, self._mask, out=self._top)
        self._bits <<= 1
        self._left -= 1
        pattern = values.view(self._bits.dtype)
        pattern ^= self._top


def _box_muller(out: Array, rng: np.random.Generator) -> Array:
    """Fill a float32 array with normals, three times as fast as the generator's own method.

    NumPy's float32 logarithm, sine and cosine are vectorised, its rejection method is not. Uniform
    numbers of 24 bits reach |z| = 5.8.
    """
    flat = out.reshape(-1)
    pairs = (flat.size + 1) // 2
    bits = rng.bit_generator.random_raw(pairs).view(np.uint32)
    bits >>= 8
    uniform = bits.view(np.int32).astype(np.float32)
    radius, angle = uniform[:pairs], uniform[pairs:]
    radius += 1
    radius *= 2.0**-24
    np.log(radius, out=radius)
    radius *= -2
    np.sqrt(radius, out=radius)
    angle *= 2 * np.pi / 2**24
    np.multiply(radius, np.cos(angle), out=flat[:pairs])
    np.sin(angle, out=angle)
    angle *= radius
    flat[pairs:] = angle[: flat.size - pairs]
    return out


def psd_factor(matrices: Array) -> Array:
    """Return lower triangular L with L L^T = A for positive semi-definite A, shape (..., d, d).

    A Cholesky factor that puts zero where a pivot is zero or negative, so singular matrices and
    the rounding errors of differences are no exception; one pass of array operations for each of
    the d columns, over all matrices at once.
    """
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

    def draw(self, g: Array, batch: float) -> Array:
        """Return Sigma^{1/2} z, shape (paths, d), to be overwritten; g is the expected read."""

    def absorb(self, x: Array, g: Array) -> Array:
        """Take in a new point, shape (paths, d), and return (1 - r) (grad f(x) - g).

        That is the change of the expected read under the retention r, to be overwritten.
        """


def staleness_noise(
    kind: NoiseKind,
    problem: Problem,
    x: Array,
    rng: np.random.Generator,
    retention: float,
    lag_noise: bool = True,
) -> tuple[StalenessNoise, Array]:
    """Return the noise of paths that start at x with constant pre-history, and grad f(x).

    Parameters
    ----------
    kind
        "matrix" carries (d, d) averages; "two_point" the same with +-1 increments; "explicit"
        carries Sigma itself; "samples" needs no matrix; "auto" is "matrix" up to d = 4 and
        "samples" beyond.
    retention
        Factor of the old average in the new one: mu for one step per update.
    lag_noise
        False leaves out the random choice of the lag: closure "sampling".

    Raises
    ------
    InputError
        If `kind` is none of the above.
    """
    if kind not in get_args(NoiseKind):
        raise InputError(f"noise: {kind!r}; accepted: {', '.join(get_args(NoiseKind))}")
    if kind == "samples" or (kind == "auto" and problem.dim > MATRIX_DIM):
        snapshots = SnapshotNoise(problem, x, rng, retention, lag_noise)
        return snapshots, snapshots.newest
    gradient = problem.gradient(x)
    if kind == "explicit":
        return ExplicitNoise(problem, x, rng, retention, lag_noise), gradient
    carrier = ScalarNoise if problem.dim == 1 else MatrixNoise
    return carrier(problem, x, rng, retention, lag_noise, kind == "two_point"), gradient


class ScalarNoise:
    """Sigma for d = 1 by (S4), in place: Gamma, from the choice of the lag, and s = E_l S.

    Gamma is the h - g^2 of (S3) without the difference, so it is never negative. Additive noise
    leaves s the number it is at the start.
    """

    def __init__(
        self,
        problem: Problem,
        x: Array,
        rng: np.random.Generator,
        retention: float,
        lag_noise: bool,
        two_point: bool,
    ) -> None:
        self.problem, self.rng, self.retention = problem, rng, retention
        self.lag_noise = lag_noise
        self.signs = Signs(x, rng) if two_point else None
        self.gamma = np.zeros_like(x)
        self.s: Array | float
        if problem.additive_noise:
            self.s = float(self._sampling(x[:1])[0, 0])
        else:
            self.s = self._sampling(x).astype(x.dtype)
        self._kick, self._change = np.empty_like(x), np.empty_like(x)

    def draw(self, g: Array, batch: float) -> Array:
        """Return Sigma^{1/2} z with the square root of a variance."""
        kick = self._kick
        np.add(self.gamma, self.s * (1 / batch), out=kick)
        np.sqrt(kick, out=kick)
        if self.signs is not None:
            self.signs.flip(kick)
        else:
            kick *= standard_increments(self._change, self.rng, two_point=False)
        return kick

    def absorb(self, x: Array, g: Array) -> Array:
        """Relax Gamma and s towards their values at x and return the change of g."""
        distance, change = self._kick, self._change
        np.subtract(self.problem.gradient(x), g, out=distance)
        np.multiply(distance, 1 - self.retention, out=change)
        if self.lag_noise:
            distance *= change
            self.gamma += distance
            self.gamma *= self.retention
        if not isinstance(self.s, float):
            _relax(self.s, self._sampling(x).astype(x.dtype), self.retention)
        return change

    def _sampling(self, x: Array) -> Array:
        return self.problem.gradient_covariance(x)[..., 0]


class MatrixNoise:
    """Sigma with (d, d) matrices for each path: H of (S3) in two parts, h and s, and a factor."""

    def __init__(
        self,
        problem: Problem,
        x: Array,
        rng: np.random.Generator,
        retention: float,
        lag_noise: bool,
        two_point: bool,
    ) -> None:
        self.problem, self.rng, self.retention = problem, rng, retention
        self.lag_noise, self.two_point = lag_noise, two_point
        self.h = outer(problem.gradient(x).astype(x.dtype))
        self.s = problem.gradient_covariance(x).astype(x.dtype)
        self._z = np.empty_like(x)

    def draw(self, g: Array, batch: float) -> Array:
        """Return Sigma^{1/2} z with a Cholesky factor."""
        covariance = self.s / batch
        if self.lag_noise:
            covariance += self.h
            covariance -= outer(g)
        z = standard_increments(self._z, self.rng, self.two_point)
        return np.asarray(np.einsum("pij,pj->pi", psd_factor(covariance), z))

    def absorb(self, x: Array, g: Array) -> Array:
        """Relax h and s towards their values at x and return the change of g."""
        gradient = self.problem.gradient(x)
        if self.lag_noise:
            _relax(self.h, outer(gradient), self.retention)
        _relax(self.s, self.problem.gradient_covariance(x).astype(x.dtype), self.retention)
        return _change(gradient, g, self.retention)


class ExplicitNoise:
    """Sigma carried itself, (S4), in two parts: Gamma, from the choice of the lag, and s = E_l S.

        dGamma = -kappa Gamma dt + kappa (grad f(X) + kappa Y)(grad f(X) + kappa Y)^T dt

    where kappa Y = -g. One step is Gamma' = r Gamma + r (1-r) (grad f - g)(grad f - g)^T, which is
    h' - g' g'^T of (S3) exactly.
    """

    def __init__(
        self,
        problem: Problem,
        x: Array,
        rng: np.random.Generator,
        retention: float,
        lag_noise: bool,
    ) -> None:
        self.problem, self.rng, self.retention, self.lag_noise = problem, rng, retention, lag_noise
        self.s = problem.gradient_covariance(x).astype(x.dtype)
        self.gamma = np.zeros_like(self.s)
        self._z = np.empty_like(x)

    def draw(self, g: Array, batch: float) -> Array:
        """Return Sigma^{1/2} z with a Cholesky factor."""
        z = standard_increments(self._z, self.rng, two_point=False)
        factor = psd_factor(self.gamma + self.s / batch)
        return np.asarray(np.einsum("pij,pj->pi", factor, z))

    def absorb(self, x: Array, g: Array) -> Array:
        """Relax Gamma and s towards their values at x and return the change of g."""
        gradient = self.problem.gradient(x)
        if self.lag_noise:
            self.gamma += (1 - self.retention) * outer(gradient - g)
            self.gamma *= self.retention
        _relax(self.s, self.problem.gradient_covariance(x).astype(x.dtype), self.retention)
        return _change(gradient, g, self.retention)


class SnapshotNoise:
    """Sigma without matrices, from a few snapshots kept for each path (ours).

    Each of R slots holds the gradient G and one draw xi ~ N(0, S) of a past point, and takes the
    new point with chance 1 - mu at every step: the age of what it holds is geometric. The noise is

        (1/sqrt(R)) sum_r eps_r (G_r - g + xi_r / sqrt(b)),   eps_r = +-1, fresh for every update

    The fresh signs make updates that use one slot uncorrelated, so one draw for each point is
    enough. Averaged over the slots' coins the covariance is Sigma exactly, and for linear
    gradients the first and second moments of x are those of (S5) exactly. Memory 2 R d a path.
    """

    def __init__(
        self,
        problem: Problem,
        x: Array,
        rng: np.random.Generator,
        retention: float,
        lag_noise: bool,
    ) -> None:
        self.problem, self.rng, self.retention, self.lag_noise = problem, rng, retention, lag_noise
        shape = (len(x), SNAPSHOTS, problem.dim)
        self.gradients = np.empty(shape if lag_noise else (0, 0, 0), x.dtype)
        self.noises = np.empty(shape, x.dtype)
        for slot in range(SNAPSHOTS):
            self.newest, self.noises[:, slot] = problem.gradient_and_noise(x, rng)
        if lag_noise:
            self.gradients[:] = self.newest[:, None, :]

    def draw(self, g: Array, batch: float) -> Array:
        """Return the signed sum over the slots."""
        signs = np.empty((len(g), 1, SNAPSHOTS), g.dtype)
        standard_increments(signs, self.rng, two_point=True)
        signs /= math.sqrt(SNAPSHOTS)
        noise: Array = np.matmul(signs, self.noises)[:, 0]
        noise *= 1 / math.sqrt(batch)
        if self.lag_noise:
            noise += np.matmul(signs, self.gradients)[:, 0]
            noise -= signs.sum(axis=2) * g
        return noise

    def absorb(self, x: Array, g: Array) -> Array:
        """Put x into the slots whose coin says so and return the change of g."""
        self.newest, noise = self.problem.gradient_and_noise(x, self.rng)
        path, slot = np.nonzero(self.rng.random((len(x), SNAPSHOTS)) >= self.retention)
        self.noises[path, slot] = noise[path]
        if self.lag_noise:
            self.gradients[path, slot] = self.newest[path]
        return _change(self.newest, g, self.retention)


def _change(gradient: Array, g: Array, retention: float) -> Array:
    change = gradient - g
    change *= 1 - retention
    return change


def _relax(average: Array, new: Array, retention: float) -> None:
    """Replace an average by retention * average + (1 - retention) * new; overwrites `new`."""
    average *= retention
    new *= 1 - retention
    average += new


def outer(v: Array) -> Array:
    """Return v v^T, shape (..., d, d) for (..., d)."""
    return v[..., :, None] * v[..., None, :]
