"""A loss in JAX as a problem."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from asgd.arrays import Array
from asgd.errors import InputError, message_of
from asgd.problems.base import Indices
from asgd.problems.networks.base import Network, as_arrays, labels_of, seed_of

try:
    import jax
    import jax.numpy as jnp
    from jax.flatten_util import ravel_pytree
except ImportError as error:
    raise InputError(f"JaxProblem: {error}; pip install '.[jax]' brings JAX") from error


_LARGE_DIM = 30_000  # parameters from which on one call per point is faster


class JaxProblem(Network):
    """A loss, the pytree of its parameters and its data.

        def make():
            parameters = {"w": np.zeros((64, 10)), "b": np.zeros(10)}
            return JaxProblem(loss, parameters, (images, labels))

    Parameters
    ----------
    loss
        loss(parameters, *arrays), the mean over the batch. JAX compiles it.
    parameters
        A pytree, the start of every run; or a function of a key that returns one: then the start
        depends on the run's seed.
    data
        Arrays with the samples along the first axis. Floats are converted to the type of the
        parameters.
    weight_decay
        Adds weight_decay |x|^2 / 2 to the loss.
    random
        Whether the loss draws random numbers: it is called loss(parameters, *arrays, key=key);
        with key=None it must draw none.
    metrics
        metrics(parameters) returns numbers by name, such as the accuracy on held-out data.
    dtype
        Of the parameters of a run, "float32" or "float64"; by default that of the pytree. With
        "float64" they are kept, updated, sent and saved in double precision, while a pytree in
        float32 computes its gradients in single precision.

    Raises
    ------
    InputError
        JAX is missing, the parameters differ in type, the loss is not a mean over the batch, or
        JAX cannot trace it for several points at once.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        parameters: Any,
        data: Any,
        *,
        weight_decay: float = 0.0,
        random: bool = False,
        metrics: Callable[[Any], Mapping[str, float]] | None = None,
        dtype: str | None = None,
    ) -> None:
        self._make = parameters if callable(parameters) else None
        tree = parameters(jax.random.key(0)) if callable(parameters) else parameters
        kinds = {str(jnp.asarray(leaf).dtype) for leaf in jax.tree.leaves(tree)}
        if len(kinds) != 1 or not kinds <= {"float32", "float64"}:
            found = ", ".join(sorted(kinds)) or "no arrays"
            raise InputError(f"parameters = {found}: expected all float32 or all float64")
        self._tree = tree
        self._start, self._unravel = ravel_pytree(tree)
        self.dim = self._start.size
        self._note_precision(np.dtype(self._start.dtype), dtype, jax.default_backend() != "cpu")
        # On a CPU, XLA is slow at products with different weights for each point.
        self.one_by_one = jax.default_backend() == "cpu" and self.dim >= _LARGE_DIM
        self._data = tuple(_like(array, self._start.dtype) for array in as_arrays(data))
        super().__init__(len(self._data[0]), weight_decay, random, metrics)
        self._loss_function = loss
        self._compile()
        self._refuse_untraceable()
        self._refuse_a_sum()

    def _compile(self) -> None:
        def deterministic(x: Any, batch: Any) -> Any:
            tree = self._unravel(x)
            return self._loss_function(tree, *batch, **({"key": None} if self.random else {}))

        def drawn(x: Any, batch: Any, seed: Any) -> Any:
            return self._loss_function(self._unravel(x), *batch, key=jax.random.key(seed))

        def of_sample(x: Any, sample: Any) -> Any:
            return jax.grad(deterministic)(x, tuple(part[None] for part in sample))

        shared, own = (0, None), (0, 0)
        self._deterministic_slope = jax.jit(jax.grad(deterministic))
        self._value = jax.jit(jax.vmap(deterministic, in_axes=shared))
        self._slope = jax.jit(jax.grad(drawn if self.random else deterministic))
        self._slopes_shared = jax.jit(jax.vmap(jax.grad(deterministic), in_axes=shared))
        self._slopes_own = jax.jit(jax.vmap(jax.grad(deterministic), in_axes=own))
        self._slopes_of_samples = jax.jit(jax.vmap(of_sample, in_axes=(None, 0)))
        self._deterministic = deterministic

    @cached_property
    def _product(self) -> Any:
        """The function for Hessian-vector products, one vector per point, for one batch."""

        def forward(x: Any, v: Any, batch: Any) -> Any:
            return jax.jvp(lambda y: jax.grad(self._deterministic)(y, batch), (x,), (v,))[1]

        def backward(x: Any, v: Any, batch: Any) -> Any:
            return jax.grad(lambda y: jnp.vdot(jax.grad(self._deterministic)(y, batch), v))(x)

        faster, other = (jax.jit(jax.vmap(f, in_axes=(0, 0, None))) for f in (forward, backward))
        points = np.zeros((1, self.dim), self._model_dtype)
        arguments = points, points, self._batch(np.zeros(1, dtype=np.int64))
        try:
            jax.eval_shape(faster, *arguments)
        except (TypeError, ValueError):  # a custom gradient, or a callback
            self._trace(other, *arguments)
            return other
        return faster

    def _refuse_untraceable(self) -> None:
        """Refuse a loss that JAX cannot trace for several points at once; nothing is compiled.

        Raises
        ------
        InputError
            It branches on values, calls NumPy with parameters, or has no number or no gradient.
        """
        points = np.zeros((2, self.dim), self._model_dtype)
        numbers = np.zeros((2, 1), dtype=np.int64)
        shared = self._batch(numbers[0])
        shape = self._trace(self._value, points, shared)[1:]
        if shape:
            raise InputError(f"loss has the shape {shape}: expected a number, shape ()")
        self._trace(self._slopes_own, points, self._batch(numbers))
        if self.random:
            self._trace(self._slope, points[0], shared, np.uint32(0))

    def _trace(self, function: Any, *arguments: Any) -> tuple[int, ...]:
        """Return the shape of a function's result; refuse a loss that JAX cannot trace."""
        try:
            shape: tuple[int, ...] = jax.eval_shape(function, *arguments).shape
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
            raise InputError(
                f"loss{_line(self._loss_function, error)}: JAX cannot trace it "
                f"({type(error).__name__}): expected jax.numpy functions of parameters and arrays, "
                "with jnp.where or jax.lax.cond in place of branches on their values"
            ) from error
        # JAX has no rule for a function, shapes do not fit, or the loss itself raises.
        except (NotImplementedError, TypeError, ValueError) as error:
            raise InputError(
                f"loss{_line(self._loss_function, error)}: no value or no gradient of it for "
                f"several points ({message_of(error)}): expected functions that jax.vmap and "
                "jax.grad take"
            ) from error
        return shape

    @cached_property
    def labels(self) -> Any:
        """Return the last array of the data, if it has a whole number per sample."""
        return labels_of(self._data)

    def initial_point(self, rng: np.random.Generator) -> Array:
        """Return x_0, shape (d,): the parameters given, or those made from the seed."""
        if self._make is None:
            return np.asarray(self._start)
        tree = self._make(jax.random.key(int(rng.integers(2**32))))
        return np.asarray(ravel_pytree(tree)[0])

    def unflatten(self, x: Array) -> Any:
        """Return the pytree of the parameters x, shape (d,)."""
        return self._unravel(jnp.asarray(x, dtype=self._model_dtype))

    def named_arrays(self, x: Array) -> dict[str, Array]:
        """Return the leaves of the pytree of x by their paths, such as "layers/0/w"."""
        leaves = jax.tree_util.tree_leaves_with_path(self.unflatten(x))
        return {_name(path): np.asarray(leaf) for path, leaf in leaves}

    def flatten(self, arrays: Mapping[str, Array]) -> Array:
        """Return the vector (d,) of named leaves."""
        paths = jax.tree_util.tree_leaves_with_path(self._tree)
        return np.concatenate([np.ravel(arrays[_name(path)]) for path, _ in paths]).astype(
            self._model_dtype
        )

    def _batch(self, indices: Indices) -> tuple[Any, ...]:
        return tuple(array[indices] for array in self._data)

    def _losses(self, points: Array, indices: Indices) -> Array:
        if self.one_by_one:
            batch = self._batch(indices)
            return np.array([self._value(point[None], batch)[0] for point in points], dtype=float)
        return np.asarray(self._value(points, self._batch(indices)), dtype=float)

    def _gradient_of_batch(self, x: Array, indices: Indices) -> Array:
        seed = (np.uint32(seed_of(indices) & 0xFFFFFFFF),) if self.random else ()
        return np.array(self._slope(x, self._batch(indices), *seed))

    def _gradients(self, points: Array, indices: Indices) -> Array:
        if self.one_by_one:
            batches = np.broadcast_to(indices, (len(points), indices.shape[-1]))
            rows = zip(points, map(self._batch, batches), strict=True)
            return np.stack([self._deterministic_slope(point, batch) for point, batch in rows])
        slopes = self._slopes_shared if indices.ndim == 1 else self._slopes_own
        return np.array(slopes(points, self._batch(indices)))

    def _sample_gradients(self, x: Array, indices: Indices) -> Array:
        return np.asarray(self._slopes_of_samples(x, self._batch(indices)))

    def _hessian_vectors(self, points: Array, vectors: Array, indices: Indices) -> Array:
        return np.asarray(self._product(points, vectors, self._batch(indices)))


def _line(loss: Any, error: BaseException) -> str:
    """Return the line of the loss where an exception arose, " in line 12 of mine.py"."""
    code = getattr(inspect.unwrap(loss), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if code and frame.filename == code.co_filename]
    return f" in line {own[-1]} of {Path(code.co_filename).name}" if own and code else ""


def _like(array: Any, dtype: Any) -> Any:
    """Return an array of the host, floats in the type of the parameters."""
    array = np.asarray(array)
    return array.astype(dtype) if np.issubdtype(array.dtype, np.floating) else array


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "parameters"
