"""Consistency checks of the tables of a run; each returns its first finding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from asgd.arrays import Columns

Rows = npt.NDArray[np.bool_]


def trace_defect(trace: Columns, first: int = 0) -> str | None:
    """Return the first fault in rows of a trace that begin at update `first`, or None."""
    update = np.arange(first, first + len(trace["update"]))
    wrong = np.flatnonzero(trace["update"] != update)
    if len(wrong):
        return f"update {update[wrong[0]]} is missing"
    staleness = trace["staleness"] != update - trace["read_version"]
    checks = (
        ("staleness", "is not update - read_version", staleness),
        ("worker", "is not a worker", trace["worker"] < -1),
        *_of_a_gradient(trace, update),
        *_of_a_clock(trace["applied_seconds"], "applied_seconds"),
        ("gradient_norm", "is not a norm", ~(trace["gradient_norm"] >= 0)),
    )
    return _first(trace, update, checks)


def member_defect(members: Columns) -> str | None:
    """Return the first fault in rows of `members`, or None."""
    update = members["update"]
    checks = (
        ("update", "is negative or after the next one", _unordered(update, 0)),
        ("worker", "is not a worker", members["worker"] < 0),
        *_of_a_gradient(members, update),
    )
    return _first(members, update, checks)


def discarded_defect(discarded: Columns) -> str | None:
    """Return the first fault in rows of `discarded`, or None."""
    update = discarded["update"]
    staleness = discarded["staleness"] != update - discarded["read_version"]
    checks = (
        ("update", "is negative or after the next one", _unordered(update, 0)),
        ("staleness", "is not update - read_version", staleness),
        ("worker", "is not a worker", discarded["worker"] < 0),
        *_of_a_gradient(discarded, update),
        *_of_a_clock(discarded["discarded_seconds"], "discarded_seconds"),
    )
    return _first(discarded, update, checks)


def position_defect(positions: Columns) -> str | None:
    """Return the first fault in rows of positions, or None."""
    update = positions["update"]
    checks = (
        ("update", "is negative or after the next one", _unordered(update, 0)),
        ("worker", "is not a worker", positions["worker"] < 0),
        ("position", "is negative", positions["position"] < 0),
    )
    return _first(positions, update, checks)


def loss_defect(loss: Columns) -> str | None:
    """Return the first fault in rows of losses, or None."""
    update = loss["update"]
    checks = (
        ("update", "is negative or not before the next one", _unordered(update, 1)),
        *_of_a_clock(loss["seconds"], "seconds"),
    )
    return _first(loss, update, checks)


def skipped_defect(skipped: Columns) -> str | None:
    """Return the first fault in rows of skipped losses, or None."""
    update = skipped["update"]
    check = ("update", "is negative or not before the next one", _unordered(update, 1))
    return _first(skipped, update, [check])


Check = tuple[str, str, Rows]


def _of_a_gradient(table: Columns, update: npt.NDArray[np.int64]) -> Iterator[Check]:
    read_version, seconds = table["read_version"], table["compute_seconds"]
    yield (
        "read_version",
        "is negative or too late",
        (read_version < 0) | (read_version > update),
    )
    yield "sequence", "is negative", table["sequence"] < 0
    yield "batch_size", "is not positive", table["batch_size"] < 1
    yield "compute_seconds", "is not a time", ~((seconds >= 0) & np.isfinite(seconds))


def _of_a_clock(seconds: npt.NDArray[np.float64], name: str) -> Iterator[Check]:
    yield name, "is not a time", ~((seconds >= 0) & np.isfinite(seconds))
    backwards = np.zeros(len(seconds), bool)
    backwards[1:] = np.diff(seconds) < 0
    yield name, "runs backwards", backwards


def _unordered(update: npt.NDArray[np.int64], least_step: int) -> Rows:
    wrong: Rows = update < 0
    wrong[:-1] |= np.diff(update) < least_step
    return wrong


def _first(table: Columns, update: npt.NDArray[np.int64], checks: Iterable[Check]) -> str | None:
    for name, what, wrong in checks:
        if wrong.any():
            row = int(wrong.argmax())
            return f"update {update[row]}: {name} {table[name][row]:.6g} {what}"
    return None
