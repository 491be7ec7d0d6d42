"""Compiles inner loops at their first call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

Loop = TypeVar("Loop", bound=Callable[..., Any])

WRITTEN, READ = "{0}[::1]", "Array({0}, 1, 'C', readonly=True)"


def compiled(*parameters: str, any_order: bool = False) -> Callable[[Loop], Loop]:
    """Compile a loop for float64 and float32 at its first call; {0} stands for the type.

    `any_order` allows any order of summation, so that sums vectorise; inf and nan are kept.
    """
    pattern = f"({', '.join(parameters)},)"
    signatures = list(dict.fromkeys(pattern.format(kind) for kind in ("float64", "float32")))
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    if any_order:
        options["fastmath"] = {"reassoc", "nsz"}

    def decorate(loop: Loop) -> Loop:
        return cast(Loop, _Compiled(loop, signatures, options))

    return decorate


class _Compiled:
    """A loop that is compiled at its first call: a command needs few of them.

    The compiled code is cached beside this file or in the user's cache directory. All signatures
    are always compiled in their order, so that processes that start together write the same files.

    Attributes
    ----------
    code
        The compiled loop; None before the first call.
    """

    def __init__(
        self, loop: Callable[..., Any], signatures: list[str], options: dict[str, Any]
    ) -> None:
        self._loop, self._signatures, self._options = loop, signatures, options
        self._lock = threading.Lock()
        self.code: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        code = self.code
        if code is None:
            with self._lock:
                code = self.code = self.code or self._compile()
        return code(*arguments)

    def _compile(self) -> Callable[..., Any]:
        from numba import njit  # slow, and most commands need none

        try:
            return njit(self._signatures, cache=True, **self._options)(self._loop)
        except Exception:
            # The cache cannot be written or read: compile without it. If the loop itself is
            # wrong, its error is raised again here.
            return njit(self._signatures, **self._options)(self._loop)
