"""Plug-in problems for tests; some fail on purpose."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_info

from asgd.problems.base import Problem
from asgd.problems.linear import digits

Array = npt.NDArray[np.float64]


class Bowl:
    """f(x) = |x|^2 / 2 with noisy samples, and a fault.

    "loss" and "raise" raise once the parameters are below 0.9. "exit" and "hang" happen at the
    `after`-th gradient of a process; "nan" returns NaN from there on. "grow" makes the run diverge,
    "soar" so fast that gradients overflow before a loss is evaluated. "slow" makes gradients slower
    and slower until the file `until` exists; "stumble" does so too, and raises at the `after`-th
    gradient of a process before that. "print" prints at every gradient. "slow loss" takes 30 ms for
    a loss, more than any transport takes for an update. "hanging loss" takes minutes for a loss
    below 0.9, unless the file `until` exists.
    """

    dim = 2
    n_samples = 8

    def __init__(self, fault: str = "none", after: int = 10, until: str = "") -> None:
        self.fault = fault
        self.until = Path(until)
        self.after = after
        self.calls = 0

    def initial_point(self, rng: np.random.Generator) -> Array:
        return np.array([1.0, -1.0])

    def loss(self, x: Array) -> float:
        if self.fault == "loss" and np.abs(x).max() < 0.9:
            raise ArithmeticError("no loss below 0.9")
        if self.fault == "slow loss":
            time.sleep(0.03)
        if self.fault == "hanging loss" and np.abs(x).max() < 0.9 and not self.until.exists():
            time.sleep(250)
        return float(x @ x / 2)

    def gradient(self, x: Array, indices: Any) -> Array:
        self.calls += 1
        if self.fault == "raise" and np.abs(x).max() < 0.9:
            raise ZeroDivisionError("the user's\nown mistake")
        if self.fault in ("slow", "stumble") and not self.until.exists():
            if self.fault == "stumble" and self.calls == self.after:
                raise ZeroDivisionError("once")
            time.sleep(0.03 * 1.03**self.calls)
        if self.fault == "print":
            print("printed by the problem")  # noqa: T201
        if self.fault == "grow":
            return -30.0 * x
        if self.fault == "soar":
            return -1e40 * x
        if self.calls >= self.after:
            if self.fault == "nan":
                return np.array([np.nan, 0.0])
            if self.fault == "exit":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "hang":
                threading.Event().wait()
        shift = (np.asarray(indices) - 3.5) / 8
        return np.asarray(x + shift.mean())


def bowl(**options: Any) -> Bowl:
    """Return the problem; the plug-in is `tests.support.plugins:bowl`."""
    return Bowl(**options)


class Measured(Bowl):
    """A bowl with metrics beside the loss."""

    def metrics(self, x: Array) -> dict[str, float]:
        return {"distance": float(np.linalg.norm(x)), "=first": float(x[0])}


def measured(**options: Any) -> Measured:
    """Return the problem with metrics; the plug-in is `tests.support.plugins:measured`."""
    return Measured(**options)


class Threaded(Bowl):
    """A bowl that records how many BLAS threads each gradient could use."""

    dim = 20
    seen: ClassVar[list[int]] = []

    def initial_point(self, rng: np.random.Generator) -> Array:
        return np.ones(self.dim)

    def gradient(self, x: Array, indices: Any) -> Array:
        pools = threadpool_info()
        self.seen.append(max(p["num_threads"] for p in pools if p["user_api"] == "blas"))
        return super().gradient(x, indices)


class Wide(Bowl):
    """A bowl with 100,000 parameters."""

    dim = 100_000

    def initial_point(self, rng: np.random.Generator) -> Array:
        return np.ones(self.dim)


def wide() -> Wide:
    """Return the problem; the plug-in is `tests.support.plugins:wide`."""
    return Wide()


class Single(Bowl):
    """A bowl in single precision by default, which computes gradients in double precision.

    From the `large`-th of a process on, gradients are too large for single precision.
    """

    def __init__(self, dim: int = 2, dtype: str = "float32", large: int = 1_000_000) -> None:
        super().__init__()
        self.dim, self.dtype = dim, dtype
        self.curvature = np.linspace(0.5, 1.5, dim)
        self.large = large

    def initial_point(self, rng: np.random.Generator) -> Array:
        return rng.standard_normal(self.dim)

    def gradient(self, x: Array, indices: Any) -> Array:
        assert x.dtype == self.dtype
        self.calls += 1
        scale = 1e300 if self.calls >= self.large else 1.0
        shift = (np.asarray(indices) - 3.5) / 8
        return scale * (self.curvature * x + shift.mean())


def single(**options: Any) -> Single:
    """Return the problem; the plug-in is `tests.support.plugins:single`."""
    return Single(**options)


class Scattered:
    """f(x) = mean of (x - a_i)^2 / 2, from starts that lie far apart."""

    dim = 1
    n_samples = 8
    centres = np.linspace(-1.0, 1.0, 8)

    def initial_point(self, rng: np.random.Generator) -> Array:
        return rng.uniform(1.0, 30.0, 1)

    def loss(self, x: Array) -> float:
        return float(((x - self.centres) ** 2).mean() / 2)

    def gradient(self, x: Array, indices: Any) -> Array:
        return x - self.centres[indices].mean()


@dataclass(frozen=True)
class Frozen(Problem):
    """A problem whose precision is a name that cannot be replaced."""

    dim: int = 2
    n_samples: int = 4
    dtype: Any = "float32"

    def initial_point(self, rng: np.random.Generator) -> Array:
        return np.ones(2)

    def loss(self, x: Array) -> Array:
        return np.asarray(x @ x / 2)

    def gradient(self, x: Array, indices: Any = None) -> Array:
        return x


class Paced:
    """Softmax regression on the digits; gradients get slower and slower until a file exists."""

    def __init__(self, until: str) -> None:
        self._digits = digits()
        self._until = Path(until)
        self._calls = 0
        self.dim, self.n_samples = self._digits.dim, self._digits.n_samples
        self.labels = self._digits.labels

    def initial_point(self, rng: np.random.Generator) -> Array:
        return self._digits.initial_point(rng)

    def loss(self, x: Array) -> Array:
        return self._digits.loss(x)

    def gradient(self, x: Array, indices: Any) -> Array:
        self._calls += 1
        if not self._until.exists():
            time.sleep(0.01 * max(1.0, self._calls / 20))
        return self._digits.gradient(x, indices)


def paced(until: str) -> Paced:
    """Return the problem; the plug-in is `tests.support.plugins:paced`."""
    return Paced(until)
