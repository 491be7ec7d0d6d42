"""Local steps on a server: kept states, deaths and restarts; every run equals its replay."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.progress import Progress
from asgd.rules.sgd import Sgd
from asgd.rundir.checkpoint import CHECKPOINTS, paths
from asgd.rundir.reader import read_run
from cluster import run
from cluster.core.messages import Gradient
from cluster.core.worker import Worker
from cluster.memory import vectors
from cluster.storage.checkpoint import load
from tests.support.faults import Crowd, replay, replay_run
from tests.support.invariants import check_verified
from tests.support.machine import Machine, configure, work
from tests.support.processes import actor_processes

LOCAL = {"learning_rate": 0.7, "batch_size": 2, "local_steps": 3, "local_learning_rate": 0.02}
STATES: list[dict[str, Any]] = [
    {"local_rule": "sgd", "local_state": "keep"},
    {"local_rule": "momentum", "local_state": "reset"},
    {"local_rule": "momentum", "local_state": "keep"},
    {"local_rule": "adam", "local_state": "keep", "rule": "nesterov", "learning_rate": 0.1},
]
MODES: list[dict[str, Any]] = [
    {},
    {"schedule": "uniform"},
    {"mode": "sync"},
    {"mode": "bounded", "max_staleness": 2},
    {"discard_above": 1},
    {"mode": "buffered", "gradients_per_update": 2, "discard_above": 1},
    {"mode": "sync", "gradients_per_update": 2},
    {"mode": "sync", "gradients_per_update": 2, "late": "keep"},
]


def local(config: RunConfig, **changes: Any) -> RunConfig:
    data = json.loads(config.to_json())
    data["optimizer"] = LOCAL | changes
    return make_config(data)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("durability", ["log", "checkpoint"])
@pytest.mark.parametrize("state", STATES, ids=lambda state: "-".join(map(str, state.values())))
def test_a_restored_run_equals_its_replay(
    tmp_path: Path, state: dict[str, Any], durability: str, mode: dict[str, Any]
) -> None:
    machine = Machine(tmp_path / "run", local(configure(3, 120, durability, **mode), **state))
    for reached in (31, 45, 97):
        work(machine.crowd, reached - 6, seed=reached)
        machine.crowd.die(reached % 3)
        work(machine.crowd, reached - 3, seed=reached)
        machine.crowd.join(reached % 3)
        work(machine.crowd, reached, seed=reached + 1)
        machine.record()
        before = machine.crowd.server.version
        machine.restart()
        assert machine.crowd.server.version == (
            before if durability == "log" else before // 20 * 20
        )
    machine.work(120)
    found = read_run(machine.path)
    check_verified(found)
    samples = [*found.trace["batch_size"][found.trace["worker"] >= 0], *found.members["batch_size"]]
    assert set(samples) == {6}
    keeps = state["local_state"] == "keep" and state["local_rule"] != "sgd"
    assert bool(machine.events("state_reset")) == keeps


def crowd_with_state(**cluster: Any) -> Crowd:
    crowd = Crowd(local(configure(2, 40, **cluster), local_rule="momentum", local_state="keep"))
    crowd.join_all()
    return crowd


def check_crowd(crowd: Crowd) -> list[dict[str, Any]]:
    """Assert that the final parameters equal those of a replay; return the events."""
    work(crowd, 40)
    record = crowd.server.drain()
    points = replay(crowd.config, crowd.problem, crowd.initial, record)
    np.testing.assert_array_equal(points[-1], crowd.server.parameters)
    return record.events


def kinds(events: list[dict[str, Any]]) -> list[tuple[str, int]]:
    named = ("gradient_lost", "gradient_rejected", "state_reset")
    return [(one["event"], one["sequence"]) for one in events if one["event"] in named]


def test_state_is_kept_without_faults() -> None:
    assert kinds(check_crowd(crowd_with_state())) == []


def test_state_of_a_worker_that_died_with_its_gradient_is_reset() -> None:
    crowd = crowd_with_state()
    work(crowd, 9)
    before = crowd.at_hand[0].sequence
    crowd.die(0)
    work(crowd, 12)
    crowd.join(0)
    assert crowd.at_hand[0].sequence == before + 2
    assert kinds(check_crowd(crowd)) == [("gradient_lost", before), ("state_reset", before + 1)]


def test_state_of_a_worker_that_died_after_its_gradient_arrived_is_reset() -> None:
    """Its gradient is held and applied; the new process cannot know its state."""
    crowd = crowd_with_state(mode="sync")
    work(crowd, 5)
    before = crowd.at_hand[0].sequence
    crowd.push(0)
    crowd.die(0)
    crowd.join(0)
    crowd.push(1)
    assert crowd.at_hand[0].sequence == before + 2
    assert kinds(check_crowd(crowd)) == [("state_reset", before + 1)]


def test_state_after_a_late_gradient_of_a_worker_taken_for_dead_is_reset() -> None:
    """The same process continues, with the state after a gradient that was lost."""
    crowd = crowd_with_state()
    work(crowd, 9)
    late = crowd.workers[0].compute(crowd.at_hand.pop(0))
    crowd.die(0)
    work(crowd, 12)
    crowd.send(late)  # counts as a join
    assert crowd.at_hand[0].sequence == late.sequence + 2
    lost = [("gradient_lost", late.sequence), ("state_reset", late.sequence + 1)]
    assert kinds(check_crowd(crowd)) == lost


def test_state_after_a_refused_difference_is_reset() -> None:
    crowd = crowd_with_state()
    work(crowd, 9)
    good = crowd.workers[0].compute(crowd.at_hand.pop(0))
    bad = Gradient(0, good.sequence, good.read_version, good.epoch, good.gradient * np.nan, 0.0)
    crowd.send(bad)
    assert crowd.at_hand[0].sequence == good.sequence + 2
    refused = [("gradient_rejected", good.sequence), ("state_reset", good.sequence + 1)]
    assert kinds(check_crowd(crowd)) == refused


def test_state_after_a_discarded_difference_is_reset() -> None:
    crowd = crowd_with_state(discard_above=0)
    crowd.push(0)
    crowd.push(1)  # of version 0
    assert crowd.at_hand[1].sequence == 2
    crowd.push(1)
    crowd.push(0)
    assert crowd.at_hand[0].sequence == 3
    assert len(kinds(check_crowd(crowd))) > 10  # of 40 updates


def test_state_after_a_difference_that_counts_is_kept() -> None:
    crowd = crowd_with_state(mode="buffered", gradients_per_update=3)
    assert kinds(check_crowd(crowd)) == []


def test_state_of_a_worker_that_died_before_its_gradient_counted_is_reset() -> None:
    """The server applies the gradient only after the worker has joined again."""
    crowd = crowd_with_state(mode="buffered", gradients_per_update=2)
    work(crowd, 4)
    before = crowd.at_hand[0].sequence
    full, crowd.server.ledger.most_evaluations = crowd.server.ledger.most_evaluations, 0
    crowd.push(0)
    crowd.die(0)
    crowd.workers[0] = Worker(crowd.config, 0, crowd.problem)
    crowd.join(0)
    assert 0 not in crowd.at_hand
    crowd.server.ledger.most_evaluations = full
    crowd.push(1)
    assert crowd.at_hand[0].sequence == before + 2
    assert kinds(check_crowd(crowd)) == [("state_reset", before + 1)]


def test_a_worker_that_joins_late_begins_at_its_first_number() -> None:
    crowd = crowd_with_state()
    work(crowd, 9)
    crowd.add(2)
    assert crowd.at_hand[2].sequence == 0
    assert kinds(check_crowd(crowd)) == []


def test_memory_counts_points_and_states_of_the_workers() -> None:
    plain = local(configure(3), local_rule="sgd")
    adam = local(configure(3), local_rule="adam")
    assert vectors(plain, 10, Sgd()) == vectors(configure(3), 10, Sgd()) + 3 * 2
    assert vectors(adam, 10, Sgd()) == vectors(plain, 10, Sgd()) + 3 * 2


def settings(**optimizer: Any) -> RunConfig:
    return make_config(
        {
            "problem": {"kind": "softmax"},
            "optimizer": {"batch_size": 4, **optimizer},
            "cluster": {"workers": 3, "compute_time": {"law": "exponential", "mean": 0.002}},
            "run": {"updates": 300, "eval_every": 100, "checkpoint_every": 100},
        }
    )


@pytest.mark.usefixtures("shared_ray")
def test_one_step_by_sgd_in_a_real_run_is_plain_sgd(tmp_path: Path) -> None:
    """Replayed as plain SGD, from the same record, it has the same parameters to the last bit."""
    config = settings(local_steps=1, local_learning_rate=0.1)
    found = read_run(run(config, tmp_path / "run"))
    check_verified(found)
    text = found.config.to_json()
    plain = settings(learning_rate=0.1)
    (found.path / "config.json").write_text(plain.to_json())
    np.testing.assert_array_equal(
        replay_run(read_run(found.path))[-1], load(paths(found.path / CHECKPOINTS)[0]).parameters
    )
    assert make_config(json.loads(text)) == config


@pytest.mark.usefixtures("shared_ray")
def test_workers_of_a_killed_server_begin_with_new_states(tmp_path: Path) -> None:
    killed: set[int] = set()

    def kill_server(progress: Progress) -> None:
        if not killed and progress.update > 60:
            killed.add(min(actor_processes("ServerActor")))
            os.kill(min(killed), signal.SIGKILL)

    config = settings(
        local_steps=2, local_learning_rate=0.002, local_rule="adam", local_state="keep"
    )
    found = read_run(run(config, tmp_path / "run", progress=kill_server))
    assert killed
    check_verified(found)
    resets = [event["worker"] for event in found.events if event["event"] == "state_reset"]
    assert sorted(resets) == [0, 1, 2]
    assert set(found.trace["batch_size"]) == {8}
