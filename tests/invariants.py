"""What holds for the trace of every finished run, real or simulated."""

from __future__ import annotations

import numpy as np

from asgd.trace import LOSS_COLUMNS, TRACE_COLUMNS, Run


def check_trace(run: Run, server: bool = True) -> None:
    """Assert the invariants of a finished run in which no gradient was lost.

    `server = False` leaves out those that independent staleness does not have: there, workers do
    not read the version that their own last gradient made.
    """
    trace, loss, config = run.trace, run.loss, run.config
    assert run.state == "finished"
    assert {name: trace[name].dtype for name in trace} == TRACE_COLUMNS
    assert {name: loss[name].dtype for name in loss} == LOSS_COLUMNS

    updates = config.run.updates
    np.testing.assert_array_equal(trace["update"], np.arange(updates))
    np.testing.assert_array_equal(trace["staleness"], trace["update"] - trace["read_version"])
    assert trace["staleness"].min() >= 0
    assert trace["read_version"].min() == 0
    assert set(trace["worker"]) <= set(range(config.cluster.workers))
    assert (trace["batch_size"] == config.optimizer.batch_size).all()
    assert (trace["compute_seconds"] >= 0).all()
    assert (trace["gradient_norm"] >= 0).all()
    assert trace["applied_seconds"].min() >= 0
    assert (trace["applied_seconds"].diff().dropna() >= 0).all()

    for _, own in trace.groupby("worker"):
        np.testing.assert_array_equal(own["sequence"], np.arange(len(own)))
        if server:  # a push is answered with the version it made, and that is what is read next
            np.testing.assert_array_equal(
                own["read_version"], [0, *(own["update"].to_numpy()[:-1] + 1)]
            )

    every = config.run.eval_every
    due = [*range(0, updates, every), updates]
    np.testing.assert_array_equal(loss["update"], due)
    assert np.isfinite(loss["loss"]).all()
    seconds = np.concatenate([[0.0], trace["applied_seconds"]])
    np.testing.assert_array_equal(loss["seconds"], seconds[due])
