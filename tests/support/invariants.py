"""Invariants of every finished run, real or simulated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from asgd.draws import WorkerDraws
from asgd.errors import AsgdError
from asgd.problems.base import Problem
from asgd.problems.make import make_problem
from asgd.rundir.checkpoint import CHECKPOINTS, paths
from asgd.rundir.columns import LOSS_COLUMNS, SHARED, TRACE_COLUMNS
from asgd.rundir.reader import Run
from asgd.shards import Shards
from asgd.simulation.replay import Gradients
from asgd.verify import record_findings, replay_findings
from cluster.storage.checkpoint import load
from tests.support.faults import replay_run


def check_verified(found: Run) -> None:
    """Assert that a finished run passes `asgd verify`, and its last state is that of the replay."""
    check_gradients(found)
    states = {load(path).version: load(path).parameters for path in paths(found.path / CHECKPOINTS)}
    assert len(found.trace) in states
    assert [*record_findings(found), *replay_findings(found, states)] == []
    np.testing.assert_array_equal(replay_run(found)[-1], states[len(found.trace)])


def check_trace(
    run: Run, server: bool = True, added: Mapping[int, int] = MappingProxyType({})
) -> None:
    """Assert the invariants of a finished run in which no gradient was lost.

    `added` has the update at which each worker outside the configuration joined. `server = False`
    skips the invariants that fail for independent staleness, where workers do not read the version
    after their own last gradient.
    """
    trace, loss, config = run.trace, run.loss, run.config
    assert run.state == "finished"
    assert {name: trace[name].dtype for name in trace} == TRACE_COLUMNS
    assert {name: loss[name].dtype for name in loss} == LOSS_COLUMNS

    updates = config.run.updates if run.ended_early is None else len(trace)
    np.testing.assert_array_equal(trace["update"], np.arange(updates))
    np.testing.assert_array_equal(trace["staleness"], trace["update"] - trace["read_version"])
    assert trace["staleness"].min() >= 0
    assert trace["read_version"].min() == 0
    assert set(trace["worker"]) <= {*range(config.cluster.workers), *added}
    samples = config.optimizer.batch_size * config.optimizer.gradients_per_push
    assert (trace["batch_size"] == samples).all()
    assert (trace["compute_seconds"] >= 0).all()
    assert (trace["gradient_norm"] >= 0).all()
    assert trace["applied_seconds"].min() >= 0
    assert (trace["applied_seconds"].diff().dropna() >= 0).all()

    for worker, own in trace.groupby("worker"):
        np.testing.assert_array_equal(own["sequence"], np.arange(len(own)))
        if server:  # the worker next reads the version that its push created
            np.testing.assert_array_equal(
                own["read_version"], [added.get(worker, 0), *(own["update"].to_numpy()[:-1] + 1)]
            )

    every = config.run.eval_every
    due = [*range(0, updates, every), updates]
    np.testing.assert_array_equal(np.sort([*loss["update"], *run.skipped["update"]]), due)
    assert np.isfinite(loss["loss"]).all()
    seconds = np.concatenate([[0.0], trace["applied_seconds"]])
    np.testing.assert_array_equal(loss["seconds"], seconds[loss["update"]])


def check_epochs(run: Run, problem: Problem) -> list[tuple[int, int]]:
    """Assert that no sample is used twice in an epoch.

    Returns, for each part of the samples, how many epochs in a row used every sample, and how many
    have begun. To count, the batches of all applied gradients are drawn again.
    """
    draws, shards = WorkerDraws(run.config, problem), Shards.of(run.config, problem)
    gradients = Gradients.of(run)
    names = ("worker", "sequence", "batch_size", "position")
    rows = zip(*(getattr(gradients, name).tolist() for name in names), strict=True)
    used: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
    for worker, sequence, size, position in rows:
        part = shards.part_of(worker)
        key = part, position // shards.size(part)
        counts = used.setdefault(key, np.zeros(problem.n_samples, np.int64))
        batch = draws.batch(worker, sequence, size, position)
        assert len(batch) == size
        np.add.at(counts, batch, 1)
    for (part, epoch), counts in used.items():
        assert counts.max() == 1, f"a sample of epoch {epoch} was used {counts.max()} times"
        assert counts.sum() == counts[shards.samples(part)].sum()
    whole = {key for key, counts in used.items() if counts.sum() == shards.size(key[0])}
    found = []
    for part in range(len(shards.parts or [0])):
        begun = 1 + max((epoch for other, epoch in used if other == part), default=-1)
        found.append((next(epoch for epoch in count() if (part, epoch) not in whole), begun))
    return found


def check_gradients(run: Run) -> None:
    """Assert that every gradient was applied once or reported, and that staleness is correct.

    For each worker, the numbers of applied, discarded, lost and refused gradients are 0, 1, 2, ...
    without gaps. A restored server reuses some numbers, which voids the older events about them.
    """
    trace, members, discarded = run.trace, run.members, run.discarded
    np.testing.assert_array_equal(trace["update"], np.arange(len(trace)))
    np.testing.assert_array_equal(trace["staleness"], trace["update"] - trace["read_version"])
    assert (trace["staleness"] >= 0).all()
    assert (trace["applied_seconds"].diff().dropna() >= 0).all()
    single = trace[trace["worker"] != SHARED]
    shared = trace[trace["worker"] == SHARED]
    assert set(shared["update"]) == set(members["update"])
    np.testing.assert_array_equal(shared["sequence"], np.arange(len(shared)))
    unused: list[tuple[int, int]] = []
    for event in run.events:
        if event["event"] in ("gradient_lost", "gradient_rejected", "state_reset"):
            unused.append((event["worker"], event["sequence"]))
        elif event["event"] == "server_restored":
            again = {int(worker): number for worker, number in event["sequences"].items()}
            unused = [(w, s) for w, s in unused if s < again.get(w, 0)]
    applied = [
        pair
        for table in (single, members, discarded)
        for pair in zip(table["worker"].tolist(), table["sequence"].tolist(), strict=True)
    ]
    for worker in {worker for worker, _ in (*applied, *unused)}:
        numbers = sorted(number for other, number in (*applied, *unused) if other == worker)
        assert numbers == list(range(len(numbers))), f"gradients of worker {worker}: {numbers}"


def violations(run: Run, falls: list[tuple[int, int]]) -> list[str]:
    """Return the violated invariants of a real run that should be finished.

    `falls` has pairs of versions: the progress fell from the first to the second when a server was
    restored.
    """
    found = []
    checks: list[Callable[[], None]] = [
        lambda: check_complete(run),
        lambda: check_gradients(run),
        lambda: check_lost(run, falls),
        lambda: check_replay(run),
        lambda: check_samples(run),
    ]
    for check in checks:
        try:
            check()
        except (AssertionError, AsgdError) as error:
            found.append(" ".join(str(error).split()) or "an assertion without a message")
    return found


def check_complete(run: Run) -> None:
    updates, every = run.config.run.updates, run.config.run.eval_every
    assert run.state == "finished", f"the run is {run.state}"
    assert len(run.trace) == updates, f"{len(run.trace)} of {updates} updates are recorded"
    known, due = [*run.loss["update"], *run.skipped["update"]], [*range(0, updates, every), updates]
    assert sorted(known) == due, "losses are missing"


def check_lost(run: Run, falls: list[tuple[int, int]]) -> None:
    restored = [event for event in run.events if event["event"] == "server_restored"]
    for event in restored:
        lost = event["from_version"] - event["to_version"]
        assert lost == event["updates_lost"] >= 0, f"{event}"
        assert not (lost and run.config.run.durability == "log"), f"lost despite a log: {event}"
    for high, low in falls:
        told = any(e["from_version"] >= high and e["to_version"] <= low for e in restored)
        assert told, f"the run fell from {high} to {low} without an event"


def check_samples(run: Run) -> None:
    if run.config.data.sampling == "epoch":
        check_epochs(run, make_problem(run.config))


def check_replay(run: Run) -> None:
    final = load(paths(run.path / CHECKPOINTS)[0])
    with threadpool_limits(1):
        points = replay_run(run)
        problem = make_problem(run.config)
        losses = [problem.loss(points[update]) for update in run.loss["update"]]
    same = np.array_equal(points[-1], final.parameters)
    assert same, (
        f"parameters differ from the replay by {np.abs(points[-1] - final.parameters).max()}"
    )
    np.testing.assert_array_equal(run.loss["loss"], losses, "losses differ from the replay")
