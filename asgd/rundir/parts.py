"""The parts of the tables of a run directory: file names, size limits, missing losses."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from asgd.config.tables import MOST_WORKERS, RunConfig
from asgd.errors import InputError
from asgd.problems.base import MOST_METRICS
from asgd.rundir.columns import (
    COUNTS,
    DISCARDED,
    LOSS,
    MEMBERS,
    METRICS,
    POSITIONS,
    SKIPPED,
    TRACE,
)

T = TypeVar("T")

_PART = re.compile(r"part-(\d{12})(?:-(\d{12}))?\.parquet")
_DAMAGED = re.compile(r".*/_damaged-(\d{12})\.parquet")


def part_name(first: int) -> str:
    """Return the file name of the part that begins with update `first`."""
    return f"part-{first:012d}.parquet"


def merged_name(parts: Sequence[Path]) -> str:
    """Return the file name of the part that replaces consecutive `parts`.

    It contains the first update of the first and of the last of them, and so tells the range.
    """
    return f"part-{first_update(parts[0]):012d}-{last_beginning(parts[-1]):012d}.parquet"


def damaged_name(first: int) -> str:
    """Return the file name under which a damaged part is set aside."""
    return f"_damaged-{first:012d}.parquet"


def first_update(part: Path) -> int:
    """Return the first update of a part, from its file name."""
    return int(part.stem.split("-")[1])


def last_beginning(part: Path) -> int:
    """Return the first update of the last part that was merged into a part, from its file name."""
    return int(part.stem.split("-")[-1])


def parts_of(directory: Path) -> list[Path]:
    """Return the parts of a table in order, none if there is no directory.

    A part that is covered by a merged one is left out.

    Raises
    ------
    InputError
        The directory cannot be read.
    """
    names, before = _names(directory), None
    while names != before:  # a listing may miss both a new merged part and a removed one
        names, before = _names(directory), names
    parts = sorted((directory / name for name in names), key=_beginnings)
    ends = np.maximum.accumulate([-1, *map(last_beginning, parts)])
    return [part for part, end in zip(parts, ends[:-1], strict=True) if first_update(part) > end]


def with_ends(parts: Sequence[Path], end: int) -> list[tuple[Path, int]]:
    """Return each part with the first update of the next one, the last part with `end`.

    A part has no later update than that; two parts of a table may share it, not of the trace.
    """
    following = [*map(first_update, parts[1:]), end]
    return list(zip(parts, following[: len(parts)], strict=True))


def covered_parts(directory: Path) -> list[Path]:
    """Return the parts of a table that a merged part has replaced, but that are still there."""
    return sorted({directory / name for name in _names(directory)} - set(parts_of(directory)))


def undisturbed(read: Callable[[], T], *places: Path) -> T:
    """Return what `read` returns; call it again if it failed and files changed meanwhile.

    The parts in directories are merged or counted as they age, and cut when a server is restored;
    the file of the counts is replaced.
    """
    while True:
        before = _files(places)
        try:
            return read()
        except InputError:
            if before <= _files(places):
                raise


def _files(places: Iterable[Path]) -> set[tuple[Path, int, int]]:
    """Return the files with what tells that one was replaced by another of its name."""
    found = set()
    for place in places:
        for file in [place] if place.name == COUNTS else parts_of(place):
            try:
                status = file.stat()
            except OSError:  # missing, or reading it says why
                found.add((file, -1, -1))
            else:
                found.add((file, status.st_ino, status.st_mtime_ns))
    return found


def _names(directory: Path) -> set[str]:
    try:
        return {name for name in os.listdir(directory) if _PART.fullmatch(name)}
    except FileNotFoundError:
        return set()
    except OSError as error:  # a glob would silently return nothing
        raise InputError(f"{directory}: cannot be read ({error.strerror})") from None


def _beginnings(part: Path) -> tuple[int, int]:
    """Return a sort key: first update, then the part that covers more."""
    return first_update(part), -last_beginning(part)


def most_rows(config: RunConfig, table: str) -> int:
    """Return the largest valid number of rows, because a tiny Parquet file can claim millions."""
    updates = config.run.updates
    if table == COUNTS:
        return sum(most_rows(config, one) for one in (TRACE, MEMBERS, DISCARDED))
    if table in (LOSS, METRICS, SKIPPED):
        each = MOST_METRICS if table == METRICS else 1
        return each * (updates // config.run.eval_every + 2)
    if table not in (MEMBERS, DISCARDED, POSITIONS):
        return updates
    # A worker has at most one gradient discarded at each version, because it then reads it.
    team = max(MOST_WORKERS, config.cluster.workers)
    several = config.cluster.gradients_per_update or 1
    return (updates + 1) * max(team, several)


def missing_losses(
    update: npt.NDArray[np.int64],
    skipped: npt.NDArray[np.int64],
    config: RunConfig,
    reached: int | None = None,
) -> list[int]:
    """Return the update at which each gap in the losses begins.

    Parameters
    ----------
    update
        Updates of the recorded losses, in order.
    skipped
        Updates of those that were skipped. Others before them may still be evaluated.
    config
        The run; it defines when losses are due.
    reached
        Losses are due up to this update; default: the last recorded loss.
    """
    every, updates = config.run.eval_every, config.run.updates
    end = reached if reached is not None else int(update[-1]) if len(update) else -1
    update = np.union1d(update, skipped[skipped <= end])
    before = np.concatenate([[-every], update])
    due = before + every - before % every
    following = np.concatenate([update, [end + 1]])
    found: list[int] = due[(due < following) & (due <= end)].tolist()
    if reached == updates and updates not in update[-1:] and updates % every:
        found.append(updates)
    return found


def reported_losses(events: Iterable[dict[str, Any]]) -> set[int]:
    """Return the first update of each gap in the losses that is reported by the events."""
    named = (str(event.get("file")) for event in events if event["event"] == "loss_damaged")
    return {int(match[1]) for match in map(_DAMAGED.fullmatch, named) if match}
