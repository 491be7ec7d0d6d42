"""Writes a run directory."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from asgd.config.tables import RunConfig
from asgd.errors import InputError, written
from asgd.rundir.aging import AgingTable
from asgd.rundir.columns import (
    COUNTS,
    DISCARDED,
    LOSS,
    MEMBERS,
    METRIC_COLUMNS,
    METRICS,
    POSITIONS,
    SKIPPED,
    TRACE,
)
from asgd.rundir.counting import count_rows
from asgd.rundir.files import is_gone, make_directory, replace_file
from asgd.rundir.parts import most_rows
from asgd.seals import sealed_line


def _allow() -> None:
    """Check nothing, because no other process can take over the run."""


class RunWriter:
    """Writes one run directory.

    Parameters
    ----------
    path
        The directory.
    check
        Called before each event; it raises if this process may no longer write.
    """

    def __init__(self, path: Path, check: Callable[[], None] = _allow) -> None:
        self.path = path
        self.check = check
        self._unsynced: set[Path] = set()
        self._tables: dict[str, AgingTable] = {}
        self._counts = True

    @classmethod
    def create(cls, path: str | Path, config: RunConfig) -> RunWriter:
        """Create the directory with its configuration, environment and `start` event.

        Raises
        ------
        InputError
            The directory cannot be written or is not empty.
        """
        path = Path(path)
        make_directory(path)
        with written(path):
            (path / "trace").mkdir()
            writer = cls(path)
            files = {
                "config.json": config.to_json().encode(),
                "environment.json": f"{json.dumps(_environment(), indent=2)}\n".encode(),
            }
            for name, content in files.items():
                # Flushed to the disk, because checkpoints cannot be used without them.
                replace_file(path / name, content, flush=True)
            digests = {name: sha256(content).hexdigest() for name, content in files.items()}
            writer.event("start", sha256=digests)
            writer.sync()
        return writer

    def trace(self, columns: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]) -> None:
        """Write one part of the trace: `TRACE_COLUMNS` of equal length, ordered by `update`."""
        self._part(TRACE, columns)

    def members(self, columns: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]) -> None:
        """Write one part of the members: `MEMBER_COLUMNS` of equal length, ordered by `update`."""
        self._part(MEMBERS, columns)

    def discarded(self, columns: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]) -> None:
        """Write one part of the discarded gradients: `DISCARDED_COLUMNS`, ordered by `update`.

        No two parts may begin with the same update.
        """
        self._part(DISCARDED, columns)

    def positions(self, columns: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]) -> None:
        """Write one part of the positions: `POSITION_COLUMNS` of equal length, by `update`."""
        self._part(POSITIONS, columns)

    def loss(self, columns: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]) -> None:
        """Write one part of the losses: `LOSS_COLUMNS` of equal length, ordered by `update`."""
        self._part(LOSS, columns)

    def skipped(self, updates: Sequence[int] | np.ndarray[Any, Any]) -> None:
        """Write one part of the losses that were not evaluated, ordered by update."""
        self._part(SKIPPED, {"update": updates})

    def metrics(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Write one part of the metrics: for each update, numbers by name; ordered by update."""
        flat = [(update, *one) for update, values in rows for one in values.items()]
        if flat:
            self._part(METRICS, dict(zip(METRIC_COLUMNS, zip(*flat, strict=True), strict=True)))

    def count(self, config: RunConfig, before: int) -> None:
        """With `run.record = "counts"`, replace rows of the updates before `before` by counts.

        If that fails, because the disk is full or a part is damaged, rows are kept from then on,
        and not merged: readers ignore a part with rows that are counted already.
        """
        if config.run.record == "updates" or not self._counts:
            return
        kept = (TRACE, MEMBERS, DISCARDED, POSITIONS)
        tables = {name: self._table(name) for name in kept if (self.path / name).exists()}
        try:
            count_rows(self.path, tables, before, most_rows(config, COUNTS))
        except (OSError, InputError):
            self._counts = False
            for table in tables.values():
                table.keep_parts()

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event; `fields` must be JSON values."""
        self.check()
        line = sealed_line({"event": kind, "time": time.time(), **fields}) + b"\n"
        opener = _existing if kind != "start" and is_gone(self.path) else None
        with open(self.path / "events.jsonl", "ab+", opener=opener) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # end a torn line, so that this event is readable
                    line = b"\n" + line
            file.write(line)

    def note_change(self, path: Path) -> None:
        """Note a renamed or removed file; the next `sync` flushes its directory."""
        self._unsynced.add(path)

    def sync(self) -> None:
        """Flush everything written since the last call to the disk."""
        changed = self._unsynced | {self.path / "events.jsonl"}
        files = {path for path in changed if path.exists()}
        for path in files | {path.parent for path in changed}:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._unsynced.clear()

    def _part(self, name: str, columns: Mapping[str, Any]) -> None:
        if not len(columns["update"]):
            return
        self._unsynced.add(self._table(name).add(columns))

    def _table(self, name: str) -> AgingTable:
        if name not in self._tables:
            (self.path / name).mkdir(exist_ok=True)
            self._tables[name] = AgingTable(self.path / name)
        return self._tables[name]


def _existing(path: str, flags: int) -> int:
    """Open an existing file: a run must not write to the empty directory of an unmounted disk."""
    return os.open(path, flags & ~os.O_CREAT)


def default_path(config: RunConfig, name: str | None = None) -> Path:
    """Return a new path under runs/ from `name`, by default the kind of problem, and the time."""
    name = name or config.problem.kind.replace(":", "-")
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _environment() -> dict[str, Any]:
    packages = ("asgd", "numpy", "scipy", "pandas", "pyarrow", "ray")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }
