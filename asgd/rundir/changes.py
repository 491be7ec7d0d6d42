"""Changes of the settings of a run that continues.

A new learning rate or batch size becomes an entry of its schedule at the update where the run
continues, so the configuration tells when it changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from asgd.config.make import load_config, make_config
from asgd.config.tables import RunConfig
from asgd.errors import InputError
from asgd.rundir.files import replace_file
from asgd.rundir.writer import RunWriter

_CONFIG = "config.json"
_SCHEDULES = {"learning_rate": "learning_rate_schedule", "batch_size": "batch_schedule"}
_CHANGEABLE = (
    "run.updates",
    "run.target_loss",
    "run.max_seconds",
    *(f"optimizer.{key}" for key in _SCHEDULES),
    "cluster.lease",
)


def change_settings(path: Path, entries: Iterable[str], update: int) -> RunConfig:
    """Change the configuration of a run from an update on; write it and `settings_changed`.

    Parameters
    ----------
    path
        The run directory; no other process may work on it.
    entries
        Entries `"table.key=value"`; without any, nothing changes.
    update
        Number of the next update.

    Raises
    ------
    InputError
        A setting cannot be changed, or there would be fewer updates than there are.
    """
    old, new = load_config(path / _CONFIG), load_config(path / _CONFIG, entries)
    changes = dict(_differences(msgspec.to_builtins(old), msgspec.to_builtins(new)))
    for key, (_, value) in changes.items():
        if key not in _CHANGEABLE:
            raise InputError(
                f"--set {key}={value}: expected one of {', '.join(_CHANGEABLE)}, because nothing "
                "else can change during a run"
            )
    if new.run.updates < update:
        raise InputError(
            f"run.updates = {new.run.updates}: expected at least {update}, already made"
        )
    if not changes:
        return old
    config = _scheduled(old, new, update)
    content = config.to_json().encode()
    writer = RunWriter(path)
    # The event comes first: a configuration without its digest in an event counts as damaged.
    digest = {_CONFIG: sha256(content).hexdigest()}
    writer.event("settings_changed", update=update, changes=changes, sha256=digest)
    writer.sync()
    replace_file(path / _CONFIG, content, flush=True)
    return config


def _differences(
    old: dict[str, Any], new: dict[str, Any], table: str = ""
) -> Iterable[tuple[str, tuple[Any, Any]]]:
    """Yield the keys with different values, and both values."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            yield from _differences(old[key], value, f"{table}{key}.")
        elif value != old.get(key):
            yield f"{table}{key}", (old.get(key), value)


def _scheduled(old: RunConfig, new: RunConfig, update: int) -> RunConfig:
    """Return the new configuration with the old rates before the update."""
    data = msgspec.to_builtins(new)
    before, after = (msgspec.to_builtins(one.optimizer) for one in (old, new))
    for key, schedule in _SCHEDULES.items():
        if after[key] == before[key] or not update:
            continue
        kept = [pair for pair in zip(*before[schedule].values(), strict=True) if pair[0] < update]
        at, values = zip(*kept, (update, after[key]), strict=True)
        data["optimizer"][key] = before[key]
        data["optimizer"][schedule] = {"at": list(at), "values": list(values)}
    return make_config(data)
