"""Update rules of a user, for tests; some break the contract on purpose."""

from __future__ import annotations

from typing import Any

import numpy as np


class Copied:
    """SGD as a user would write it."""

    def update(self, x, gradient, state, eta, count, staleness, read=None):
        x -= eta * gradient


class Full:
    """A rule that uses all its arguments, with momentum and a correction by the read parameters."""

    state = ("velocity",)
    scratch = 1
    reads = True

    def __init__(self, beta: float = 0.5) -> None:
        self.beta = beta

    def update(self, x, gradient, state, eta, count, staleness, read=None):
        velocity, step = state
        np.subtract(x, read, out=step)
        step *= 0.1
        step += gradient
        velocity *= self.beta
        velocity += step
        x -= eta / (1 + count) ** 0.1 / (1 + staleness) * velocity


class Normalised:
    """A rule that needs the whole vector and counts its updates."""

    state = ("updates",)
    blockwise = False

    def init(self, x):
        return (np.zeros(1, x.dtype),)

    def update(self, x, gradient, state, eta, count, staleness, read=None):
        updates = state[0]
        updates += 1
        x -= eta * gradient / np.linalg.norm(gradient)


class Branches:
    """A rule that needs its staleness as one number."""

    def update(self, x, gradient, state, eta, count, staleness, read=None):
        if staleness < 3:
            x -= eta * gradient


class Aliased:
    """A rule whose state begins as x itself, and which later changes its arguments."""

    state = ("mean",)
    reads = True

    def init(self, x):
        return (x,)

    def update(self, x, gradient, state, eta, count, staleness, read=None):
        if count > 40:
            read += 1
        elif count == 40:
            gradient *= 2
        state[0][:] += gradient / (1 + count) / 2
        x -= eta * gradient


class Faulty:
    """A rule with one fault."""

    def __getattr__(self, name: str) -> Any:
        if name == "state" and self.fault == "property":
            raise ZeroDivisionError("no state")
        raise AttributeError(name)

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.rng = np.random.default_rng(0)
        faults: dict[str, dict[str, Any]] = {
            "names": {"state": "velocity"},
            "tuple": {"state": ("v",)},
            "forgets": {"state": ("v",)},
            "twice": {"state": ("v", "v")},
            "many": {"state": tuple(f"a{i}" for i in range(99))},
            "scratch": {"scratch": -1},
            "flag": {"blockwise": "no"},
            "no update": {"update": None},
            "short init": {"state": ("v",), "init": lambda x: ()},
            "double": {"state": ("v",), "init": lambda x: (np.zeros(len(x)),)},
            "shape": {"state": ("v",), "init": lambda x: (np.zeros(1),)},
            "list": {"state": ("v",), "init": lambda x: ([0.0],)},
        }
        vars(self).update(faults.get(fault, {}))

    def update(self, x, gradient, state, eta, count, staleness, read=None):
        if self.fault == "late" and count > 30:
            raise ArithmeticError("enough")
        if self.fault == "half" and count > 30:
            x += 1.0
            raise ArithmeticError("half")
        if self.fault == "raises":
            raise ZeroDivisionError("mine")
        if self.fault == "gradient":
            gradient *= 2
        if self.fault == "returns":
            return x - eta * gradient
        if self.fault == "tuple":
            state[0] *= 0.9
        if self.fault == "forgets":
            velocity = state[0]
            velocity = 0.9 * velocity + gradient
        if self.fault == "stays":
            x = x - eta * gradient
            return None
        if self.fault == "nan":
            x[:] = np.nan
        if self.fault == "narrow":
            x += np.nan if x.dtype == np.float32 else 0.0
        if self.fault == "hidden":  # a momentum that no checkpoint contains
            self.velocity = gradient + (0.9 * self.velocity if count else 0.0)
            x -= eta * self.velocity
        if self.fault == "refers":  # to memory that the next gradient overwrites
            last = self.last if count else np.zeros_like(x)
            self.last = gradient
            x -= eta * last
        if self.fault == "double":
            state[0][:] += gradient
        if self.fault == "random":
            x += self.rng.standard_normal(len(x))
        if self.fault == "whole":
            x -= eta * gradient.sum()
        x -= eta * gradient
        return None


def make(kind: str) -> object:
    """Return a rule from a function, not a class."""
    return Copied() if kind == "copied" else 3
