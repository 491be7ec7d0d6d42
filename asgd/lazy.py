"""Lazy exports: a package imports a module when one of its names is first used.

`import asgd` imports nothing else, so `asgd --help` answers at once. The library `lazy_loader` does
the same, but cannot leave names that need an extra out of `__all__`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy(
    package: str, homes: Mapping[str, Sequence[str]], optional: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package.

    Parameters
    ----------
    package
        Name of the package.
    homes
        Public names by the dotted name of their module; names listed under the package itself are
        submodules.
    optional
        Names whose module needs an extra. They are imported and listed by `dir()` like the others,
        but are not in `__all__`, so `from package import *` works without the extra.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if home[name] == package:
            return import_module(f"{package}.{name}")
        value = getattr(import_module(home[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted(home)

    return get, names, [name for name in home if name not in optional]
