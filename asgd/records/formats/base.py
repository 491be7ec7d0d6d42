"""The declaration of a log format; its only code finds the files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asgd.errors import InputError
from asgd.records.columns import Unit
from asgd.records.foreign import COMPRESSED, kind_of

# Our columns that a log of items can have. Beside those of `ITEM_COLUMNS` these are versions: the
# one read, and the newest ones when the item's computation began and when it ended.
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
        Columns that the place of the file tells, the same for all of its rows.
    """

    path: Path
    given: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A format of logs with a row per item.

    Attributes
    ----------
    name
        As `--format` takes it.
    what
        What it is, for the help.
    unit
        What its staleness counts.
    columns
        Their column of each of ours, of `ITEM_KEYS`; None if the user names them.
    unknown
        What it cannot tell, a sentence each.
    parts
        Returns the files of a log in their order, none if it is no log of this format.
    """

    name: str
    what: str
    unit: Unit
    columns: Mapping[str, str] | None
    unknown: Sequence[str]
    parts: Callable[[Path], list[Part]]


def files_of(source: Path, *kinds: str) -> list[Path]:
    """Return a file, or the files of a directory in natural order, that have one of these ends.

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
    """Return the key by which part-2 comes before part-10."""
    pieces = re.split(r"(\d+)", str(path))
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def _inside(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        hidden = any(part.startswith((".", "_")) for part in path.relative_to(directory).parts)
        if path.is_file() and not hidden:
            yield path
