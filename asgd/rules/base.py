"""The interface of an update rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import ClassVar

import numpy as np

from asgd.arrays import Array
from asgd.errors import InputError

State = tuple[Array, ...]

# Longer vectors are updated in blocks of so many entries (five float64 blocks fill about one L2
# cache) or by a compiled loop, which soon saves more time than the import of its compiler takes.
BLOCK = 1 << 14


class Rule(ABC):
    """An update rule; the contract is that of `asgd.rules`.

    Attributes
    ----------
    state
        Names of the arrays that it keeps from update to update.
    scratch
        Number of arrays for intermediate results that it gets after its state.
    reads
        Whether it needs the snapshot at which the gradient was computed.
    blockwise
        Whether it treats every entry alike, so that it can be applied to a part of the vectors.
    additive
        Whether its step does not depend on x, so that steps can be summed apart from x.
    loop
        A compiled loop that does what `update` does, to the last bit, if the rule has one. It takes
        x, the gradient, the snapshot if the rule `reads`, the state, and the `factors`.
    """

    state: tuple[str, ...] = ()
    scratch: int = 0
    reads: bool = False
    blockwise: bool = True
    additive: bool = False
    loop: ClassVar[Callable[..., None] | None] = None

    def init(self, x: Array) -> State:
        """Return the state before the first update, for parameters x."""
        return tuple(np.zeros_like(x) for _ in self.state)

    @abstractmethod
    def update(
        self,
        x: Array,
        gradient: Array,
        state: Sequence[Array],
        eta: float,
        count: int,
        staleness: int | Array,
        read: Array | None = None,
    ) -> None:
        """Apply a gradient to x and to the state, in place.

        Parameters
        ----------
        x
            The parameters now, shape (d,), a part of them, or paths of them, shape (paths, d).
        gradient
            Of the shape of x; not modified.
        state
            Its arrays, then `scratch` arrays with any content.
        eta
            Learning rate.
        count
            Updates that the server has applied before this one.
        staleness
            Updates applied since the read: a number, or one per path, shape (paths, 1).
        read
            The worker's snapshot, not rounded, of the shape of x; None unless the rule `reads`.
        """

    def factors(self, eta: float, count: int, staleness: int | Array) -> tuple[float, ...]:
        """Return the numbers that the compiled loop takes."""
        return ()

    def update_long(
        self,
        x: Array,
        gradient: Array,
        state: Sequence[Array],
        eta: float,
        count: int,
        staleness: int | Array,
        read: Array | None = None,
    ) -> None:
        """Do what `update` does, to the last bit, to a vector longer than `BLOCK`.

        It uses the compiled loop, or blocks that stay in the cache.
        """
        arrays, scratch = state[: len(self.state)], state[len(self.state) :]
        vectors = [x, gradient, *([] if read is None else [read]), *arrays]
        if self.loop is not None and alike(*vectors):
            self.loop(*vectors, *self.factors(eta, count, staleness))
            return
        for start in range(0, len(x), BLOCK):
            block = slice(start, start + BLOCK)
            part = x[block]
            own = [array[block] for array in arrays]
            own += [array[: len(part)] for array in scratch]
            then = None if read is None else read[block]
            self.update(part, gradient[block], tuple(own), eta, count, staleness, then)


class Optimizer:
    """Applies a rule to one vector or to paths; it owns the state and the scratch arrays.

    Parameters
    ----------
    rule
        The rule.
    x
        x_0, shape (d,) or (paths, d).
    """

    def __init__(self, rule: Rule, x: Array) -> None:
        self.rule = rule
        self.state = rule.init(x)
        like = x[..., :BLOCK] if rule.blockwise and x.ndim == 1 else x
        self._arrays = (*self.state, *(np.empty_like(like) for _ in range(rule.scratch)))
        if len(like) < len(x) and rule.loop is not None:
            # Compile its loop now, not in the first update.
            one = np.zeros(1, x.dtype)
            arrays = tuple(one.copy() for _ in self._arrays)
            rule.update_long(one.copy(), one, arrays, 0.0, 0, 0, one if rule.reads else None)

    def apply(
        self,
        x: Array,
        gradient: Array,
        eta: float,
        count: int,
        staleness: int | Array,
        read: Array | None = None,
    ) -> None:
        """Apply a gradient to x, in place; the arguments are those of `Rule.update`."""
        then = read if self.rule.reads else None
        apply_rule(self.rule, x, gradient, self._arrays, eta, count, staleness, then)

    def restore(self, state: Sequence[Array], names: Sequence[str] = ()) -> None:
        """Continue from a copy of a saved state; see `check_saved`."""
        check_saved(self.rule, self.state, state, names)
        for own, saved in zip(self.state, state, strict=True):
            np.copyto(own, saved)


def check_saved(
    rule: Rule, own: Sequence[Array], saved: Sequence[Array], names: Sequence[str]
) -> None:
    """Refuse a saved state that does not fit a rule.

    Parameters
    ----------
    own
        A state of the rule, for the shapes.
    saved, names
        The saved state, and the names of its arrays if they are known.

    Raises
    ------
    InputError
        The arrays have other names or shapes.
    """
    names = tuple(names) or rule.state
    if names != rule.state or [one.shape for one in saved] != [one.shape for one in own]:
        has, keeps = _described(names, saved), _described(rule.state, own)
        raise InputError(
            f"optimizer.rule: the saved state has {has}, the rule keeps {keeps}: expected the rule "
            "that saved it"
        )


def _described(names: Sequence[str], arrays: Sequence[Array]) -> str:
    shapes = [str(array.shape) for array in arrays]
    return ", ".join(map(" ".join, zip_longest(names, shapes, fillvalue="?"))) or "nothing"


def apply_rule(
    rule: Rule,
    x: Array,
    gradient: Array,
    state: Sequence[Array],
    eta: float,
    count: int,
    staleness: int | Array,
    read: Array | None = None,
) -> None:
    """Apply a rule to a vector of any length or to paths; the arguments are those of `update`."""
    long = x.ndim == 1 and len(x) > BLOCK and rule.blockwise
    update = rule.update_long if long else rule.update
    update(x, gradient, state, eta, count, staleness, read)


def alike(*vectors: Array) -> bool:
    """Whether vectors are of one type, aligned and without gaps, as compiled loops require.

    A gradient from the write-ahead log is not aligned.
    """
    return len({one.dtype for one in vectors}) == 1 and all(
        one.flags.c_contiguous and one.flags.aligned for one in vectors
    )
