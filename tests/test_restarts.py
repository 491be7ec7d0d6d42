"""When failed workers are started again, and when they are given up."""

from __future__ import annotations

from cluster.restarts import Restarts


def test_delay_doubles_and_the_worker_is_given_up() -> None:
    restarts = Restarts()
    delays = [restarts.failed(3, "broken", 0, now=0.0) for _ in range(5)]
    assert delays == [0.1, 0.2, 0.4, 0.8, None]
    assert restarts.first_reason == "worker 3: broken"


def test_error_in_the_code_is_shown_before_what_may_follow_from_it() -> None:
    restarts = Restarts()
    restarts.failed(0, "its process died", 0, now=0.0)
    restarts.failed(1, "ZeroDivisionError", 0, now=0.0, in_code=True)
    restarts.failed(2, "KeyError", 0, now=0.0, in_code=True)
    assert restarts.first_reason == "worker 1: ZeroDivisionError"


def test_worker_that_delivers_is_never_given_up() -> None:
    restarts = Restarts()
    for delivered in range(1, 50):
        assert restarts.failed(0, "killed", delivered, now=0.0) == 0.1
    assert restarts.failed(0, "killed", 49, now=0.0) == 0.2


def test_workers_are_due_in_their_time() -> None:
    restarts = Restarts()
    restarts.failed(1, "first", 0, now=10.0)
    restarts.failed(1, "again", 0, now=10.0)
    restarts.failed(2, "other", 0, now=10.05)
    assert restarts.first_reason == "worker 1: first"
    assert restarts.due(10.0) == []
    assert restarts.due(10.16) == [1, 2]
    assert restarts.pending
    assert restarts.due(10.21) == [1]
    assert not restarts.pending
