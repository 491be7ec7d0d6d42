"""When failed workers are restarted, and when they are given up."""

from __future__ import annotations

from cluster.restarts import Restarts


def test_delay_doubles_and_a_worker_whose_code_raises_is_given_up() -> None:
    restarts = Restarts()
    delays = [restarts.failed(3, "broken", 0, now=0.0, in_code=True) for _ in range(5)]
    assert delays == [0.1, 0.2, 0.4, 0.8, None]
    assert restarts.first_reason == "worker 3: broken"


def test_a_failure_outside_the_code_is_retried_for_minutes() -> None:
    """For example, a flood of connections for seconds must not cost a run its worker."""
    restarts, now, delays = Restarts(), 100.0, []
    while (delay := restarts.failed(3, "refused", 7, now)) is not None:
        delays.append(delay)
        assert restarts.due(now + delay) == [3]
        now += delay
    assert delays[:9] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6]
    assert set(delays[9:]) == {30.0}
    assert 180.0 <= now - 100.0 <= 210.0
    assert restarts.streak(3, now) == "15 failures in a row, 201 s"


def test_slow_failures_get_five_attempts_too() -> None:
    restarts = Restarts()
    ends = [restarts.failed(3, "silent", 0, now=200.0 * number) for number in range(5)]
    assert [end is None for end in ends] == [False] * 4 + [True]


def test_an_error_in_the_code_is_reported_before_its_consequences() -> None:
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


def test_workers_are_due_after_their_delay() -> None:
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
