"""Error messages for a bad configuration, in one line: `key = value: expected ...`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, get_args

import msgspec

from asgd.errors import InputError, did_you_mean

Table = type[msgspec.Struct]

_TYPES = {
    "float": "a number",
    "int": "a whole number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
    "null": "nothing",
}


def missing_table(name: str, root: Table) -> str:
    """Return a hint for a key that was given without its table."""
    keys = {
        f"{table.name}.{field.name}": field.name
        for table in msgspec.structs.fields(root)
        for field in msgspec.structs.fields(table.type)
    }
    inside = [key for key in keys if key.startswith(f"{name}.")]
    if inside:
        return f"; {name} is a table with the keys {', '.join(keys[key] for key in inside)}"
    close = difflib.get_close_matches(name, keys.values(), n=1)
    meant = [key for key, own in keys.items() if own in close]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def refuse_unknown_keys(table: Table, data: Mapping[str, Any], path: tuple[str, ...] = ()) -> None:
    """Refuse unknown keys, and values in place of tables."""
    known = {field.name: field.type for field in msgspec.structs.fields(table)}
    for key, value in data.items():
        where = ".".join((*path, key))
        if key not in known:
            hint = did_you_mean(key, known)
            kind = "table" if isinstance(value, dict) else "key"
            raise InputError(f"{where}: unknown {kind}; {hint}expected {', '.join(known)}")
        inner = known[key]
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            if not isinstance(value, dict):
                raise InputError(f"{where} = {value!r}: expected a table [{where}]")
            refuse_unknown_keys(inner, value, (*path, key))


def refuse_infinite(value: Any, path: tuple[str, ...] = ()) -> None:
    """Refuse nan and inf, which TOML and Python's JSON allow."""
    if isinstance(value, dict):
        for key, inner in value.items():
            refuse_infinite(inner, (*path, str(key)))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            refuse_infinite(inner, (*path[:-1], f"{path[-1]}[{number}]"))
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{'.'.join(path)} = {value}: expected a finite number")


def explained(message: str, data: Mapping[str, Any], root: Table) -> str:
    """Turn a message of msgspec into `key = value: expected ...`."""
    reason, _, location = message.partition(" - at `$.")
    location = location.rstrip("`")
    value: Any = data
    for name, number in re.findall(r"([^.\[\]]+)|\[(\d+)\]", location):
        value = value[int(number)] if number else value[name]
    if isinstance(value, dict):
        return f"{location or 'configuration'}: {reason}"
    enum = re.match(r"Invalid enum value", reason)
    if enum:
        reason = f"expected one of {', '.join(_choices(location, root))}"
    expected = reason.partition(", got ")[0]  # our message contains the value
    reason = re.sub(
        "`([^`]*)`",
        lambda types: " or ".join(_TYPES.get(name, name) for name in types[1].split(" | ")),
        expected,
    )
    return f"{location} = {value!r}: {reason[:1].lower() + reason[1:]}"


def _choices(location: str, root: Table) -> tuple[str, ...]:
    table: Any = root
    for name in location.split("."):
        table = next(field.type for field in msgspec.structs.fields(table) if field.name == name)
    return get_args(table)
