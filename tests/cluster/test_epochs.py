"""Servers use every sample once an epoch, even if workers or the server are killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.problems.make import make_problem
from asgd.progress import Progress
from asgd.rundir.checkpoint import CHECKPOINTS, paths
from asgd.rundir.columns import SHARED
from asgd.rundir.reader import read_run
from cluster import run
from cluster.core.ledger import Record
from cluster.storage.checkpoint import load
from cluster.storage.verify import verify
from tests.support.faults import Crowd
from tests.support.invariants import check_epochs, check_gradients
from tests.support.machine import Machine
from tests.support.processes import actor_processes

MODES: dict[str, dict[str, Any]] = {
    "async": {"mode": "async"},
    "bounded": {"mode": "bounded", "max_staleness": 2},
    "sync": {"mode": "sync"},
    "uniform": {"schedule": "uniform"},
    "ringmaster": {"discard_above": 1},
    "fedbuff": {"mode": "buffered", "gradients_per_update": 4},
    "rennala": {"mode": "buffered", "gradients_per_update": 4, "discard_above": 0},
    "fastest": {"mode": "sync", "gradients_per_update": 2},
    "kept": {"mode": "sync", "gradients_per_update": 2, "late": "keep"},
}


def configure(updates: int, **tables: dict[str, Any]) -> RunConfig:
    data = {
        "problem": {"kind": "logistic"},  # 569 samples
        "data": {"sampling": "epoch"},
        "optimizer": {"batch_size": 64},
        "cluster": {"workers": 3},
        "run": {"updates": updates, "checkpoint_every": 10},
    }
    return make_config({name: {**table, **tables.get(name, {})} for name, table in data.items()})


def used_positions(record: Record) -> list[int]:
    """Return all positions of a record of shared samples, with repetitions."""
    own, members = record.trace["worker"] != SHARED, record.members
    update = np.concatenate([record.trace["update"][own], members["update"]])
    size = np.concatenate([record.trace["batch_size"][own], members["batch_size"]])
    order = np.argsort(update, kind="stable")
    np.testing.assert_array_equal(record.positions["update"], update[order])
    rows = zip(record.positions["position"].tolist(), size[order].tolist(), strict=True)
    return [position for first, length in rows for position in range(first, first + length)]


@pytest.mark.parametrize("cluster", MODES.values(), ids=MODES)
@settings(max_examples=25, deadline=None)
@given(choices=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=50))
def test_no_position_is_used_twice_or_left_out(
    cluster: dict[str, Any], choices: list[tuple[int, int]]
) -> None:
    crowd = Crowd(configure(1000, cluster=cluster))
    crowd.join_all()
    team = [0, 1, 2]
    for kind, who in choices:
        worker = team[who % len(team)]
        if kind == 0:
            crowd.die(worker)
            crowd.join(worker)
        elif kind == 1 and crowd.sent[worker]:  # a message arrives twice
            crowd.send(crowd.sent[worker][-1])
        elif kind == 2:  # the worker restarts before the server knows of its death
            crowd.join(worker)
        elif kind == 3 and len(team) < 5:
            team.append(len(crowd.workers))
            crowd.add(team[-1])
        elif crowd.at_hand:
            crowd.push(sorted(crowd.at_hand)[who % len(crowd.at_hand)])
    for worker in team[1:]:
        crowd.die(worker)
    for _ in range(12):  # the last worker fills the gaps first
        if crowd.at_hand:
            crowd.push(min(crowd.at_hand))
    used = sorted(used_positions(crowd.server.drain()))
    assert len(used) == len(set(used))
    open_ = [one for part in crowd.server.state().counts.parts for one in part.open]
    # The gradient that the last worker computes, and those that wait in a buffer.
    waiting = (cluster["gradients_per_update"] - 1) if cluster.get("mode") == "buffered" else 0
    assert len(open_) <= 1 + waiting
    end = crowd.server.state().counts.parts[0].end
    missing = sorted(set(range(end)) - set(used))
    assert missing == sorted(p for first, size in open_ for p in range(first, first + size))


@pytest.mark.parametrize("policy", ["ringmaster", "rennala", "fastest"])
@pytest.mark.parametrize("durability", ["log", "checkpoint"])
def test_samples_of_discarded_gradients_are_used_in_their_epoch(
    tmp_path: Path, policy: str, durability: str
) -> None:
    cluster = {"workers": 5, **MODES[policy]}
    machine = Machine(
        tmp_path / "run", configure(120, cluster=cluster, run={"durability": durability})
    )
    for seed in range(4):
        machine.work(23 * (seed + 1), seed)
        machine.crowd.die(seed)
        machine.restart()
    machine.work(120)
    result = read_run(machine.path)
    check_gradients(result)
    assert len(result.discarded) > 50
    applied = result.trace if result.members.empty else result.members
    assert len(result.positions) == len(applied)  # discarded gradients have none
    check_epochs(result, machine.crowd.problem)  # no position is used twice
    # Positions that were handed out but not used are those that workers hold at the end.
    (part,) = machine.crowd.server.state().counts.parts
    assert len(part.open) <= 5
    assert applied["batch_size"].sum() == part.end - sum(size for _, size in part.open)
    assert verify(result).findings == []


@pytest.mark.parametrize("durability", ["log", "checkpoint"])
def test_a_restarted_server_continues_the_epoch(tmp_path: Path, durability: str) -> None:
    config = configure(200, run={"durability": durability})
    machine = Machine(tmp_path / "run", config)
    for seed in range(6):
        machine.work(23 * (seed + 1), seed)
        machine.crowd.die(seed % 3)
        machine.restart()
    machine.work(200)
    assert len(machine.events("server_restored")) == 6
    result = read_run(machine.path)
    ((whole, begun),) = check_epochs(result, machine.crowd.problem)
    assert begun - whole <= 2
    assert whole >= 200 // 9 - 2  # 569 samples are 9 batches of at most 64
    found = verify(result).findings
    assert not found


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    ("transport", "data"), [("shm", {}), ("ray", {"shards": "by_label"})], ids=["shm", "ray"]
)
def test_five_killed_workers_and_a_killed_server(
    tmp_path: Path, transport: str, data: dict[str, Any]
) -> None:
    """The applied gradients use every sample once an epoch, whichever worker computed them."""
    config = configure(
        400,
        data=data,
        cluster={
            "workers": 4,
            "transport": transport,
            "compute_time": {"law": "exponential", "mean": 0.02},
        },
        run={"checkpoint_every": 50, "durability": "log"},
    )
    killed: set[int] = set()
    due = [(40 + 50 * number, "WorkerActor") for number in range(5)]
    due.insert(3, (170, "ServerActor"))

    def kill(progress: Progress) -> None:
        if due and progress.update >= due[0][0]:
            living = sorted(actor_processes(due[0][1]) - killed)
            if living:
                victim = living[len(killed) % len(living)]
                killed.add(victim)
                os.kill(victim, signal.SIGKILL)
                due.pop(0)

    result = read_run(run(config, tmp_path / "run", progress=kill))
    assert len(killed) == 6
    kinds = [event["event"] for event in result.events]
    assert kinds.count("worker_lost") >= 5
    assert kinds.count("server_restored") == 1
    check_gradients(result)
    # Only the last epoch of each part, and one that overlaps with it, may be incomplete.
    parts = check_epochs(result, make_problem(config))
    assert all(begun - whole <= 2 for whole, begun in parts)
    if not data:
        assert parts[0][0] >= 400 // 9 - 2
    assert len(parts) == (4 if data else 1)
    final = load(paths(result.path / CHECKPOINTS)[0]).parameters
    assert np.isfinite(final).all()
    assert verify(result).findings == []
