"""Reads untrusted JSON files: refuses values that no run writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from asgd.errors import InputError
from asgd.seals import is_sealed

_MOST_BYTES = 256_000_000  # of a file that is read as a whole
_DEEPEST = 64  # nesting of tables and lists, far below Python's recursion limit
_LARGEST = 2**63  # absolute value of integers

Text = TypeVar("Text")
Kind = TypeVar("Kind")


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; see `parse`."""
    return parse(text, json.loads)


def parse(text: Text, parser: Callable[[Text], Any]) -> Any:
    """Parse a text with a parser of the standard library, and check the value.

    Raises
    ------
    ValueError
        The parser refuses the text, or `check_plain` the value.
    """
    try:
        value = parser(text)
    except RecursionError:
        raise ValueError("tables or lists nested too deeply") from None
    check_plain(value)
    return value


def read_bounded(path: Path) -> bytes:
    """Return the content of a file.

    Raises
    ------
    OSError
        It cannot be read.
    ValueError
        It is too large to come from a run.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MOST_BYTES:
            raise ValueError(f"{size:,} bytes, expected at most {_MOST_BYTES:,}")
        return file.read()


def read_sealed(path: Path, kind: type[Kind]) -> Kind:
    """Check the digest of a JSON file, and return its content as an object of type `kind`.

    Raises
    ------
    OSError, ValueError, RecursionError
        The file cannot be read, is damaged, or contains something else.
    """
    import msgspec  # a `StalenessLog` does not need it

    content = read_bounded(path)
    is_sealed(content)
    return msgspec.json.decode(content, type=kind)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises
    ------
    InputError
        The file is missing, unreadable, damaged or not a JSON object.
    """
    try:
        content = read_bounded(path)
        value = parse_json(content)
        is_sealed(content)
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {type(value).__name__}")
        value.pop("sha256", None)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason})") from None
    return value


def check_plain(value: Any) -> None:
    """Check the limits on values in configurations and run directories.

    Raises
    ------
    ValueError
        The value is nested too deeply, or contains an integer beyond 64 bits or a lone surrogate.
    """
    level = [value]
    for _ in range(_DEEPEST):
        if not level:
            return
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str):
                one.encode()  # UnicodeEncodeError is a ValueError
            elif isinstance(one, int) and abs(one) > _LARGEST:
                raise ValueError("an integer beyond 64 bits")
        level = inner
    raise ValueError("tables or lists nested too deeply")
