"""The recorder may lag behind the server by a limit; then the server waits and loses nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from asgd.config.make import make_config
from asgd.rundir.reader import read_run
from asgd.rundir.writer import RunWriter
from asgd.verify import record_findings
from cluster.core.backlog import Backlog
from cluster.core.ledger import Ledger
from tests.support.faults import Crowd
from tests.support.machine import Machine, work


def test_slow_evaluations_make_few_small_records() -> None:
    backlog = Backlog()
    backlog.add(10)
    backlog.remove(10, seconds=1.0)
    assert backlog.most_evaluations == 3
    backlog.add(3)
    assert backlog.has_room  # 0.3 s of work
    backlog.add(3)
    assert not backlog.has_room
    backlog.remove(3, seconds=0.3)
    assert backlog.has_room


def test_evaluation_of_minutes_leaves_one_at_a_time() -> None:
    backlog = Backlog()
    backlog.add(1)
    backlog.remove(1, seconds=100.0)
    assert (backlog.most_evaluations, backlog.has_room) == (1, True)
    backlog.add(1)
    assert not backlog.has_room


def test_one_loss_of_a_long_vector_waits_at_the_server_and_one_at_the_recorder() -> None:
    parameters = np.zeros(10_000_000, np.float32)
    ledger, backlog = Ledger(), Backlog()
    ledger.evaluation(0, 0.0, parameters)
    assert ledger.ready
    assert ledger.full
    record = ledger.drain()
    assert not ledger.full
    backlog.add(len(record.evaluations), record.nbytes)
    assert not backlog.has_room


def test_fast_evaluations_do_not_limit_records_but_their_number_does() -> None:
    backlog = Backlog()
    for _ in range(5):
        assert backlog.has_room
        backlog.add(0)
    assert not backlog.has_room
    backlog.remove(0, seconds=0.0)
    assert backlog.has_room


def test_pending_evaluations_leave_room_for_records_where_losses_are_skipped() -> None:
    backlog = Backlog(skips=True)
    backlog.add(2)
    backlog.remove(2, seconds=200.0)
    assert backlog.most_evaluations == 1
    backlog.add(1, nbytes=8)
    assert (backlog.most_evaluations, backlog.has_room) == (0, True)
    backlog.remove(0, seconds=0.0)  # the record is written, its loss not yet evaluated
    assert (backlog.most_evaluations, backlog.has_room) == (0, True)
    backlog.evaluated(1, seconds=0.1, nbytes=8)
    assert (backlog.most_evaluations, backlog.nbytes) == (20, 0)


def test_server_skips_losses_while_others_wait_but_not_the_first_and_last(tmp_path: Path) -> None:
    run = {"updates": 9, "eval_every": 1, "evaluations": "skip", "checkpoint_every": 3}
    config = make_config({"problem": {"kind": "quadratic"}, "cluster": {"workers": 2}, "run": run})
    machine = Machine(tmp_path / "run", config)
    server = machine.crowd.server
    server.ledger.most_evaluations = 2
    work(machine.crowd, 5)
    first = server.drain()
    assert (first.evaluations.update.tolist(), first.skipped) == ([0, 1], [2, 3, 4, 5])
    server.ledger.most_evaluations = 0
    work(machine.crowd, 9)
    last = server.drain()
    assert (last.evaluations.update.tolist(), last.skipped) == ([9], [6, 7, 8])
    assert server.ledger.skipped == 7
    server.ledger.checkpoint = server.state()
    alone = server.drain()
    assert not len(
        alone.trace["update"]
    )  # a checkpoint without rows; the record has its own number
    both = first.work.then(last.work)
    assert both.evaluations.update.tolist() == [0, 1, 9]
    assert both.checkpoint is last.checkpoint
    assert machine.recorder.write(first.rows)
    assert machine.recorder.write(last.rows)
    assert machine.recorder.write(alone.rows)
    assert not machine.recorder.write(alone.rows)
    assert len(read_run(machine.path).trace) == 9  # before any loss is evaluated
    machine.recorder.work(both)
    RunWriter(machine.path).event("finish")
    found = read_run(machine.path)
    assert found.loss["update"].tolist() == [0, 1, 9]
    assert found.skipped["update"].tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert record_findings(found) == []
    RunWriter(machine.path).skipped([9, 9])
    [finding] = record_findings(read_run(machine.path))
    assert "skipped: update 9: update 9 is negative or not before the next one" in finding


def test_server_holds_gradients_while_its_ledger_is_full() -> None:
    config = make_config(
        {
            "problem": {"kind": "quadratic"},
            "cluster": {"workers": 3},
            "run": {"updates": 9, "eval_every": 1},
        }
    )
    crowd = Crowd(config)
    crowd.server.ledger.most_evaluations = 3  # x_0 and two updates
    crowd.join_all()
    for worker in range(3):
        crowd.push(worker)
    assert crowd.server.version == 2
    assert crowd.server.status(crowd.now).waiting
    assert not crowd.server.status(crowd.now).workers[2].computing  # it has sent its gradient
    assert sorted(crowd.at_hand) == [0, 1]
    record = crowd.server.drain()
    assert record.evaluations.update.tolist() == [0, 1, 2]
    crowd.go_on()
    assert crowd.server.version == 3
    assert not crowd.server.status(crowd.now).waiting
    assert crowd.at_hand[2].version == 3
