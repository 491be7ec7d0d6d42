"""The parts of the tables of a run directory: file names, size limits, missing losses."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asgd.config import MOST_WORKERS, RunConfig
from asgd.errors import InputError
from asgd.problems.base import MOST_METRICS
from asgd.rundir.columns import DISCARDED, LOSS, MEMBERS, METRICS

_PART = re.compile(r"part-(\d{12})\.parquet")
_DAMAGED = re.compile(r".*/_damaged-(\d{12})\.parquet")


def part_name(first: int) -> str:
    """Return the file name of the part that begins with update `first`."""
    return f"part-{first:012d}.parquet"


def damaged_name(first: int) -> str:
    """Return the file name under which a damaged part is set aside."""
    return f"_damaged-{first:012d}.parquet"


def first_update(part: Path) -> int:
    """Return the first update of a part, from its file name."""
    return int(part.stem.removeprefix("part-"))


def parts_of(directory: Path) -> list[Path]:
    """Return the parts of a table in order, none if there is no directory.

    Raises
    ------
    InputError
        The directory cannot be read.
    """
    try:
        names = sorted(name for name in os.listdir(directory) if _PART.fullmatch(name))
    except FileNotFoundError:
        return []
    except OSError as error:  # a glob would silently return nothing
        raise InputError(f"{directory}: cannot be read ({error.strerror})") from None
    return [directory / name for name in names]


def most_rows(config: RunConfig, table: str) -> int:
    """Return the largest valid number of rows, because a tiny Parquet file can claim millions."""
    updates = config.run.updates
    if table in (LOSS, METRICS):
        each = MOST_METRICS if table == METRICS else 1
        return each * (updates // config.run.eval_every + 2)
    if table not in (MEMBERS, DISCARDED):
        return updates
    # A worker has at most one gradient discarded at each version, because it then reads that one.
    team = max(MOST_WORKERS, config.cluster.workers)
    several = config.cluster.gradients_per_update or 1
    return (updates + 1) * max(team, several)


def missing_losses(
    update: npt.NDArray[np.int64], config: RunConfig, reached: int | None = None
) -> list[int]:
    """Return the update at which each gap in the losses begins.

    Parameters
    ----------
    update
        Updates of the recorded losses, in order.
    config
        The run; it defines when losses are due.
    reached
        Losses are due up to this update; default: the last recorded loss.
    """
    every, updates = config.run.eval_every, config.run.updates
    end = reached if reached is not None else int(update[-1]) if len(update) else -1
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
