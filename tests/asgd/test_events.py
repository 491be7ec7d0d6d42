"""Events of a run: incidents, their wording, and team sizes."""

from __future__ import annotations

import json
from pathlib import Path

from asgd.rundir.events import in_words, incidents, read_events, team_sizes


def test_a_loss_and_the_return_of_the_worker_are_incidents() -> None:
    joined = {"event": "worker_joined", "worker": 1}
    lost = {"event": "worker_lost", "worker": 1}
    events = [{"event": "start"}, joined, joined | {"worker": 2}, lost, joined, {"event": "finish"}]
    assert incidents(events) == [lost, joined]


def test_events_in_words() -> None:
    event = {"event": "worker_lost", "time": 1.0, "worker": 1, "reason": "killed"}
    assert in_words(event) == "worker lost: worker 1, reason killed"
    assert in_words({"event": "interrupted"}) == "interrupted"


def test_team_sizes_follow_the_updates_not_the_order_of_the_file() -> None:
    events = [
        {"event": "start", "time": 0.0},
        {"event": "worker_lost", "time": 3.0, "worker": 0, "update": 4},
        {"event": "worker_joined", "time": 1.0, "worker": 0, "update": 0},
        {"event": "worker_joined", "time": 2.0, "worker": 2, "update": 2},
        {"event": "worker_joined", "time": 4.0, "worker": 0, "update": 5},
        {"event": "worker_removed", "time": 5.0, "worker": 2, "update": 7},
        {"event": "worker_lost", "time": 6.0, "worker": 1, "reason": "of an older version"},
    ]
    assert team_sizes(events, 2, 9).tolist() == [2, 2, 3, 3, 2, 3, 3, 2, 2]
    cut = {"event": "server_restored", "time": 7.0, "to_version": 3}
    assert team_sizes([*events, cut], 2, 5).tolist() == [2, 2, 3, 2, 2]
    assert team_sizes([], 4, 3).tolist() == [4, 4, 4]


def test_a_worker_that_is_not_restarted_has_no_restart_seconds(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    event = {"event": "worker_lost", "worker": 0, "update": 3, "restart_seconds": None}
    path.write_text(json.dumps(event) + "\n")
    assert read_events(path) == [event]
