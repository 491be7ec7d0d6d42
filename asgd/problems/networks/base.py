"""What the adapters share: points as vectors, blocks of samples, weight decay, random losses.

An adapter gives the mean loss of a batch and its derivatives for a few points; this class gives
them for any leading axes, over all samples, in blocks that fit the memory.
"""

from __future__ import annotations

import hashlib
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array
from asgd.errors import InputError
from asgd.problems.base import ROUNDING, Indices, Problem, precision

_BLOCK_ENTRIES = 1 << 24  # entries of the points, or of the sample gradients, in one call
_BLOCK_SAMPLES = 1024  # samples in one call, where all of them are needed
_CALL_ENTRIES = 1 << 19  # entries of the points from which on the overhead of a call is small


class Network(Problem):
    """A problem whose loss and derivatives a framework computes.

    f(x) = (1/n) sum_i loss_i(x) + weight_decay |x|^2 / 2. Arrays are NumPy's. They may have any
    precision; those that are returned have that of the model.

    A random loss (dropout, augmentation) is seeded by the sample numbers of its batch. They come
    from the run's stream "batch", so a run, its replay and its resumption draw the same numbers.
    Equal batches draw equal numbers; in particular, a batch of one sample always draws the same.
    The loss f and its derivatives over all samples are computed without randomness.

    Attributes
    ----------
    dtype
        Precision of the parameters of a run: the model's, unless another one was asked for.
    rounding
        Relative rounding error: 1e-9 in double precision, 1e-4 in single, 1e-2 in single on
        accelerators, which multiply with ten bits.
    weight_decay
        Factor of |x|^2 / 2.
    random
        Whether the loss of a batch draws random numbers.
    one_by_one
        Whether one call per point is faster than one call for several points.
    """

    one_by_one: bool = False

    def __init__(
        self,
        n_samples: int,
        weight_decay: float,
        random: bool,
        metrics: Callable[[Any], Mapping[str, float]] | None,
    ) -> None:
        if not (np.isfinite(weight_decay) and weight_decay >= 0):
            raise InputError(f"weight_decay = {weight_decay!r}: expected a number >= 0")
        self.n_samples = n_samples
        self.weight_decay = float(weight_decay)
        self.random = random
        self._metrics = metrics
        # Protects the module, random generators and user code that threads share.
        self._lock = threading.RLock()

    @property
    def takes_points(self) -> bool:
        """Whether the framework can take several points in one call."""
        return True

    @property
    def points_at_once(self) -> int:
        """Number of points in a call from which on the time per point no longer falls."""
        if self.one_by_one or not self.takes_points:
            return 1
        return max(1, min(64, _CALL_ENTRIES // self.dim))

    def _note_precision(
        self, model: np.dtype[Any], asked: npt.DTypeLike | None, accelerated: bool
    ) -> None:
        self._model_dtype = model
        self.dtype = model if asked is None else precision(asked, "dtype")
        self.rounding = max(ROUNDING[model], ROUNDING[self.dtype])
        if accelerated and model == np.float32:
            self.rounding = 1e-2

    @abstractmethod
    def unflatten(self, x: Array) -> Any:
        """Return the parameters x, shape (d,), in the framework's own form."""

    @abstractmethod
    def _losses(self, points: Array, indices: Indices) -> Array:
        """Return the loss of one batch (b,) at points (k, d), shape (k,)."""

    @abstractmethod
    def _gradients(self, points: Array, indices: Indices) -> Array:
        """Return gradients at points (k, d) of one batch (b,), or of one each (k, b)."""

    @abstractmethod
    def _gradient_of_batch(self, x: Array, indices: Indices) -> Array:
        """Return a worker's gradient: at one point (d,), of one batch (b,), with randomness."""

    @abstractmethod
    def _sample_gradients(self, x: Array, indices: Indices) -> Array:
        """Return the gradient of each of the samples (m,) at one point (d,), shape (m, d)."""

    @abstractmethod
    def _hessian_vectors(self, points: Array, vectors: Array, indices: Indices) -> Array:
        """Return the Hessians of the loss of one batch at points (k, d) times vectors (k, d)."""

    def load(self, x: Array) -> Any:
        """Return `unflatten(x)`, but valid only until the next call of a method."""
        return self.unflatten(x)

    def metrics(self, x: Array) -> dict[str, float]:
        """Return the user's metrics at x of shape (d,); none if none were given."""
        if self._metrics is None:
            return {}
        with self._lock:
            values = self._metrics(self.load(x))
        return {name: float(value) for name, value in values.items()}

    def loss(self, x: Array) -> Array:
        """Return f(x), shape (...), without randomness."""
        points = self._points(x)
        values = self._over_samples(partial(self._losses, points), np.zeros(len(points)))
        square = np.einsum("kd,kd->k", points, points, dtype=float)
        values += self.weight_decay / 2 * square
        return values.reshape(x.shape[:-1])[()]

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        """Return the mean gradient over a mini-batch, or grad f(x), shape (..., d)."""
        if indices is not None and x.ndim == indices.ndim == 1:
            with self._lock:
                gradients = self._gradient_of_batch(
                    x.astype(self._model_dtype, copy=False), indices
                )
        else:
            gradients = self._gradients_of_points(x, indices)
        if self.weight_decay:
            gradients += self._model_dtype.type(self.weight_decay) * x.astype(
                self._model_dtype, copy=False
            )
        return gradients

    def _gradients_of_points(self, x: Array, indices: Indices | None) -> Array:
        batches = () if indices is None else indices.shape[:-1]
        lead = np.broadcast_shapes(x.shape[:-1], batches)
        points = self._points(x if x.shape[:-1] == lead else np.broadcast_to(x, (*lead, self.dim)))
        own = None
        if indices is not None and (indices.ndim > 1 or self.random):
            own = np.broadcast_to(indices, (*lead, indices.shape[-1])).reshape(len(points), -1)
        parts = [
            self._gradients_of_block(points[block], indices if own is None else own[block])
            for block in _blocks(len(points), _BLOCK_ENTRIES // self.dim)
        ]
        gradients = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return gradients.reshape(*lead, self.dim)

    def _gradients_of_block(self, points: Array, indices: Indices | None) -> Array:
        """Return gradients at points (k, d) of one batch (b,), of one each (k, b), or of all."""
        if indices is None:
            return self._over_samples(partial(self._gradients, points), np.zeros_like(points))
        if not self.random:
            return self._gradients(points, indices)
        with self._lock:  # a seed for each batch
            rows = zip(points, indices, strict=True)
            return np.stack([self._gradient_of_batch(*row) for row in rows])

    @property
    def gives_sample_gradients(self) -> bool:
        """False: the gradients of all samples cost more than one of a mini-batch."""
        return False

    def sample_gradients(self, x: Array) -> Array:
        """Return grad f_i(x) for every sample, shape (..., n, d), without randomness."""
        points = self._points(x)
        gradients = np.empty((len(points), self.n_samples, self.dim), self._model_dtype)
        for row, point in enumerate(points):
            for block in _blocks(self.n_samples, _BLOCK_ENTRIES // self.dim):
                numbers = np.arange(block.start, block.stop)
                gradients[row, block] = self._sample_gradients(point, numbers)
        gradients += self._model_dtype.type(self.weight_decay) * points[:, None]
        return gradients.reshape(*x.shape[:-1], self.n_samples, self.dim)

    def hessian_vector(self, x: Array, v: Array) -> Array:
        """Return the product of the Hessian of f at x with v, shape (..., d); exact."""
        vectors = self._points(v)
        points = self._points(np.broadcast_to(x, v.shape))
        products = np.zeros(vectors.shape, self._model_dtype)
        for block in _blocks(len(points), _BLOCK_ENTRIES // self.dim):
            at = partial(self._hessian_vectors, points[block], vectors[block])
            self._over_samples(at, products[block])
        products += self._model_dtype.type(self.weight_decay) * vectors
        return products.reshape(v.shape)

    def hessian_vector_of_batch(self, x: Array, v: Array, indices: Indices) -> Array:
        """Return the product of the Hessian of the mean loss of samples (b,) at x with v; exact."""
        at = partial(self._hessian_vectors, self._points(x), self._points(v))
        products = self._over_samples(at, np.zeros((1, self.dim), self._model_dtype), indices)
        products += self._model_dtype.type(self.weight_decay) * self._points(v)
        return products.reshape(self.dim)

    def _points(self, x: Array) -> Array:
        return np.ascontiguousarray(x.reshape(-1, self.dim), dtype=self._model_dtype)

    def _over_samples(
        self, of_batch: Callable[[Indices], Array], total: Array, samples: Indices | None = None
    ) -> Array:
        """Add the mean over samples (all, by default) of a function of a batch to `total`."""
        samples = np.arange(self.n_samples) if samples is None else samples
        for block in _blocks(len(samples), _BLOCK_SAMPLES):
            numbers = samples[block]
            total += of_batch(numbers) * total.dtype.type(len(numbers) / len(samples))
        return total

    def _refuse_a_sum(self) -> None:
        """Refuse a loss that is not a mean over the batch.

        Raises
        ------
        InputError
            A sample taken twice has another loss than taken once.
        """
        x = self.initial_point(np.random.default_rng(0))[None].astype(self._model_dtype)
        once, twice = (self._losses(x, np.zeros(m, dtype=np.int64))[0] for m in (1, 2))
        if not np.isclose(once, twice, rtol=1e-3, atol=1e-6):
            raise InputError(
                f"loss of one sample is {once:.6g}, of the same sample twice {twice:.6g}: expected "
                "the mean over the batch (a sum, or a layer that mixes the samples of a batch?)"
            )


def seed_of(indices: Indices) -> int:
    """Return the seed of a random loss: a 63-bit digest of the sample numbers of its batch."""
    numbers = np.ascontiguousarray(indices, dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(numbers, digest_size=8).digest(), "little") >> 1


def as_arrays(data: Any) -> tuple[npt.NDArray[Any], ...]:
    """Return the arrays of a data set; check that all have the same number of samples.

    Raises
    ------
    InputError
        The numbers differ or are 0, or there is no array.
    """
    arrays = tuple(data) if isinstance(data, tuple | list) else (data,)
    lengths = {len(array) for array in arrays if getattr(array, "ndim", 0) > 0}
    if len(lengths) != 1 or not min(lengths) or any(a.ndim == 0 for a in arrays):
        shapes = ", ".join(str(tuple(getattr(a, "shape", ()))) for a in arrays) or "none"
        raise InputError(
            f"data = arrays of shapes {shapes}: expected a tuple of arrays with the samples along "
            "their first axis, as many in each"
        )
    return arrays


def labels_of(arrays: tuple[Any, ...]) -> Any:
    """Return the labels in a data set: its last array, if that has a whole number per sample."""
    last = np.asarray(arrays[-1])
    return last if last.ndim == 1 and last.dtype.kind in "iub" else None


def _blocks(length: int, size: int) -> Iterator[slice]:
    """Cut range(length) into slices of at most `size`, at least 1."""
    size = max(1, size)
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
