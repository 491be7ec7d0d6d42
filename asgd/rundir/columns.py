"""The files of a run directory and the columns of its tables.

    config.json            the resolved configuration
    environment.json       versions, host, cores, start time
    trace/part-*.parquet   a row per applied update, columns `TRACE_COLUMNS`
    members/part-*.parquet a row per gradient of each update by a mean of several gradients,
                           columns `MEMBER_COLUMNS`; only if there are such updates
    discarded/part-*.parquet
                           a row per gradient that arrived and was discarded, columns
                           `DISCARDED_COLUMNS`; only if there are any
    positions/part-*.parquet
                           a row per applied gradient, columns `POSITION_COLUMNS`; only with
                           data.sampling = "epoch"
    loss.parquet/part-*.parquet
                           a row per evaluation, columns `LOSS_COLUMNS`
    skipped/part-*.parquet a row per loss that was skipped for lack of time, columns
                           `SKIPPED_COLUMNS`; only if there are any
    metrics/part-*.parquet a row per evaluation and metric of the problem, columns `METRIC_COLUMNS`;
                           only if it has metrics
    counts.parquet         with run.record = "counts": in place of most rows of the tables above,
                           their numbers, columns `COUNT_COLUMNS`
    events.jsonl           start, worker_lost, finish, ...: one JSON object per line
    checkpoints/           of real runs: the state from which an interrupted run resumes

Files are written under a temporary name and renamed, so a torn write never replaces a good file.
Events are appended line by line; a torn line is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from asgd.arrays import Columns
from asgd.rundir.tables import Types

TRACE, MEMBERS, DISCARDED, POSITIONS = "trace", "members", "discarded", "positions"
LOSS, METRICS, SKIPPED = "loss.parquet", "metrics", "skipped"
COUNTS = "counts.parquet"

SHARED = -1  # the worker of an update by the mean of several gradients

TRACE_COLUMNS = {
    "update": np.int64,  # number of this update: 0, 1, ..., each once
    "worker": np.int32,  # worker that computed the gradient, or SHARED
    "sequence": np.int64,  # number of the gradient among those of its worker: 0, 1, ...
    "read_version": np.int64,  # updates applied before the snapshot was read
    "staleness": np.int64,  # update - read_version
    "batch_size": np.int32,  # samples in the gradient, or in all local steps together
    "compute_seconds": np.float64,  # from snapshot received to gradient ready
    "applied_seconds": np.float64,  # from the start of the run to the update
    "gradient_norm": np.float64,  # Euclidean norm of the gradient, or of the difference
}
MEMBER_COLUMNS = {
    "update": np.int64,  # the SHARED update by the mean
    "worker": np.int32,  # from here on as in the trace
    "sequence": np.int64,
    "read_version": np.int64,
    "batch_size": np.int32,
    "compute_seconds": np.float64,
}
DISCARDED_COLUMNS = {
    "update": np.int64,  # number of the next update when it was discarded
    "worker": np.int32,  # as in the trace
    "sequence": np.int64,
    "read_version": np.int64,
    "staleness": np.int64,  # update - read_version
    "batch_size": np.int32,
    "compute_seconds": np.float64,
    "discarded_seconds": np.float64,  # from the start of the run, at most to its last update
}
POSITION_COLUMNS = {
    "update": np.int64,  # the update that the gradient went into
    "worker": np.int32,  # worker that computed it
    "position": np.int64,  # of its first sample in the epochs of the worker's part: 0, 1, ...
}
COUNT_COLUMNS = {
    "update": np.int64,  # the first update of a span, all of equal length
    "worker": np.int32,  # as in the trace, SHARED included
    "staleness": np.int64,
    "updates": np.int64,  # number of updates of this span, worker and staleness
    "members": np.int64,  # number of gradients of means
    "discarded": np.int64,  # number of discarded gradients
    "compute_seconds": np.float64,  # their sum over all of these
    "seconds": np.float64,  # from the start of the run to the last of the updates or discarded
}
LOSS_COLUMNS = {"update": np.int64, "seconds": np.float64, "loss": np.float64}
SKIPPED_COLUMNS = {"update": np.int64}
METRIC_COLUMNS: Types = {"update": np.int64, "name": str, "value": np.float64}
TABLES: dict[str, Types] = {  # those in parts
    TRACE: TRACE_COLUMNS,
    MEMBERS: MEMBER_COLUMNS,
    DISCARDED: DISCARDED_COLUMNS,
    POSITIONS: POSITION_COLUMNS,
    LOSS: LOSS_COLUMNS,
    METRICS: METRIC_COLUMNS,
    SKIPPED: SKIPPED_COLUMNS,
}


def of_gradients(trace: Any, members: Any, names: Sequence[str]) -> Columns:
    """Return columns of the applied gradients by update, with members in place of SHARED updates.

    Parameters
    ----------
    trace, members
        The two tables, `Columns` or data frames.
    names
        Names of columns of both tables.
    """
    alone = np.asarray(trace["worker"]) != SHARED
    update = np.concatenate([np.asarray(trace["update"])[alone], members["update"]])
    order = np.argsort(update, kind="stable")
    return {
        name: np.concatenate([np.asarray(trace[name])[alone], members[name]])[order]
        for name in names
    }
