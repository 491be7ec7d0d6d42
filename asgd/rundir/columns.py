"""The files of a run directory and the columns of its tables.

    config.json            the resolved configuration
    environment.json       versions, host, cores, start time
    trace/part-*.parquet   a row per applied update, columns `TRACE_COLUMNS`
    members/part-*.parquet a row per gradient of each update that is a mean of several workers',
                           columns `MEMBER_COLUMNS`; only where there are such updates
    loss.parquet/part-*.parquet
                           a row per evaluation, columns `LOSS_COLUMNS`
    events.jsonl           start, worker_lost, finish, ...: one JSON object per line
    checkpoints/           of real runs: what a run that was cut short goes on from

Files are written under a temporary name and renamed, so a torn write never hides what was already
there; events are appended line by line and a torn line is ignored.
"""

from __future__ import annotations

import numpy as np

from asgd.rundir.tables import Types

TRACE, MEMBERS, LOSS = "trace", "members", "loss.parquet"

SHARED = -1  # the worker of an update that is the mean of several workers' gradients

TRACE_COLUMNS = {
    "update": np.int64,  # number of this update: 0, 1, ..., each once
    "worker": np.int32,  # who computed the gradient, or SHARED
    "sequence": np.int64,  # the worker's own number of this gradient: 0, 1, ...
    "read_version": np.int64,  # updates applied before the snapshot was read
    "staleness": np.int64,  # update - read_version
    "batch_size": np.int32,  # samples in the gradient
    "compute_seconds": np.float64,  # from snapshot received to gradient ready
    "applied_seconds": np.float64,  # from the start of the run to the update
    "gradient_norm": np.float64,  # Euclidean norm of the gradient
}
MEMBER_COLUMNS = {
    "update": np.int64,  # the SHARED update the gradient went into
    "worker": np.int32,  # as in the trace, from here on
    "sequence": np.int64,
    "read_version": np.int64,
    "batch_size": np.int32,
    "compute_seconds": np.float64,
}
LOSS_COLUMNS = {"update": np.int64, "seconds": np.float64, "loss": np.float64}
TABLES: dict[str, Types] = {TRACE: TRACE_COLUMNS, MEMBERS: MEMBER_COLUMNS, LOSS: LOSS_COLUMNS}
