"""Rows of a run that keeps counts, written part by part, and the counts that are expected."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from asgd.config.tables import RunConfig
from asgd.rundir.columns import DISCARDED_COLUMNS, TRACE_COLUMNS
from asgd.rundir.reader import read_run
from asgd.rundir.repair import recorded_updates
from asgd.rundir.writer import RunWriter

Columns = dict[str, np.ndarray[Any, Any]]
PART, SPAN, SPANS = 256, 64, 128


def trace(first: int, size: int) -> Columns:
    update = np.arange(first, first + size)
    staleness = np.minimum(update * update % 7, update)
    return {name: np.ones(size, kind) for name, kind in TRACE_COLUMNS.items()} | {
        "update": update,
        "worker": update % 3,
        "staleness": staleness,
        "read_version": update - staleness,
        "applied_seconds": update / 10,
    }


def discarded(first: int, size: int) -> Columns:
    """Return two rows at every tenth update, of staleness 5 and worker 2."""
    update = np.repeat(np.arange(first + -first % 10, first + size, 10), 2)
    update = update[update >= 5]
    return {name: np.ones(len(update), kind) for name, kind in DISCARDED_COLUMNS.items()} | {
        "update": update,
        "worker": np.full(len(update), 2),
        "staleness": np.full(len(update), 5),
        "read_version": update - 5,
        "discarded_seconds": update / 10,
    }


def write(path: Path, config: RunConfig, first: int, parts: int, size: int = PART) -> int:
    """Write parts, and count all but the last of the trace, as if two checkpoints were kept."""
    writer = RunWriter(path)
    writer.discarded(discarded(first, parts * size))
    for _ in range(parts):
        writer.trace(trace(first, size))
        first += size
    writer.count(config, first - size)
    return first


def expected(updates: int, span: int = SPAN) -> pd.DataFrame:
    """Return the counts by pandas, from all rows."""
    keys = ["update", "worker", "staleness"]
    tables = []
    for name, rows, seconds in (
        ("updates", trace(0, updates), "applied_seconds"),
        ("discarded", discarded(0, updates), "discarded_seconds"),
    ):
        table = pd.DataFrame(rows)
        table["update"] = table["update"] // span * span
        tables.append(
            table.assign(**{name: 1}, seconds=table[seconds])[
                [*keys, name, "compute_seconds", "seconds"]
            ]
        )
    joined = pd.concat(tables).fillna(0)
    sums = {"updates": "sum", "discarded": "sum", "compute_seconds": "sum", "seconds": "max"}
    found = joined.groupby(keys, as_index=False).agg(sums).assign(members=0)
    return found[["update", "worker", "staleness", "updates", "members", *list(sums)[1:]]]


def check(path: Path, updates: int, span: int = SPAN) -> None:
    run = read_run(path)
    pd.testing.assert_frame_equal(run.counts, expected(updates, span), check_dtype=False)
    assert run.recorded_updates == recorded_updates(path) == updates
    found, rows = run.outline, trace(0, updates)
    assert found.updates == sum(found.by_worker.values()) == updates
    assert found.mean_staleness == pytest.approx(rows["staleness"].mean(), rel=1e-12)
    assert found.recent_staleness == pytest.approx(rows["staleness"].mean(), rel=0.05)
    assert found.seconds == rows["applied_seconds"][-1]
