"""A PyTorch module as a problem."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np

from asgd.arrays import Array
from asgd.errors import InputError
from asgd.problems.base import Indices, precision
from asgd.problems.networks.base import Network, seed_of

try:
    import torch
    from torch.func import functional_call, grad, vmap

    from asgd.problems.networks.torch_data import Tensors, as_data
except ImportError as error:
    raise InputError(f"TorchProblem: {error}; pip install '.[torch]' brings PyTorch") from error

_Running = torch.nn.modules.batchnorm._NormBase  # BatchNorm, InstanceNorm of every dimension
_Convolution = torch.nn.modules.conv._ConvNd
_Dropout = torch.nn.modules.dropout._DropoutNd

# Parameters from which on, on a CPU, one call per point is faster: the arrays of one call for all
# points do not fit in the cache.
_LARGE_DIM = 200_000
_REASON = 120  # characters of an error of vmap

_log = logging.getLogger(__name__)


class TorchProblem(Network):
    """A module, its loss and its data.

        def make():
            module = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(),
                                         torch.nn.Linear(32, 10))
            return TorchProblem(module, torch.nn.functional.cross_entropy, (images, labels))

    Parameters
    ----------
    module
        A module, which is copied and starts as it is, or a function that makes one: then the
        parameters at the start depend on the run's seed.
    loss
        loss(output, *targets), the mean over the batch; output is module(*inputs).
    data
        Tensors or arrays with the samples along the first axis, or a `Dataset` with a length.
        Floats are converted to the type of the module.
    inputs
        The number of arrays that go to the module; the others are the targets.
    weight_decay
        Adds weight_decay |x|^2 / 2 to the loss.
    random
        Whether a batch's loss draws from torch's global generator. A module with dropout does.
    freeze_statistics
        Use the running statistics of normalisation layers as they are. Without it, such layers
        are refused, because their output depends on the batches that a process has seen before.
    metrics
        metrics(module) returns numbers by name, such as the accuracy on held-out data; the module
        is in evaluation mode and must not be changed.
    device
        "cpu" or "cuda"; by default the accelerator that the process was given.
    dtype
        Of the parameters of a run, "float32" or "float64"; by default that of the module. With
        "float64" they are kept, updated, sent and saved in double precision, while a module in
        float32 computes its gradients in single precision.

    Raises
    ------
    InputError
        PyTorch is missing, the module keeps running statistics, its parameters differ in type,
        or the loss is not a mean over the batch.
    """

    def __init__(
        self,
        module: torch.nn.Module | Callable[[], torch.nn.Module],
        loss: Callable[..., torch.Tensor],
        data: Any,
        *,
        inputs: int = 1,
        weight_decay: float = 0.0,
        random: bool = False,
        freeze_statistics: bool = False,
        metrics: Callable[[torch.nn.Module], Mapping[str, float]] | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._make: Any = None if isinstance(module, torch.nn.Module) else module
        # a copy: two problems of one module would write into the same parameters
        self.module: torch.nn.Module = copy.deepcopy(module) if self._make is None else self._make()
        self._loss_function, self._inputs = loss, inputs
        self._hold_parameters(freeze_statistics, dtype)
        self._data = as_data(data, self._flat)
        self._threads = threading.local()
        self._derived_twice = False
        convolves = any(isinstance(layer, _Convolution) for layer in self._layers())
        self.one_by_one = convolves or (self.device.type == "cpu" and self.dim >= _LARGE_DIM)
        dropout = any(isinstance(layer, _Dropout) and layer.p > 0 for layer in self._layers())
        super().__init__(len(self._data), weight_decay, random or dropout, metrics)
        self._refuse_a_sum()

    def _layers(self) -> Iterator[torch.nn.Module]:
        return iter(self.module.modules())

    def _hold_parameters(self, freeze_statistics: bool, asked: str | None) -> None:
        """Move all parameters, and their gradients, into one vector each."""
        for name, layer in self.module.named_modules():
            if isinstance(layer, _Running) and layer.track_running_stats and not freeze_statistics:
                raise InputError(
                    f"module.{name} = {type(layer).__name__}: expected no layer with running "
                    "statistics, which are no parameters: use GroupNorm or LayerNorm, or pass "
                    "freeze_statistics=True"
                )
        self._named = {k: p for k, p in self.module.named_parameters() if p.requires_grad}
        kinds = {p.dtype for p in self._named.values()}
        if len(kinds) != 1 or not kinds <= {torch.float32, torch.float64}:
            found = ", ".join(sorted(str(kind) for kind in kinds)) or "no parameters"
            raise InputError(f"module = {found}: expected parameters all float32 or all float64")
        self.module.to(self.device)
        self._flat = torch.cat([p.detach().reshape(-1) for p in self._named.values()])
        self._flat_gradient = torch.zeros_like(self._flat)
        self.dim = self._flat.numel()
        dtype = precision(self._flat.dtype, "module")
        self._note_precision(dtype, asked, self.device.type != "cpu")
        self._start = self._flat.cpu().numpy().copy() if self._make is None else None
        self._staging = self._flat
        if self.device.type == "cuda":
            self._staging = torch.empty(self.dim, dtype=self._flat.dtype, pin_memory=True)
        for name, view in self._views(self._flat).items():
            self._named[name].data = view
        for name, view in self._views(self._flat_gradient).items():
            self._named[name].grad = view

    def _views(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the parts of vectors (..., d) that stand for the parameters, in their shapes."""
        sizes = [p.numel() for p in self._named.values()]
        parts = zip(self._named.items(), vector.split(sizes, dim=-1), strict=True)
        return {name: part.view(*vector.shape[:-1], *p.shape) for (name, p), part in parts}

    @cached_property
    def labels(self) -> Any:
        """Return the last array of the data, if it has a whole number per sample.

        For a `Dataset` these are its `targets`, or the last entries of its samples.
        """
        return self._data.labels()

    def initial_point(self, rng: np.random.Generator) -> Array:
        """Return x_0, shape (d,): the module's own parameters, or those of a new module."""
        if self._make is None:
            return np.array(self._start)
        with _seeded(int(rng.integers(2**63)), self.device):
            new = dict(self._make().named_parameters())
        start = torch.cat([new[name].detach().reshape(-1) for name in self._named])
        return np.asarray(start.cpu().numpy())

    def load(self, x: Array) -> torch.nn.Module:
        """Return the module with the parameters x, shape (d,), in evaluation mode.

        It is the module of this problem; the next call of a method changes its parameters.
        """
        np.copyto(self._staging.numpy(), x, casting="same_kind")
        if self._staging is not self._flat:
            with torch.no_grad():
                self._flat.copy_(self._staging, non_blocking=True)
        return self.module.eval()

    def unflatten(self, x: Array) -> torch.nn.Module:
        """Return a new module with the parameters x, shape (d,), in evaluation mode."""
        module: torch.nn.Module = copy.deepcopy(self.load(x))
        module.zero_grad(set_to_none=True)
        return module

    def named_arrays(self, x: Array) -> dict[str, Array]:
        """Return the state of the module with the parameters x, as `state_dict` names it."""
        state = self.load(x).state_dict()
        return {name: value.detach().cpu().numpy().copy() for name, value in state.items()}

    def flatten(self, arrays: Mapping[str, Array]) -> Array:
        """Return the vector (d,) of the parameters; buffers are the module's own."""
        return np.concatenate([np.ravel(arrays[name]) for name in self._named]).astype(
            self._model_dtype
        )

    def _gradient_of_batch(self, x: Array, indices: Indices) -> Array:
        module = self.load(x)
        if not self.random:
            return self._backward(module, self._data.batch(indices))
        for layer in self._layers():
            layer.training = not isinstance(layer, _Running)
        with _seeded(seed_of(indices), self.device):
            return self._backward(module, self._data.batch(indices))

    def _backward(self, module: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> Array:
        """Return the gradient in new memory; autograd adds to the one vector of gradients."""
        self._flat_gradient.zero_()
        self._loss_function(module(*batch[: self._inputs]), *batch[self._inputs :]).backward()
        if self.device.type == "cpu":
            return np.array(self._flat_gradient.numpy())
        self._staging.copy_(self._flat_gradient)
        return np.array(self._staging.numpy())

    def in_one_thread(self) -> AbstractContextManager[object]:
        """Return a context in which this thread's calls use one processor."""
        return _one_thread()

    @property
    def _own_module(self) -> _Module:
        """A copy of the module for this thread, in evaluation mode."""
        if not hasattr(self._threads, "module"):
            with self._lock:
                self._threads.module = _Module(self.module, list(self._named))
        module: _Module = self._threads.module
        return module

    def _loss_of(self, vector: torch.Tensor, *batch: torch.Tensor) -> torch.Tensor:
        return self._loss_with(self._views(vector), *batch)

    def _loss_with(self, named: Mapping[str, Any], *batch: torch.Tensor) -> torch.Tensor:
        output = functional_call(self._own_module.module, named, batch[: self._inputs])
        return self._loss_function(output, *batch[self._inputs :])

    def _fixed_batch(self, indices: Indices) -> tuple[torch.Tensor, ...]:
        """Return a batch; a data set that draws random numbers always draws the same for it."""
        if isinstance(self._data, Tensors):
            return self._data.batch(indices)
        with self._lock, _seeded(seed_of(indices), self.device) if self.random else nullcontext():
            return self._data.batch(indices)

    def _losses(self, points: Array, indices: Indices) -> Array:
        batch = self._fixed_batch(indices)
        inputs, targets = batch[: self._inputs], batch[self._inputs :]
        module, values = self._own_module, np.empty(len(points))
        with torch.no_grad():
            for row, point in enumerate(self._tensor(points)):
                output = module.at(point)(*inputs)
                values[row] = self._loss_function(output, *targets).item()
        return values

    def _gradients(self, points: Array, indices: Indices) -> Array:
        # Importing vmap takes seconds; a run, unlike its prediction, does not need it.
        if self.one_by_one or len(points) == 1 or not self.takes_points:
            return self._gradients_in_turn(points, indices)
        return self._gradients_in_one_call(points, indices)

    def _gradients_in_one_call(self, points: Array, indices: Indices) -> Array:
        batch = self._fixed_batch(indices)
        shared = None if indices.ndim == 1 else 0
        each = vmap(self._loss_with, in_dims=(0, *[shared] * len(batch)))
        # The loss of a point depends on its own parameters alone, so the gradient of the sum
        # holds all gradients, and autograd need not run under vmap.
        named = {k: v.requires_grad_() for k, v in self._views(self._tensor(points)).items()}
        joined = torch.empty(points.shape, dtype=self._flat.dtype, device=self.device)
        self._fill(joined, each(named, *batch).sum(), list(named.values()))
        return _numpy(joined)

    @cached_property
    def takes_points(self) -> bool:
        """Whether vmap can take the module and its loss; a warning says if it cannot.

        It is tried with two points and a batch of one sample each. It cannot take branches that
        depend on values, `.item()`, or changes in place.
        """
        points = np.tile(self._numbers(), (2, 1))
        try:
            self._gradients_in_one_call(points, np.zeros((2, 1), dtype=np.int64))
        except Exception as error:  # user code may raise anything; a bug raises again later
            reason = " ".join(str(error).split())[:_REASON]
            _log.warning(
                "module %s: torch.func.vmap cannot take it with its loss (%s: %s), so points are "
                "computed one by one: a prediction takes several times as long. Write it without "
                ".item(), branches on values and changes in place.",
                type(self.module).__name__,
                type(error).__name__,
                reason,
            )
            return False
        return True

    def _numbers(self) -> Array:
        """Return the parameters that the module holds now, shape (d,)."""
        return np.asarray(self._flat.cpu().numpy())

    def _gradients_in_turn(self, points: Array, indices: Indices) -> Array:
        module = self._own_module
        joined = torch.empty(points.shape, dtype=self._flat.dtype, device=self.device)
        shared = self._fixed_batch(indices) if indices.ndim == 1 else None
        for row, point in enumerate(self._tensor(points)):
            batch = self._fixed_batch(indices[row]) if shared is None else shared
            output = module.at(point)(*batch[: self._inputs])
            loss = self._loss_function(output, *batch[self._inputs :])
            self._fill(joined[row], loss, module.parameters)
        return _numpy(joined)

    def _fill(
        self, vectors: torch.Tensor, loss: torch.Tensor, parameters: Sequence[torch.Tensor]
    ) -> None:
        """Write the gradient of a loss with respect to the parameters into vectors (..., d)."""
        slopes = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for part, slope in zip(self._views(vectors).values(), slopes, strict=True):
            part.copy_(slope)

    def _sample_gradients(self, x: Array, indices: Indices) -> Array:
        if not self.takes_points:
            return self._gradients_in_turn(np.tile(x, (len(indices), 1)), indices[:, None])
        batch = tuple(part.unsqueeze(1) for part in self._fixed_batch(indices))
        each = vmap(grad(self._loss_of), in_dims=(None, *[0] * len(batch)))
        return _numpy(each(self._tensor(x), *batch))

    def _hessian_vectors(self, points: Array, vectors: Array, indices: Indices) -> Array:
        batch, module = self._fixed_batch(indices), self._own_module
        products = torch.zeros(points.shape, dtype=self._flat.dtype, device=self.device)
        along = self._tensor(vectors)
        for row, point in enumerate(self._tensor(points)):
            output = module.at(point)(*batch[: self._inputs])
            loss = self._loss_function(output, *batch[self._inputs :])
            slopes = torch.autograd.grad(
                loss,
                module.parameters,
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            parts = zip(slopes, self._views(along[row]).values(), strict=True)
            slope = torch.stack([(one * v).sum() for one, v in parts]).sum()
            if slope.requires_grad:  # False if the loss is linear
                self._warn_of_missing_parts(slope)
                self._fill(products[row], slope, module.parameters)
        return _numpy(products)

    def _warn_of_missing_parts(self, slope: torch.Tensor) -> None:
        """Warn once if a function has no second derivative; autograd silently leaves it out."""
        if not self._derived_twice:
            self._derived_twice = True
            if "torch::autograd::Error" in _functions(slope):
                _log.warning(
                    "module %s: a function marked once_differentiable has no second derivative, "
                    "and PyTorch leaves its part out: curvatures, and the limits of the learning "
                    "rate, are wrong.",
                    type(self.module).__name__,
                )

    def _tensor(self, array: Array) -> torch.Tensor:
        # torch warns of read-only memory, though nothing is written to it
        writable = array if array.flags.writeable else np.array(array)
        return torch.from_numpy(writable).to(self.device)


class _Module:
    """A copy of a module in evaluation mode; any vector can provide its parameters."""

    def __init__(self, module: torch.nn.Module, names: Sequence[str]) -> None:
        self.module = copy.deepcopy(module).eval()
        known = dict(self.module.named_parameters())
        self.parameters = [known[name] for name in names]
        self._sizes = [parameter.numel() for parameter in self.parameters]

    def at(self, vector: torch.Tensor) -> torch.nn.Module:
        """Return the module with the parameters of a vector (d,), which it does not copy."""
        for parameter, part in zip(self.parameters, vector.split(self._sizes), strict=True):
            parameter.data = part.view(parameter.shape)
        return self.module


def _functions(tensor: torch.Tensor) -> set[str]:
    """Return the names of the functions that lead to a tensor."""
    seen: set[Any] = set()
    left: list[Any] = [tensor.grad_fn]
    while left:
        function = left.pop()
        if function is not None and function not in seen:
            seen.add(function)
            left += [one for one, _ in function.next_functions]
    return {function.name() for function in seen}


def _numpy(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy()
    return array


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let operations of this thread run on one processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, and restore their states afterwards."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
