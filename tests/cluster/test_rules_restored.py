"""Update rules on a server that dies: their state is restored, and the run equals its replay."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asgd.config.make import make_config
from asgd.config.rules import RULES
from asgd.config.tables import RunConfig
from asgd.errors import InputError
from asgd.problems.make import make_problem
from asgd.progress import Progress
from asgd.rules.base import BLOCK
from asgd.rules.make import make_rule
from asgd.rundir.checkpoint import CHECKPOINTS, paths
from asgd.rundir.reader import read_run
from asgd.verify import replay_findings
from cluster import resume, run
from cluster.core.reads import Reads
from cluster.memory import vectors
from cluster.storage.checkpoint import load, pack, unpack
from tests.support import rules
from tests.support.faults import Crowd, replay, replay_run
from tests.support.machine import Machine, configure, contents, work
from tests.support.processes import actor_processes

GIVEN: dict[str, dict[str, Any]] = {
    "capped": {"cap": 0.1},
    "delay_compensated": {"compensation": 1.0},
    "tests.support.rules:Full": {},
}
NAMES = [*RULES, "tests.support.rules:Full"]


def with_rule(config: RunConfig, rule: str) -> RunConfig:
    data = json.loads(config.to_json())
    data["optimizer"] = {
        "rule": rule,
        "learning_rate": 0.02,
        "batch_size": 2,
        **GIVEN.get(rule, {}),
    }
    return make_config(data)


@pytest.mark.parametrize("durability", ["log", "checkpoint"])
@pytest.mark.parametrize("rule", NAMES)
def test_a_restored_run_equals_its_replay(tmp_path: Path, rule: str, durability: str) -> None:
    config = with_rule(configure(3, 160, durability, schedule="free"), rule)
    machine = Machine(tmp_path / "run", config)
    for reached in (31, 45, 97, 119):
        work(machine.crowd, reached - 6, seed=reached)
        machine.crowd.die(reached % 3)
        work(machine.crowd, reached - 3, seed=reached)
        machine.crowd.join(reached % 3)  # it gets a snapshot without making an update
        work(machine.crowd, reached, seed=reached + 1)
        machine.record()
        machine.restart()
        assert machine.crowd.server.version == (
            reached if durability == "log" else reached // 20 * 20
        )
    machine.work(160)
    result = read_run(machine.path)
    final = machine.crowd.server.state()
    np.testing.assert_array_equal(replay_run(result)[-1], final.parameters)
    states = {
        load(path).version: load(path).parameters for path in paths(machine.path / CHECKPOINTS)
    }
    assert states
    assert replay_findings(result, states) == []
    stored = unpack(pack(final))
    assert stored.counts == final.counts
    for saved, kept in zip((*stored.rule, *stored.reads), (*final.rule, *final.reads), strict=True):
        np.testing.assert_array_equal(saved, kept)


LONG = ["sgd", "momentum", "corrected_momentum", "adam", "delay_compensated", NAMES[-1]]


@pytest.mark.parametrize(
    ("rule", "dim"), [*((name, 3) for name in NAMES), *((name, BLOCK + 5) for name in LONG)]
)
def test_a_restored_run_in_float32_equals_its_replay(tmp_path: Path, rule: str, dim: int) -> None:
    """Vectors are short, or long enough for blocks and compiled loops; the server dies twice."""
    data = json.loads(with_rule(configure(3, 70, "log", schedule="free"), rule).to_json())
    options = {"dim": dim, "dtype": "float32"}
    data["problem"] = {"kind": "tests.support.plugins:single", "options": options}
    machine = Machine(tmp_path / "run", make_config(data))
    machine.work(23)
    work(machine.crowd, 47, seed=1)
    for _ in range(2):
        machine.restart()
        assert machine.crowd.server.version == 47
        machine.record()
    machine.work(70)
    final = machine.crowd.server.state()
    arrays = (final.parameters, *final.rule, *final.reads)
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
    run = read_run(machine.path)
    np.testing.assert_array_equal(replay_run(run)[-1], final.parameters)
    assert replay_findings(run, {70: final.parameters}) == []
    stored = unpack(pack(final))
    assert stored.counts == final.counts
    for saved, kept in zip((stored.parameters, *stored.rule, *stored.reads), arrays, strict=True):
        assert saved.dtype == kept.dtype
        np.testing.assert_array_equal(saved, kept)


def test_a_checkpoint_made_from_the_log_has_the_snapshots_for_the_rest_of_the_log(
    tmp_path: Path,
) -> None:
    """The next server saves a state while it applies the log, and dies too."""
    config = with_rule(configure(3, 160, "log", schedule="free"), "delay_compensated")
    machine = Machine(tmp_path / "run", config)
    machine.work(25)
    work(machine.crowd, 55, seed=1)  # the checkpoint of update 40 is lost
    for _ in range(2):
        machine.restart()
        assert not machine.crowd.stopped
        assert machine.crowd.server.version == 55
        machine.record()
        assert load(paths(machine.path / CHECKPOINTS)[0]).version == 40
    machine.work(160)
    final = machine.crowd.server.state().parameters
    np.testing.assert_array_equal(final, replay_run(read_run(machine.path))[-1])


def test_a_record_counts_the_snapshots_in_its_checkpoint(tmp_path: Path) -> None:
    config = with_rule(configure(3, 160, "log"), "delay_compensated")
    machine = Machine(tmp_path / "run", config)
    machine.crowd.server.drain()
    work(machine.crowd, 20)
    record = machine.crowd.server.drain()
    assert record.checkpoint is not None
    assert len(record.checkpoint.reads) == 2  # of the workers that have not delivered
    losses = len(record.evaluations)
    assert record.nbytes == (losses + 1 + 2) * machine.crowd.initial.nbytes


def test_snapshots_are_kept_in_the_precision_of_the_run() -> None:
    """A state may have another precision, if the run was resumed with a changed problem."""
    reads = Reads(np.dtype(np.float32))
    reads.restore([(0, 7)], [np.full(2, 0.1)])
    kept = reads.of(0, 7)
    assert kept is not None
    assert kept.dtype == np.float32


def test_a_state_of_another_rule_is_refused() -> None:
    crowd = Crowd(with_rule(configure(workers=2), "adam"))
    crowd.join_all()
    work(crowd, 7)
    state = crowd.server.state()
    assert state.counts.rule == ["first_moment", "second_moment"]
    with pytest.raises(
        InputError,
        match=r"has first_moment \(1,\), second_moment \(1,\), the rule keeps velocity \(1,\): ",
    ):
        type(crowd.server)(with_rule(configure(workers=2), "momentum"), crowd.initial, 1, state)


def test_a_run_is_not_resumed_if_its_own_rule_now_keeps_another_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path / "run", with_rule(configure(2, 80), NAMES[-1]))
    machine.work(30)
    monkeypatch.setattr(rules.Full, "state", ("speed",))
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"state has velocity \(1,\), the rule keeps speed \(1,\)"):
        resume(tmp_path / "run")
    assert contents(tmp_path) == before


def test_one_snapshot_is_kept_for_each_worker_and_memory_is_reused() -> None:
    crowd = Crowd(with_rule(configure(3, 200, "log"), "delay_compensated"))
    crowd.join_all()
    reads = crowd.server._reads
    assert reads is not None
    work(crowd, 50)
    arrays = {id(array) for held in reads._held.values() for array in held.values()}
    assert len(arrays) == 3
    spare = {id(array) for array in reads._spare}
    work(crowd, 150, seed=1)
    later = {id(array) for held in reads._held.values() for array in held.values()}
    assert len(later) == 3
    assert later <= arrays | spare


@pytest.mark.parametrize("durability", ["log", "checkpoint"])
def test_a_rule_that_raises_ends_the_run_before_that_update(
    tmp_path: Path, durability: str
) -> None:
    data = json.loads(configure(2, 200, durability, schedule="free").to_json())
    options = {"fault": "late"}
    data["optimizer"] = {"rule": "tests.support.rules:Faulty", "options": options}
    machine = Machine(tmp_path / "run", make_config(data))
    reason = "the rule raised at update 31: ArithmeticError: enough"
    machine.work(200)
    assert set(machine.crowd.stopped.values()) == {reason}
    assert machine.crowd.server.version == 31
    newest = load(paths(machine.path / CHECKPOINTS)[0])
    assert newest.version == 20
    np.testing.assert_array_equal(newest.parameters, replay_run(read_run(machine.path))[20])
    machine.restart()  # it raises again
    machine.work(200)
    assert set(machine.crowd.stopped.values()) == {reason}


@pytest.mark.parametrize("newer", [True, False])
def test_a_gradient_may_belong_to_either_answer_to_a_repeated_message(newer: bool) -> None:
    crowd = Crowd(with_rule(configure(2, 200), "delay_compensated"))
    crowd.join_all()
    crowd.push(0)
    first = crowd.at_hand.pop(0)  # so late that the worker asks again
    for _ in range(3):
        crowd.push(1)
        crowd.send(crowd.sent[0][-1])
    assert (first.version, crowd.at_hand[0].version) == (1, 4)
    crowd.send(crowd.workers[0].compute(crowd.at_hand[0] if newer else first))
    record = crowd.server.drain()
    assert record.trace["read_version"].tolist() == [0, 0, 2, 3, 4 if newer else 1]
    points = replay(crowd.config, crowd.problem, crowd.initial, record)
    np.testing.assert_array_equal(crowd.server.parameters, points[-1])
    assert sum(len(held) for held in crowd.server._reads._held.values()) == 2


def test_memory_counts_states_and_snapshots() -> None:
    def needed(rule: str, durability: str = "checkpoint") -> int:
        config = with_rule(configure(4, durability=durability), rule)
        return vectors(config, 10**6, make_rule(config))

    assert needed("sgd") == 34
    assert needed("momentum") == 39
    assert needed("adam") == 44
    assert needed("delay_compensated") == 38
    assert needed("delay_compensated", "log") == 54


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("rule", ["adam", "tests.support.rules:Full"])
def test_a_run_with_a_killed_server_equals_its_replay(tmp_path: Path, rule: str) -> None:
    config = make_config(
        {
            "problem": {"kind": "softmax"},
            "optimizer": {"rule": rule, "learning_rate": 0.01, **GIVEN.get(rule, {})},
            "cluster": {"workers": 3, "compute_time": {"law": "exponential", "mean": 0.005}},
            "run": {"updates": 600, "checkpoint_every": 100, "durability": "log"},
        }
    )
    killed: set[int] = set()

    def kill(progress: Progress) -> None:
        if len(killed) < 2 and progress.update > 150 * (1 + len(killed)):
            for pid in actor_processes("ServerActor") - killed:
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)

    result = read_run(run(config, tmp_path / "run", progress=kill))
    assert killed
    assert result.state == "finished"
    assert sum(event["event"] == "server_restored" for event in result.events) == len(killed)
    final = load(paths(result.path / CHECKPOINTS)[0]).parameters
    np.testing.assert_array_equal(final, replay_run(result)[-1])
    assert replay_findings(result, {600: final}) == []
    problem = make_problem(config)
    assert result.loss["loss"].iloc[-1] == pytest.approx(problem.loss(final), rel=1e-12)
