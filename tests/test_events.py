"""Events out of the ordinary."""

from __future__ import annotations

from asgd.events import in_words, incidents


def test_who_joins_again_came_back() -> None:
    joined = {"event": "worker_joined", "worker": 1}
    lost = {"event": "worker_lost", "worker": 1}
    events = [{"event": "start"}, joined, joined | {"worker": 2}, lost, joined, {"event": "finish"}]
    assert incidents(events) == [lost, joined]


def test_words() -> None:
    event = {"event": "worker_lost", "time": 1.0, "worker": 1, "reason": "killed"}
    assert in_words(event) == "worker lost: worker 1, reason killed"
    assert in_words({"event": "interrupted"}) == "interrupted"
