"""Configurations from files, mappings and `--set`, with every default."""

from __future__ import annotations

import codecs
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from asgd.config.defects import explained, missing_table, refuse_infinite, refuse_unknown_keys
from asgd.config.rules import RULES
from asgd.config.tables import LINEAR_KINDS, SCALAR_KINDS, ProblemConfig, RunConfig, RunSettings
from asgd.errors import InputError
from asgd.stored_json import parse, parse_json, read_bounded

Configuration = RunConfig | Mapping[str, Any] | str | Path


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration from a TOML file, or from the `config.json` of a run.

    Parameters
    ----------
    path
        The file.
    overrides
        Entries `"table.key=value"`; a value that is not valid TOML is taken as a string.

    Raises
    ------
    InputError
        The file cannot be read or the configuration cannot be used.
    """
    path = Path(path)
    try:
        text = _read_text(path)
        data = parse_json(text) if path.suffix == ".json" else parse(text, tomllib.loads)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; `asgd init` writes a configuration to start from"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # JSON, TOML and UTF-8 errors all derive from it
        raise InputError(f"{path}: not a valid configuration file: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected tables such as [problem], got {type(data).__name__}")
    overrides = list(overrides)
    for entry in overrides:
        _override(data, entry)
    if path.name == "config.json" and not any("optimizer.momentum" in one for one in overrides):
        _forget_unused_momentum(data)
    return make_config(data)


def _forget_unused_momentum(data: dict[str, Any]) -> None:
    """Remove `momentum` from a rule that has none: version 0.1.0 stored it with every rule."""
    optimizer = data.get("optimizer")
    if not isinstance(optimizer, dict):
        return
    rule = optimizer.get("rule", "sgd")
    if isinstance(rule, str) and "momentum" not in RULES.get(rule, {}):
        optimizer.pop("momentum", None)


def _read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises
    ------
    OSError, ValueError
        It cannot be read, or is not UTF-8.
    """
    content = read_bounded(path)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:2]:
        raise ValueError("its encoding is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8; save it as UTF-8") from None


def make_config(data: Mapping[str, Any] | None = None) -> RunConfig:
    """Build a configuration from nested mappings, filling in every default.

    >>> config = asgd.make_config({"cluster": {"workers": 8}})
    >>> config.cluster.workers, config.optimizer.batch_size
    (8, 16)

    Raises
    ------
    InputError
        An unknown key, a wrong type or an impossible value.
    """
    if data is not None and not isinstance(data, Mapping):
        raise InputError(f"configuration = {type(data).__name__}: expected nested mappings")
    try:
        data = _plain(data or {})
    except RecursionError:
        raise InputError("configuration: expected tables in tables, nested less deeply") from None
    refuse_unknown_keys(RunConfig, data)
    refuse_infinite(data)
    if (optimizer := data.get("optimizer", {})).get("local_steps") is not None:
        # By default, the server applies the whole difference of the local steps.
        data = {**data, "optimizer": {"learning_rate": 1.0, **optimizer}}
    try:
        config = msgspec.convert(data, RunConfig)
    except msgspec.ValidationError as error:
        raise InputError(explained(str(error), data, RunConfig)) from None
    _refuse_uneven_repeats(config.run)
    return msgspec.structs.replace(config, problem=_resolve_problem(config.problem))


def _refuse_uneven_repeats(run: RunSettings) -> None:
    """Refuse repeats that would end at different updates, which no mean curve can compare."""
    for key in ("target_loss", "max_seconds"):
        value = getattr(run, key)
        if run.repeats > 1 and value is not None:
            raise InputError(
                f"run.{key} = {value:g}: expected none with run.repeats = {run.repeats}, whose "
                "runs would end at different updates"
            )


def as_config(config: Configuration) -> RunConfig:
    """Return a configuration unchanged, build one from a mapping, or read one from a file.

    Raises
    ------
    InputError
        The argument is none of these, or is not a valid configuration.
    """
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, str | Path):
        return load_config(config)
    if config is None:  # probably a mistake; `make_config()` returns the defaults
        raise InputError("configuration = None: expected a mapping, a file or a RunConfig")
    return make_config(config)


def _plain(value: Any) -> Any:
    """Convert NumPy scalars and arrays, at any depth, to Python numbers and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _override(data: dict[str, Any], entry: str) -> None:
    key, separator, text = entry.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not separator or len(names) < 2 or not all(names):
        hint = missing_table(names[-1], RunConfig) if len(names) < 2 else ""
        raise InputError(f"--set {entry}: expected table.key=value{hint}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = data
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {entry}: expected {name} to be a table, not a value")
    table[names[-1]] = value


def _resolve_problem(problem: ProblemConfig) -> ProblemConfig:
    """Fill in the defaults of the kind of problem."""
    if problem.kind in SCALAR_KINDS:
        defaults: dict[str, Any] = {"noise": 2.0, "initial": 1.0}
        if problem.kind == "quadratic":
            defaults["curvature"] = 2.0
    elif problem.kind in LINEAR_KINDS:
        defaults = {"dataset": LINEAR_KINDS[problem.kind], "l2": 1e-3}
    else:
        defaults = {}
    missing = {key: value for key, value in defaults.items() if getattr(problem, key) is None}
    return msgspec.structs.replace(problem, **missing)
