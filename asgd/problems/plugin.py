"""Problems defined by the user, named "package.module:factory" in the configuration.

The factory is called with the entries of `problem.options` and returns an object with

    dim, n_samples            integers
    initial_point(rng)        x_0, shape (d,)
    loss(x)                   f(x), a number, for x of shape (d,)
    gradient(x, indices)      mean gradient over the samples `indices`, shape (d,)

and optionally `dtype`, the precision of the parameters (float64, or "float32"), `labels`, the class
of each sample, whole numbers of shape (n,), `sample_gradients(x)` of shape (n, d),
`gradient_noise(x, rng)` of shape (d,) with covariance S(x), `hessian(x)` of shape (d, d), and
`metrics(x)`, numbers by name. Floats of any size, including bfloat16, in arrays or lists, are
converted to that precision; an overflow is reported. If `indices` has a default value, the full
gradient is `gradient(x)`, otherwise `gradient(x, all sample numbers)`.

Methods are called with one point at a time. If a trial shows that `loss` and `gradient` treat an
array of points (k, d) row by row, they get whole ensembles. An object that inherits from
`asgd.Problem` is used unchanged; the trial checks that it keeps the contract of the class.

`asgd.user_code` tells which functions and classes may be called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, cast

import numpy as np

from asgd.arrays import Array, converted
from asgd.errors import InputError, message_of
from asgd.problems.base import (
    FEW_SAMPLES,
    MOST_METRICS,
    ROUNDING,
    Indices,
    Problem,
    precision,
)
from asgd.problems.networks.base import Network
from asgd.streams import stream
from asgd.user_code import call_user, check_options, import_named

_METHODS = ("initial_point", "loss", "gradient")
_REQUIRED = ("dim", "n_samples", *_METHODS)
_TRIAL_BATCH = 3
_LARGEST_HESSIAN = 1000  # rows; a larger Hessian is not formed for a check
_SPACING = {"bfloat16": 2.0**-7, "float16": 2.0**-10}  # relative spacing of short floats


def load_plugin(kind: str, options: Mapping[str, Any], *, tried: bool = False) -> Problem:
    """Import a factory, call it, check its problem and return it.

    Parameters
    ----------
    kind
        "package.module:factory"; modules in the current directory can be imported.
    options
        Keyword arguments of the factory.
    tried
        Whether to skip the trial of the methods; points are then passed one by one.

    Raises
    ------
    InputError
        The module cannot be imported, the factory is missing or raises, or its result is not a
        problem: a member is missing, or has the wrong shape or type.
    """
    where = f"problem.kind = {kind!r}"
    factory = import_named(kind, where, "factory", _METHODS)
    check_options(where, "problem.options", factory, options)
    user = call_user(where, "factory", lambda: factory(**options))
    missing = call_user(where, "problem", lambda: [m for m in _REQUIRED if not hasattr(user, m)])
    if missing:
        raise InputError(
            f"{where}: {type(user).__name__} has no {', '.join(missing)}: "
            f"expected {', '.join(_REQUIRED)}"
        )
    for name in ("dim", "n_samples"):
        value = getattr(user, name)
        if not isinstance(value, int | np.integer) or value < 1:
            raise InputError(f"{where}: {name} = {value!r}: expected an integer >= 1")
    dtype = precision(getattr(user, "dtype", Problem.dtype), f"{where}: dtype")
    if isinstance(user, Problem) and user.dtype is not dtype:
        try:
            user.dtype = dtype
        except AttributeError:  # frozen, or a property
            raise InputError(
                f"{where}: dtype = {user.dtype!r}: expected numpy.dtype('{dtype}')"
            ) from None
    if tried:
        return user if isinstance(user, Problem) else PluginProblem(user, dtype, rowwise=False)
    trial = _Trial(where, user, dtype)
    if isinstance(user, Network):
        return user  # our code handles arrays of points; a trial would import slow modules
    if isinstance(user, Problem):
        with user.in_one_thread():  # small operations are slower on several threads
            trial.check_contract()
        return user
    trial.check_optional()
    return PluginProblem(user, dtype, rowwise=trial.is_rowwise())


class PluginProblem(Problem):
    """Adapts an object whose methods take single points to `Problem`.

    Parameters
    ----------
    user
        The object.
    dtype
        Precision of the parameters.
    rowwise
        Whether its `loss` and `gradient` treat arrays of points (k, d) row by row.
    """

    def __init__(self, user: Any, dtype: np.dtype[Any], rowwise: bool) -> None:
        self._user = user
        self.dtype = dtype
        self._rowwise = rowwise
        self.dim = int(user.dim)
        self.n_samples = int(user.n_samples)

    @cached_property
    def labels(self) -> Any:
        """Return the labels of the user's object, None if it has none."""
        return getattr(self._user, "labels", None)

    def initial_point(self, rng: np.random.Generator) -> Array:
        """Return x_0, shape (d,)."""
        start = self._array("initial_point", self._user.initial_point(rng))
        return np.array(converted(start, self.dtype))

    def loss(self, x: Array) -> Array:
        """Return f(x), shape (...), in float64."""
        return self._map("loss", self._user.loss, x, self._rowwise, np.dtype(float))

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        """Return the mean gradient over a mini-batch, or grad f(x), shape (..., d)."""
        if indices is None:
            return self._map("gradient", _full_gradient(self._user), x, self._rowwise)
        if indices.ndim == 1:
            of_batch = lambda p: self._user.gradient(p, indices)  # noqa: E731
            return self._map("gradient", of_batch, x, self._rowwise)
        lead = np.broadcast_shapes(x.shape[:-1], indices.shape[:-1])
        points = np.broadcast_to(x, (*lead, self.dim)).reshape(-1, self.dim)
        batches = np.broadcast_to(indices, (*lead, indices.shape[-1])).reshape(len(points), -1)
        rows = [
            self._array("gradient", self._user.gradient(p, i))
            for p, i in zip(self._own(points), batches, strict=True)
        ]
        return converted(np.array(rows), x.dtype).reshape(*lead, self.dim)

    @property
    def gives_sample_gradients(self) -> bool:
        """Whether the user's object has `sample_gradients`."""
        return hasattr(self._user, "sample_gradients")

    @property
    def gives_noise(self) -> bool:
        """Whether the object has `gradient_noise` or `sample_gradients`, or few samples."""
        own = hasattr(self._user, "gradient_noise") or self.gives_sample_gradients
        return own or self.n_samples <= FEW_SAMPLES

    def sample_gradients(self, x: Array) -> Array:
        """Return grad f_i(x) for every sample, shape (..., n, d)."""
        if not self.gives_sample_gradients:
            return super().sample_gradients(x)
        return self._map("sample_gradients", self._user.sample_gradients, x)

    def gradient_and_noise(self, x: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        """Return grad f(x) and noise of covariance S(x), from `gradient_noise` if defined."""
        if hasattr(self._user, "gradient_noise"):
            draw = lambda p: self._user.gradient_noise(p, rng)  # noqa: E731
            return self.gradient(x), self._map("gradient_noise", draw, x)
        return super().gradient_and_noise(x, rng)

    def hessian(self, x: Array) -> Array:
        """Return the Hessian of f at x, shape (..., d, d), from `hessian` if defined."""
        if not hasattr(self._user, "hessian"):
            return super().hessian(x)
        return self._map("hessian", self._user.hessian, x)

    def metrics(self, x: Array) -> dict[str, float]:
        """Return the object's `metrics`, none if it has no such method."""
        if not hasattr(self._user, "metrics"):
            return {}
        return {name: float(value) for name, value in self._user.metrics(self._own(x)).items()}

    def _map(
        self,
        name: str,
        function: Callable[[Array], Any],
        x: Array,
        rowwise: bool = False,
        dtype: np.dtype[Any] | None = None,
    ) -> Array:
        """Apply a method to all points of x, one by one unless `rowwise`.

        The result has a given dtype, else that of x.
        """
        dtype, x = dtype or x.dtype, self._own(x)
        if x.ndim == 1:
            return converted(self._array(name, function(x)), dtype)[()]
        points = x.reshape(-1, self.dim)
        if rowwise:
            result = converted(self._array(name, function(points)), dtype)
        else:
            rows = [self._array(name, function(point)) for point in points]
            result = converted(np.asarray(rows), dtype)
        return result.reshape((*x.shape[:-1], *result.shape[1:]))[()]

    def _own(self, x: Array) -> Array:
        """Return points in the precision of the problem, if theirs is higher."""
        return x.astype(self.dtype) if x.itemsize > self.dtype.itemsize else x

    def _array(self, method: str, returned: Any) -> Array:
        return _as_array(f"{type(self._user).__name__}.{method}", returned)


class _Trial:
    """Calls every method of a user's problem once and checks the results."""

    def __init__(self, where: str, user: Any, dtype: np.dtype[Any]) -> None:
        self.where = where
        self.user = user
        self.dtype = dtype
        self.rounding = user.rounding if isinstance(user, Problem) else ROUNDING[dtype]
        self.spacing = 0.0  # relative spacing of the returned floats, if of a short type
        self.dim, n = int(user.dim), int(user.n_samples)
        rng = stream(0, "plugin")
        start = self._array("initial_point(rng)", lambda: user.initial_point(rng), (self.dim,))
        self.x = np.array(start, dtype)
        self.x.flags.writeable = False  # like a worker's snapshot
        self.indices = rng.integers(n, size=_TRIAL_BATCH)
        self.points = (self.x + 0.1 * rng.standard_normal((4, self.dim))).astype(dtype)
        self._array("loss(x)", lambda: user.loss(self.x), ())
        self.full = self._array("gradient(x)", lambda: _full_gradient(user)(self.x), (self.dim,))
        batch = lambda: user.gradient(self.x, self.indices)  # noqa: E731
        self._array("gradient(x, indices)", batch, (self.dim,))
        self._check_metrics()

    def check_optional(self) -> None:
        """Refuse optional methods with a wrong shape or values that contradict the gradient."""
        user, d, rng = self.user, self.dim, stream(1, "plugin")
        if hasattr(user, "hessian") and d <= _LARGEST_HESSIAN:
            self._array("hessian(x)", lambda: user.hessian(self.x), (d, d))
        if hasattr(user, "gradient_noise"):
            self._array("gradient_noise(x, rng)", lambda: user.gradient_noise(self.x, rng), (d,))
        if hasattr(user, "sample_gradients"):
            shape = (int(user.n_samples), d)
            rows = self._array("sample_gradients(x)", lambda: user.sample_gradients(self.x), shape)
            off = np.abs(rows.mean(axis=0, dtype=float) - self.full)
            spacing = max(self.spacing, self.rounding)
            near = 1e-5 * np.abs(self.full) + spacing * np.abs(rows).max(axis=0) + 1e-7
            if np.any(off > near):
                raise InputError(
                    f"{self.where}: the mean of sample_gradients(x) over the samples is not "
                    "gradient(x)"
                )

    def _check_metrics(self) -> None:
        """Refuse metrics that are not a few numbers by name."""
        if not hasattr(self.user, "metrics"):
            return
        where = f"{self.where}: metrics(x)"
        found = call_user(self.where, "metrics(x)", lambda: self.user.metrics(self.x))
        if not isinstance(found, Mapping):
            raise InputError(f"{where} returned {_kind(found)}: expected numbers by name")
        if len(found) > MOST_METRICS:
            raise InputError(f"{where} has {len(found)} entries: expected at most {MOST_METRICS}")
        for name, value in found.items():
            if not isinstance(name, str) or not name.isprintable() or not name:
                raise InputError(f"{where} has the name {name!r}: expected printable text")
            try:
                float(value)
            except (TypeError, ValueError, RuntimeError):
                raise InputError(f"{where}: {name} is {_kind(value)}: expected a number") from None

    def is_rowwise(self) -> bool:
        """Whether loss and gradient treat points of shape (4, d) row by row."""
        calls = (
            self.user.loss,
            _full_gradient(self.user),
            lambda x: self.user.gradient(x, self.indices),
        )
        return all(self._same_by_row(call) for call in calls)

    def check_contract(self) -> None:
        """Refuse a subclass of Problem that is not vectorised over leading axes."""
        user = self.user
        own = np.stack([np.roll(self.indices, shift) for shift in range(4)])[:, :2]
        rows = np.array([user.gradient(p, i) for p, i in zip(self.points, own, strict=True)])
        ok = self._same_by_row(user.loss) and self._same_by_row(user.gradient)
        if not ok or not _agree(lambda: user.gradient(self.points, own), rows, self.rounding):
            raise InputError(
                f"{self.where}: loss or gradient of points (4, {self.dim}) differs from the points "
                "one by one: expected a subclass of Problem to be vectorised over leading axes; "
                "any other class need not be"
            )

    def _same_by_row(self, function: Callable[[Array], Any]) -> bool:
        name = "loss or gradient near the initial point"
        where = f"{self.where}: {name}"
        calls = [partial(function, point) for point in self.points]
        rows = [_as_array(where, call_user(self.where, name, call)) for call in calls]
        return _agree(lambda: function(self.points), np.array(rows), self.rounding)

    def _array(self, name: str, call: Callable[[], Any], shape: tuple[int, ...]) -> Array:
        where = f"{self.where}: {name}"
        expected = "a number" if shape == () else f"shape {shape}"
        returned = call_user(self.where, name, call)
        value = _as_array(where, returned, expected)
        spacings = [gap for short, gap in _SPACING.items() if _type_name(returned).endswith(short)]
        self.spacing = max(self.spacing, *spacings[:1], 0.0)
        if value.shape != shape:
            raise InputError(f"{where} has shape {value.shape}: expected {expected}")
        if not np.issubdtype(value.dtype, np.floating):
            raise InputError(f"{where} is of type {value.dtype}: expected floats")
        if np.any(np.isnan(value)):
            raise InputError(f"{where} is NaN at the initial point: check the data for NaN")
        if not np.all(np.isfinite(value)):
            raise InputError(f"{where} is not finite at the initial point")
        if shape and not np.all(np.isfinite(converted(value, self.dtype))):
            raise InputError(
                f"{where} is not finite in {self.dtype}, which ends at "
                f'{np.finfo(self.dtype).max:.2g}: expected smaller numbers, or dtype = "float64"'
            )
        return value


def _as_array(where: str, returned: Any, expected: str = "floats") -> Array:
    """Convert the result of a method to an array.

    Raises
    ------
    InputError
        NumPy cannot convert it to an array of numbers, or it overflowed in float16.
    """
    try:
        if _type_name(returned).endswith("bfloat16"):  # NumPy has no bfloat16
            # PyTorch tensors have `float()`; JAX arrays convert through NumPy.
            returned = returned.float() if hasattr(returned, "float") else np.float32(returned)
        value = np.asarray(returned)
    except Exception as error:  # a tensor's own code may raise anything
        reason = f"{type(error).__name__}: {message_of(error)}"
        remedy = (
            "np.concatenate([np.ravel(layer) for layer in layers]) makes one vector of layers"
            if isinstance(returned, list | tuple)
            else "tensor.detach().cpu().numpy() makes an array of a tensor"
        )
        raise InputError(
            f"{where} returned {_kind(returned)}, which does not become an array ({reason}): "
            f"expected {expected}; {remedy}"
        ) from error
    if np.ma.is_masked(returned):
        raise InputError(f"{where} returned masked values: expected {expected}; fill them")
    if value.dtype == object:
        raise InputError(f"{where} returned {_kind(returned)}: expected {expected}")
    if value.dtype == np.float16 and not np.all(np.isfinite(value)):
        raise InputError(
            f"{where} is not finite in float16, which ends at 65504: return float32 or float64"
        )
    return value


def _type_name(returned: Any) -> str:
    """Return the name of the dtype, "" for an object without one."""
    return str(getattr(returned, "dtype", ""))


def _kind(value: Any) -> str:
    return f"an object of type {type(value).__name__}"


def _agree(call: Callable[[], Any], expected: Array, rounding: float) -> bool:
    """Whether a trial call returns the expected result; errors and warnings are suppressed."""
    try:
        with np.errstate(all="ignore"):
            value = _as_array("", call())
    except Exception:  # the user's code may raise anything
        return False
    if value.shape != expected.shape:
        return False
    # In single precision, another order of summation changes a sum by the rounding of its terms.
    if rounding > ROUNDING[np.dtype(np.float64)]:
        return float(np.abs(value - expected).max()) <= rounding * float(np.abs(expected).max())
    return np.allclose(value, expected, rtol=rounding, atol=1e-12)


def _full_gradient(user: Any) -> Callable[[Array], Any]:
    parameters = list(inspect.signature(user.gradient).parameters.values())
    if len(parameters) > 1 and parameters[1].default is inspect.Parameter.empty:
        everything = np.arange(int(user.n_samples))
        return lambda x: user.gradient(x, everything)
    return cast(Callable[[Array], Any], user.gradient)
