"""How far the recorder may be behind, and that the server waits for it without losing anything."""

from __future__ import annotations

from asgd.config import make_config
from cluster.core.backlog import Backlog
from tests.support.faults import Crowd


def test_slow_evaluations_make_small_records_and_few() -> None:
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


def test_fast_evaluations_do_not_limit_records_but_their_number_does() -> None:
    backlog = Backlog()
    for _ in range(5):
        assert backlog.has_room
        backlog.add(0)
    assert not backlog.has_room
    backlog.remove(0, seconds=0.0)
    assert backlog.has_room


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
    assert not crowd.server.status(crowd.now).workers[2].computing  # it has done its part
    assert sorted(crowd.at_hand) == [0, 1]
    record = crowd.server.drain()
    assert record.evaluations.update.tolist() == [0, 1, 2]
    crowd.go_on()
    assert crowd.server.version == 3
    assert not crowd.server.status(crowd.now).waiting
    assert crowd.at_hand[2].version == 3
