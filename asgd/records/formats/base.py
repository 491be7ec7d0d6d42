"""The declaration of a log format; its only code finds the files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asgd.errors import InputError
from asgd.records.columns import Unit
from asgd.records.foreign import COMPRESSED, kind_of

# The columns of a log of items, by our names. The versions are the one that was read, and those
# that were newest when the item's computation began and when it ended.
ITEM_KEYS = (
    "update",
    "read_version",
    "start_version",
    "end_version",
    "staleness",
    "worker",
    "item",
    "samples",
    "loss",
    "seconds",
)


@dataclass(frozen=True)
class Part:
    """One file of a log.

    Attributes
    ----------
    path
        The file.
    given
        Columns known from the path of the file, constant over its rows.
    """

    path: Path
    given: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A format of logs with a row per item.

    Attributes
    ----------
    name
        The value of `--format`.
    what
        Description for the help.
    unit
        Unit of its staleness.
    columns
        Its column for each of our columns in `ITEM_KEYS`; None if the user names them.
    unknown
        Facts that are missing in it, one sentence each.
    parts
        Returns the files of a log in order, none if it is not a log of this format.
    """

    name: str
    what: str
    unit: Unit
    columns: Mapping[str, str] | None
    unknown: Sequence[str]
    parts: Callable[[Path], list[Part]]


def files_of(source: Path, *kinds: str) -> list[Path]:
    """Return a file, or the files of a directory in natural order, with one of these suffixes.

    Raises
    ------
    InputError
        There is nothing at `source`, or two files differ in their compression only.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or directory")
    found = [source] if source.is_file() else list(_inside(source))
    found = sorted((path for path in found if kind_of(path) in kinds), key=natural)
    stems: dict[str, Path] = {}
    for path in found:
        stem = str(path.with_suffix("") if path.suffix in COMPRESSED else path)
        if stem in stems:
            raise InputError(f"{path}: beside {stems[stem].name}, which is the same file; keep one")
        stems[stem] = path
    return found


def natural(path: Path) -> list[tuple[int, str]]:
    """Return a sort key by which part-2 comes before part-10."""
    pieces = re.split(r"(\d+)", str(path))
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def _inside(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        hidden = any(part.startswith((".", "_")) for part in path.relative_to(directory).parts)
        if path.is_file() and not hidden:
            yield path
