"""Code of the user that a configuration names: it is imported, called and checked.

Security: a module is imported only if the configuration names it. The configuration may come from
an untrusted run directory, and many functions do harm with chosen arguments (`os:system`,
`pandas:read_pickle`). So a plain function is called only if the user's own module defines it; from
the standard library, installed packages and this package, only classes with the required methods
are called.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from asgd.errors import InputError, message_of

_OURS = ("asgd", "analysis", "cluster")


def import_named(named: str, where: str, what: str, methods: Sequence[str]) -> Callable[..., Any]:
    """Return the class or function "package.module:name".

    Parameters
    ----------
    where
        The key and its value, for messages.
    what
        "factory" or "rule", for messages.
    methods
        A class with these methods may be called wherever it is defined.

    Raises
    ------
    InputError
        The module cannot be imported or has no such name, or the name may not be called.
    """
    module_name, _, name = named.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{where}: {error}; looked for in {here}, on PYTHONPATH and among installed packages"
        ) from error
    except Exception as error:
        raise InputError(
            f"{where}: module {module_name} cannot be imported: {_line(error)}"
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        found = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise InputError(
            f"{where}: module {module_name} has no {what} {name!r}; "
            f"it has {', '.join(found) or 'none'}"
        )
    has_methods = isinstance(factory, type) and all(hasattr(factory, m) for m in methods)
    if not has_methods and any(map(_is_installed, {module, inspect.getmodule(factory) or module})):
        raise InputError(
            f"{where}: {name} is not defined in a module of your own: expected a class with "
            f"{', '.join(methods)}"
        )
    return cast(Callable[..., Any], factory)


def check_options(
    where: str, key: str, factory: Callable[..., Any], options: Mapping[str, Any]
) -> None:
    """Refuse options that are not arguments of the factory; `key` is their name in messages."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some classes written in C have no signature
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        accepted = ", ".join(signature.parameters) or "none"
        raise InputError(f"{where}: {key}: {error}; {factory.__name__} takes {accepted}") from error


def _is_installed(module: ModuleType) -> bool:
    """Whether a module belongs to the standard library, an installed package or this package."""
    if module.__name__.partition(".")[0] in (*_OURS, *sys.stdlib_module_names):
        return True
    path = Path(getattr(module, "__file__", None) or "")
    standard = map(Path, (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")))
    return bool({"site-packages", "dist-packages"}.intersection(path.parts)) or any(
        path.is_relative_to(place) for place in standard
    )


def call_user(where: str, name: str, code: Callable[[], Any]) -> Any:
    """Call the user's code; turn an exception into an InputError with its place."""
    try:
        return code()
    except (Exception, SystemExit) as error:
        raise InputError(f"{where}: {name} raised {_line(error)}") from error


def _line(error: BaseException) -> str:
    """Return the type, message and location (in the user's code) of an exception in one line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename if trace else __file__
    ours = Path(file).is_relative_to(Path(__file__).parent)
    place = f" ({file}:{trace.tb_lineno})" if trace and not ours else ""
    return f"{type(error).__name__}: {message_of(error)}{place}"
