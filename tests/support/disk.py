"""Simulates a power failure: the possible contents of a directory if power is lost at any moment.

The bytes of a file are safe once it was flushed, and a name once its directory was. Any part of
everything else may survive, in any order: a new name before its bytes, bytes before their name,
half of an append, zeros for the rest of an allocation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR
VARIANTS = ("flushed", "names", "mixed", "kept")


@dataclass(eq=False)
class _File:
    """The content of a file: the bytes on the disk, and those visible to a reader."""

    flushed: bytes = b""
    current: bytes = b""

    def some(self, random: np.random.Generator) -> bytes:
        """Return a possible content after a power failure."""
        known, seen = self.flushed, self.current
        if len(seen) <= len(known) or not seen.startswith(known) or random.random() < 0.3:
            return known if random.random() < 0.5 else seen
        torn = seen[: random.integers(len(known), len(seen), endpoint=True)]
        return torn if random.random() < 0.5 else torn + bytes(len(seen) - len(torn))


Names = dict[str, "_File | Names"]


@dataclass
class Disk:
    """Watches a directory in this process; calls `before` ahead of each change.

    Attributes
    ----------
    root
        The directory, which need not exist yet.
    before
        Called with the disk and the next step.
    steps
        The steps so far.
    """

    root: Path
    before: Callable[[Disk, str], None]
    steps: list[str] = field(default_factory=list)
    _files: dict[int, _File] = field(default_factory=dict)
    _flushed: dict[Path, dict[str, _File | None]] = field(default_factory=dict)
    _on: bool = False

    @contextmanager
    def watched(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Watch the directory during the block."""
        writev = os.writev

        def flush(descriptor: int) -> None:
            """Only record the flush: a real one is slow and not needed."""
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self._step(f"flush {self._name(path)}", path)
            self._note_flushed(descriptor, path)

        def write(descriptor: int, parts: Any) -> int:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self._step(f"write {self._name(path)}", path)
            return writev(descriptor, parts)

        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(os, "writev", write)
        sys.addaudithook(self._hear)
        self._on = True
        try:
            yield
        finally:
            self._on = False
            monkeypatch.undo()

    def image(self, variant: str, random: np.random.Generator) -> dict[Path, bytes | None]:
        """Return the content after a power failure, by relative path; None is a directory.

        "flushed" has only what was flushed; "names" has all names, but only flushed bytes; "mixed"
        has any part of both; "kept" has everything, as if only this process were killed.
        """
        left: dict[Path, bytes | None] = {}
        self._add_directory(self.root, variant, random, left)
        return left

    def _add_directory(
        self,
        directory: Path,
        variant: str,
        random: np.random.Generator,
        left: dict[Path, bytes | None],
    ) -> None:
        safe, seen = self._flushed.get(directory, {}), self._seen(directory)
        left[directory.relative_to(self.root)] = None
        for name in sorted({*safe, *seen}):
            names = {"flushed": safe, "mixed": (safe, seen)[random.integers(2)]}.get(variant, seen)
            if name not in names:
                continue
            file, path = names[name], directory / name
            if file is None:
                self._add_directory(path, variant, random, left)
            else:
                some = {"kept": file.current, "mixed": file.some(random)}.get(variant, file.flushed)
                left[path.relative_to(self.root)] = some

    def _seen(self, directory: Path) -> dict[str, _File | None]:
        if not directory.is_dir():
            return {}
        with os.scandir(directory) as entries:
            return {
                entry.name: None if entry.is_dir() else self._files[entry.inode()]
                for entry in entries
            }

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on or event not in _CHANGES or isinstance(arguments[0], int):
            return
        path = Path(os.path.abspath(os.fsdecode(arguments[0])))
        if event != "open" or arguments[2] & _WRITES:
            self._step(f"{event.removeprefix('os.')} {self._name(path)}", path)

    def _step(self, what: str, path: Path) -> None:
        if not path.is_relative_to(self.root):
            return
        self._on = False  # changes that `before` makes are no steps
        self._look()
        self.before(self, what)
        self.steps.append(what)
        self._on = True

    def _look(self) -> None:
        """Record what a reader sees; forget files that were unlinked."""
        seen: dict[int, _File] = {}
        for path in self.root.rglob("*"):
            if path.is_file():
                inode = path.stat().st_ino
                file = seen[inode] = self._files.get(inode) or _File()
                file.current = path.read_bytes()
        self._files = seen

    def _note_flushed(self, descriptor: int, path: Path) -> None:
        if not path.is_relative_to(self.root):
            return
        self._look()
        if path.is_dir():
            self._flushed[path] = self._seen(path)
        else:
            file = self._files.get(os.fstat(descriptor).st_ino)
            if file is not None:
                file.flushed = file.current

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


def lay_out(image: dict[Path, bytes | None], directory: Path) -> Path:
    """Write an image into a new directory."""
    for path, content in image.items():
        if content is None:
            (directory / path).mkdir(parents=True)
        else:
            (directory / path).write_bytes(content)
    return directory
