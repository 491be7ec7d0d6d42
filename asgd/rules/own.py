"""Rules defined by the user, named "package.module:Name" in the configuration.

The class or function is called with the entries of `optimizer.options` and returns an object with a
method `update` and optionally the attributes `state`, `scratch`, `reads` and `blockwise` and the
method `init`, all as in `asgd.rules`. It need not be a subclass of `Rule`, and its `update` need
not take paths. `asgd.user_code` tells which functions and classes may be called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from asgd.arrays import Array
from asgd.errors import InputError
from asgd.rules.base import Optimizer, Rule, State
from asgd.streams import stream
from asgd.user_code import call_user, check_options, import_named

_MOST_ARRAYS = 16
_DEFAULTS = {"state": (), "scratch": 0, "reads": False, "blockwise": True}
_TRIAL_DIM, _CUT = 7, 3  # of the trial: parameters, and where it cuts them into two blocks
_TRIAL_STALENESS = (0, 2, 5) * 8  # of its updates; many, as some rules do more at every tenth


def load_rule(named: str, options: Mapping[str, Any], prefix: str = "") -> Rule:
    """Import a class or function, call it, check its rule and return it.

    Parameters
    ----------
    prefix
        Prefix of the keys `rule` and `options`, for messages.

    Raises
    ------
    InputError
        It cannot be imported or raises, or its result does not keep the contract.
    """
    where = f"optimizer.{prefix}rule = {named!r}"
    factory = import_named(named, where, "rule", ("state", "update"))
    check_options(where, f"optimizer.{prefix}options", factory, options)
    user = call_user(where, "rule", lambda: factory(**options))
    if not callable(getattr(user, "update", None)):
        raise InputError(f"{where}: {type(user).__name__} has no method update: expected one")
    rule = OwnRule(user, where)
    trial = _Trial(rule, where)
    trial.check()
    rule.takes_paths = trial.takes_paths()
    return rule


class OwnRule(Rule):
    """Adapts an object to `Rule`.

    Parameters
    ----------
    user
        The object.
    where
        The key and its value, for messages.

    Attributes
    ----------
    takes_paths
        Whether its `update` takes paths (paths, d); otherwise they are updated one by one.
    """

    def __init__(self, user: Any, where: str) -> None:
        self.user = user
        state, scratch, reads, blockwise = call_user(
            where, "rule", lambda: [getattr(user, name, value) for name, value in _DEFAULTS.items()]
        )
        self.state = _names(where, state)
        self.scratch = _number(where, scratch)
        self.reads = _flag(where, "reads", reads)
        self.blockwise = _flag(where, "blockwise", blockwise)
        self.takes_paths = False

    def init(self, x: Array) -> State:
        """Return the state of the object, copied; zeros if it has no `init`."""
        if not hasattr(self.user, "init"):
            return super().init(x)
        if x.ndim == 1:
            state = self.user.init(_read_only(x))
            return tuple(np.array(one) if isinstance(one, np.ndarray) else one for one in state)
        return tuple(map(np.stack, zip(*(self.init(one) for one in x), strict=True)))

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
        """Apply a gradient to x and to the state, in place."""
        gradient = _read_only(gradient)
        read = None if read is None else _read_only(read)
        if x.ndim == 1 or self.takes_paths:
            self.user.update(x, gradient, state, eta, count, staleness, read)
            return
        lags = np.broadcast_to(staleness, (len(x), 1))[:, 0].astype(int).tolist()
        for path, lag in enumerate(lags):
            own = tuple(array[path] for array in state)
            then = None if read is None else read[path]
            self.user.update(x[path], gradient[path], own, eta, count, lag, then)


class _Trial:
    """Applies a few gradients by a rule and checks the results."""

    def __init__(self, rule: OwnRule, where: str) -> None:
        self._rule, self._where = rule, where
        self._draws = stream(0, "rule").standard_normal((2, len(_TRIAL_STALENESS), _TRIAL_DIM))

    def check(self) -> None:
        """Refuse a rule that does not keep the contract."""
        rule, where = self._rule, self._where
        x = self._after_updates(slice(None), changes=True)
        if not np.array_equal(x, self._after_updates(slice(None), disturbed=True)):
            raise InputError(
                f"{where}: update gives other parameters when other vectors are updated in "
                "between: expected that it depends on its arguments alone, and keeps nothing but "
                "its state"
            )
        parts = (slice(None, _CUT), slice(_CUT, None)) if rule.blockwise else ()
        if any(not np.allclose(x[part], self._after_updates(part), 1e-9, 1e-12) for part in parts):
            raise InputError(
                f"{where}: update of a part of x differs from that part of an update of x: "
                "expected blockwise = False"
            )
        self._after_updates(slice(None), dtype=np.float32)

    def takes_paths(self) -> bool:
        """Whether update treats paths (paths, d) row by row."""
        if not self._rule.blockwise:
            return False
        lags = np.array([[1.0], [3.0]])
        gradients, reads = self._draws[:, :2]
        start = np.ones((2, _TRIAL_DIM))
        together, alone = start.copy(), start.copy()
        self._rule.takes_paths = False
        Optimizer(self._rule, alone).apply(alone, gradients, 0.1, 1, lags, reads)
        self._rule.takes_paths = True
        try:
            with np.errstate(all="ignore"):
                Optimizer(self._rule, together).apply(together, gradients, 0.1, 1, lags, reads)
        except Exception:  # the user's code may raise anything
            return False
        return np.allclose(together, alone, rtol=1e-12, atol=0.0)

    def _after_updates(
        self, part: slice, *, changes: bool = False, disturbed: bool = False, dtype: Any = float
    ) -> Array:
        """Return a part of x after the trial's updates of this part alone.

        With `changes`, refuse a rule that left x or an array of its state as it was. If the updates
        are `disturbed`, another vector is updated before each of them, and gradients and snapshots
        come in the same memory, as they do at a server.
        """
        draws = self._draws[..., part].astype(dtype)
        x = np.ones(draws.shape[-1], dtype)
        arrays = self._arrays(x)
        before = [x.copy(), *(array.copy() for array in arrays)]
        other, memory = 2 * x, np.empty_like(draws[:, 0])
        others = self._arrays(other)
        for count, (lag, gradient, read) in enumerate(
            zip(_TRIAL_STALENESS, draws[0], draws[1], strict=True)
        ):
            if disturbed:
                memory[:] = read, gradient
                self._update(other, memory[0], memory[1], others, count, lag)
                memory[:] = gradient, read
                gradient, read = memory[0], memory[1]
                for array in arrays[len(self._rule.state) :]:  # scratch may have any content
                    array.fill(np.nan)
            self._update(x, gradient, read, arrays, count, lag)
        if changes:
            self._check_changes(before, [x, *arrays])
        if not np.isfinite(x).all():
            raise InputError(f"{self._where}: parameters of {x.dtype} are not finite after update")
        return x

    def _arrays(self, x: Array) -> State:
        """Return the state for x, checked, and scratch arrays."""
        rule, where = self._rule, self._where
        state: State = call_user(where, "init(x)", lambda: rule.init(x))
        if len(state) != len(rule.state):
            raise InputError(
                f"{where}: init(x) has {len(state)} arrays: expected {len(rule.state)}, as many as "
                "state has names"
            )
        for name, array in zip(rule.state, state, strict=True):
            if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != x.dtype:
                raise InputError(
                    f"{where}: {name} of init(x): expected a vector like x, here of {x.dtype}"
                )
            if rule.blockwise and array.shape != x.shape:
                raise InputError(
                    f"{where}: {name} of init(x) has shape {array.shape}: expected that of x, or "
                    "blockwise = False"
                )
        return (*state, *(np.empty_like(x) for _ in range(rule.scratch)))

    def _update(
        self, x: Array, gradient: Array, read: Array, arrays: State, count: int, lag: int
    ) -> None:
        """Apply a gradient by the rule; refuse exceptions and return values."""
        then = _read_only(read) if self._rule.reads else None
        arguments = (x, _read_only(gradient), arrays, 0.1, count, lag, then)
        returned = call_user(self._where, "update", partial(self._rule.user.update, *arguments))
        if returned is not None:
            raise InputError(
                f"{self._where}: update returned an object of type {type(returned).__name__}: "
                "expected None, because it changes x and state in place"
            )

    def _check_changes(self, before: Sequence[Array], after: Sequence[Array]) -> None:
        """Refuse a rule that left x or an array of its state as it was."""
        names = ("x", *self._rule.state)
        for name, old, new in zip(names, before, after, strict=False):
            if np.array_equal(old, new):
                raise InputError(
                    f"{self._where}: update leaves {name} as it was: expected a change in place, "
                    f"such as {name} *= 0.9 or {name}[:] = ..., not {name} = ..."
                )


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


def _names(where: str, state: Any) -> tuple[str, ...]:
    """Return the names of the state arrays."""
    known = isinstance(state, tuple | list) and len(set(map(str, state))) == len(state)
    if not known or not all(isinstance(name, str) and name.isidentifier() for name in state):
        raise InputError(
            f"{where}: state = {state!r}: expected different names, such as ('m', 'v')"
        )
    if len(state) > _MOST_ARRAYS:
        raise InputError(f"{where}: state has {len(state)} names: expected {_MOST_ARRAYS} at most")
    return tuple(state)


def _number(where: str, scratch: Any) -> int:
    if not isinstance(scratch, int) or not 0 <= scratch <= _MOST_ARRAYS:
        raise InputError(f"{where}: scratch = {scratch!r}: expected 0 to {_MOST_ARRAYS}")
    return scratch


def _flag(where: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{where}: {name} = {value!r}: expected True or False")
    return bool(value)
