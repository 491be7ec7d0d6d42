"""The interface of a problem: f(x) = (1/n) sum_i f_i(x), its gradients and its gradient noise.

A subclass must define `dim`, `n_samples`, `initial_point`, `loss` and `gradient`. All other methods
have general implementations in terms of these; a subclass may override them with faster ones.

Every method is vectorised over leading axes of `x`, written `...` below: a single point is
`(d,)`, an ensemble of paths `(paths, d)`.

A problem has one precision, its `dtype`. A run keeps, sends and saves its parameters in this
precision; the worker converts a gradient of another precision.

Array arguments are valid only during the call: a worker passes read-only views of its receive
buffer, which its gradient and the next snapshot overwrite. A problem must copy an array to keep it.
The caller copies the returned gradient before the next call, so the problem may reuse that memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array as Array
from asgd.arrays import converted
from asgd.errors import InputError
from asgd.streams import stream

Indices = npt.NDArray[np.integer[Any]]

POINTS_AT_ONCE = 16
FEW_SAMPLES = 32  # up to this many samples, one `gradient` call per sample is cheap
MOST_METRICS = 64  # of a problem
_BLOCK_ENTRIES = 1 << 21  # entries of the sample gradients held in memory at once
_RESAMPLED = 256  # batch size of the resampled noise
# The precisions of a problem, and the relative rounding error of a gradient in each.
ROUNDING: dict[np.dtype[Any], float] = {np.dtype(np.float64): 1e-9, np.dtype(np.float32): 1e-4}


class Problem(ABC):
    """A finite sum f = (1/n) sum_i f_i over R^d.

    Attributes
    ----------
    dim
        Number of parameters d.
    n_samples
        Number of samples n.
    additive_noise
        Whether S(x) is known not to depend on x.
    dtype
        Precision of the parameters: float64 or float32.
    start
        x_0 from `problem.initial_from`, shape (d,); None: `initial_point` returns x_0.
    """

    dim: int
    n_samples: int
    additive_noise: bool = False
    dtype: np.dtype[Any] = np.dtype(np.float64)
    start: Array | None = None

    @property
    def points_at_once(self) -> int:
        """Number of points in a call from which on the time per point no longer falls.

        With fewer points, reading the data or the overhead of the call dominates.
        """
        return POINTS_AT_ONCE

    @abstractmethod
    def initial_point(self, rng: np.random.Generator) -> Array:
        """Return x_0, shape (d,)."""

    @abstractmethod
    def loss(self, x: Array) -> Array:
        """Return f(x), shape (...) for x of shape (..., d)."""

    @abstractmethod
    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        """Return the mean gradient over a mini-batch, or grad f(x) without one.

        Parameters
        ----------
        x
            Shape (..., d).
        indices
            Sample numbers in [0, n): shape (b,), the same batch for every point, or (..., b), one
            batch per point. None means all n samples.

        Returns
        -------
        Array
            Shape (..., d).
        """

    @cached_property
    def rounding(self) -> float:
        """Relative rounding error of the gradients, which a trial and a replay tolerate."""
        return ROUNDING[self.dtype]

    @cached_property
    def labels(self) -> Any:
        """Class of each sample, whole numbers of shape (n,); None if samples have no classes.

        Used if `data.shards` divides the samples by their classes.
        """
        return None

    @property
    def gives_sample_gradients(self) -> bool:
        """Whether `sample_gradients` is faster than one call of `gradient` per sample."""
        return type(self).sample_gradients is not Problem.sample_gradients

    @property
    def gives_noise(self) -> bool:
        """Whether `gradient_and_noise` costs less than the gradients of all samples."""
        own = type(self).gradient_and_noise is not Problem.gradient_and_noise
        return own or self.gives_sample_gradients or self.n_samples <= FEW_SAMPLES

    def sample_gradients(self, x: Array) -> Array:
        """Return grad f_i(x) for every sample, shape (..., n, d)."""
        rows = [self.gradient(x, np.array([i])) for i in range(self.n_samples)]
        return np.stack(rows, axis=-2)

    def second_moment(self, x: Array) -> Array:
        """Return V(x) = (1/n) sum_i grad f_i grad f_i^T, shape (..., d, d). For small d."""
        g = self.sample_gradients(x)
        moment: Array = g.swapaxes(-1, -2) @ g
        moment /= self.n_samples
        return moment

    def gradient_covariance(self, x: Array) -> Array:
        """Return S(x) = V(x) - grad f(x) grad f(x)^T, shape (..., d, d). For small d."""
        g = self.gradient(x)
        return self.second_moment(x) - g[..., :, None] * g[..., None, :]

    def gradient_and_noise(self, x: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        """Return grad f(x) and a draw xi of mean 0 and covariance S(x), both of shape (..., d).

        xi = (1/sqrt(n)) sum_i z_i (grad f_i(x) - grad f(x)) with z_i independent N(0, 1). It is
        Gaussian with covariance exactly S(x), and no (d, d) array is formed.

        With more than 32 samples and no fast `sample_gradients`, the noise is resampled instead:
        xi = sqrt(m) (mean gradient of m = 256 samples drawn with replacement - grad f(x)). It has
        the same covariance, is Gaussian up to O(1/sqrt(m)) and costs one more mini-batch.
        """
        if not self.gives_sample_gradients and self.n_samples > FEW_SAMPLES:
            mean = self.gradient(x)
            indices = rng.integers(self.n_samples, size=(*x.shape[:-1], _RESAMPLED))
            return mean, np.sqrt(x.dtype.type(_RESAMPLED)) * (self.gradient(x, indices) - mean)
        points = x.reshape(-1, self.dim)
        mean, noise = np.empty(points.shape, x.dtype), np.empty(points.shape, x.dtype)
        size = max(1, _BLOCK_ENTRIES // (self.n_samples * self.dim))
        for block in (slice(i, i + size) for i in range(0, len(points), size)):
            g = self.sample_gradients(points[block])
            z = rng.standard_normal(g.shape[:-1], dtype=g.dtype.type)
            z -= z.mean(axis=-1, keepdims=True)  # equivalent to centring g, and cheaper
            mean[block], noise[block] = g.mean(axis=-2), (z[..., None, :] @ g)[..., 0, :]
        noise /= np.sqrt(x.dtype.type(self.n_samples))
        return mean.reshape(x.shape), noise.reshape(x.shape)

    def hessian_vector(self, x: Array, v: Array) -> Array:
        """Return the product of the Hessian of f at x with v, shape (..., d).

        x has shape (d,), shared by every v, or the shape of v, (..., d). The general
        implementation is a central difference of the gradient.
        """
        return self._difference(x, v, None)

    def hessian_vector_of_batch(self, x: Array, v: Array, indices: Indices) -> Array:
        """Return the product of the Hessian of the mean loss of samples (b,) at x with v, (d,).

        x and v have shape (d,). The general implementation is a central difference of the gradient.
        """
        return self._difference(x, v, indices)

    def _difference(self, x: Array, v: Array, indices: Indices | None) -> Array:
        scale = np.maximum(1.0, np.abs(x).max(axis=-1, keepdims=True))
        step = np.cbrt(max(np.finfo(dtype).eps for dtype in (x.dtype, self.dtype))) * scale
        norm = np.linalg.norm(v, axis=-1, keepdims=True)
        unit = v / np.where(norm > 0, norm, 1.0)
        first = np.array(self.gradient(x + step * unit, indices))
        change = first - self.gradient(x - step * unit, indices)
        return np.asarray(norm * change / (2 * step))

    def hessian(self, x: Array) -> Array:
        """Return the Hessian of f at one point x of shape (d,), shape (d, d). For small d."""
        rows = self.hessian_vector(x, np.eye(self.dim))
        return (rows + rows.T) / 2

    def in_one_thread(self) -> AbstractContextManager[object]:
        """Return a context in which calls from this thread use one processor, if possible.

        The caller runs as many threads as there are processors.
        """
        return nullcontext()

    def metrics(self, x: Array) -> dict[str, float]:
        """Return quantities by name, such as a test accuracy, at one point x of shape (d,).

        They are recorded beside the loss. The general implementation returns none.
        """
        return {}

    def named_arrays(self, x: Array) -> dict[str, Array]:
        """Return the parameters x, shape (d,), as named arrays for a file."""
        return {"parameters": x}

    def flatten(self, arrays: Mapping[str, Array]) -> Array:
        """Return the vector (d,) of named arrays; the inverse of `named_arrays`.

        Raises
        ------
        KeyError
            An array is missing.
        """
        return np.ravel(arrays["parameters"])


def starting_point(problem: Problem, seed: int) -> Array:
    """Return x_0 for a seed, shape (d,), as a new array; runs and models start here."""
    start = problem.start
    if start is None:
        start = problem.initial_point(stream(seed, "initial"))
    return np.array(converted(np.asarray(start), problem.dtype))


def precision(value: Any, where: str) -> np.dtype[Any]:
    """Return the precision of a problem from a NumPy, JAX or PyTorch type or its name.

    Raises
    ------
    InputError
        It is neither float64 nor float32.
    """
    try:
        found = np.dtype(str(value)[6:] if str(value).startswith("torch.") else value)
    except TypeError:
        pass
    else:
        if found in ROUNDING:
            return found
    raise InputError(f"{where} = {value!r}: expected float64 or float32")


def gradient_of_batch(problem: Problem, x: Array, indices: Indices) -> Array:
    """Return the gradient at one point (d,), in the precision of the point, as a worker sends it.

    If the problem computes in a higher precision, overflows become infinite.
    """
    return converted(np.asarray(problem.gradient(x, indices)), x.dtype)
