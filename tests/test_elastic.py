"""Workers added to a run and removed from it while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd.config import RunConfig, make_config
from asgd.events import team_sizes
from asgd.progress import Progress
from asgd.trace import read_run
from cluster import run
from cluster.server import REMOVED
from cluster.team import Change, set_workers
from tests.faults import Crowd, gradients_of, replay
from tests.invariants import check_trace

MODES = [
    {"mode": "async"},
    {"mode": "bounded", "max_staleness": 2},
    {"mode": "sync"},
    {"schedule": "uniform"},
]


def configure(updates: int, **cluster: Any) -> RunConfig:
    return make_config(
        {
            "problem": {"kind": "least_squares"},
            "optimizer": {"rule": "momentum", "learning_rate": 0.002, "batch_size": 2},
            "cluster": {"workers": 3, **cluster},
            "run": {"updates": updates, "seed": 1},
        }
    )


@pytest.mark.parametrize("cluster", MODES)
@settings(max_examples=30, deadline=None)
@given(choices=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=60))
def test_any_order_of_joining_and_leaving(
    cluster: dict[str, Any], choices: list[tuple[int, int]]
) -> None:
    config = configure(25, **cluster)
    crowd = Crowd(config)
    crowd.join_all()
    team, newest = [0, 1, 2], 2
    retired: set[int] = set()
    for kind, who in choices:
        if kind == 0 and len(team) < 6:
            newest += 1
            team.append(newest)
            crowd.add(newest)
        elif kind == 1 and len(team) > 1:
            retired.add(worker := team.pop(who % len(team)))
            crowd.retire(worker)
        elif crowd.at_hand:
            crowd.push(sorted(crowd.at_hand)[who % len(crowd.at_hand)])
    while crowd.at_hand:
        crowd.push(min(crowd.at_hand))

    # Whatever happened, the run comes to its end, and everybody hears of it or was dismissed.
    assert crowd.server.version == 25
    assert set(crowd.stopped) == {*team, *retired}
    record = crowd.server.drain()
    points = replay(config, crowd.problem, crowd.initial, record)
    np.testing.assert_allclose(crowd.server.parameters, points[-1], rtol=1e-12)
    np.testing.assert_array_equal(record.trace["update"], np.arange(25))
    if cluster.get("mode") == "sync":
        assert not record.trace["staleness"].any()

    # A removed worker's gradients were all applied, up to the end of the run.
    kinds = [event["event"] for event in record.events]
    assert "gradient_lost" not in kinds
    dismissed = {e["worker"] for e in record.events if e["event"] == "worker_removed"}
    assert dismissed == {w for w, reason in crowd.stopped.items() if reason == REMOVED}
    applied = [member[:2] for group in gradients_of(record) for member in group]
    for worker in range(newest + 1):
        own = [sequence for w, sequence in applied if w == worker]
        assert own == list(range(len(own)))
        if worker in dismissed:
            assert len(own) == len(crowd.sent[worker])


def test_removed_worker_that_dies_first_loses_its_gradient() -> None:
    crowd = Crowd(configure(25))
    crowd.join_all()
    crowd.retire(2)
    crowd.die(2)
    events = crowd.server.drain().events
    assert [event["event"] for event in events] == ["gradient_lost", "worker_removed"]
    crowd.join(2)  # late: restarted before it was known to be removed
    assert crowd.stopped == {2: REMOVED}


def test_worker_removed_before_the_start_is_not_waited_for() -> None:
    crowd = Crowd(configure(25))
    crowd.join(0)
    crowd.join(2)
    crowd.retire(1)
    assert set(crowd.at_hand) == {0, 2}
    crowd.join(1)
    assert crowd.stopped == {1: REMOVED}


def test_removed_worker_is_not_waited_for_at_the_barrier() -> None:
    crowd = Crowd(configure(25, mode="sync"))
    crowd.join_all()
    crowd.push(0)
    crowd.push(1)
    crowd.retire(2)
    assert crowd.server.version == 0  # its last gradient belongs to this update
    crowd.push(2)
    assert crowd.server.version == 1
    crowd.push(0)
    crowd.push(1)
    assert crowd.server.version == 2


class Beside:
    """Watches a run and acts once beside it, as soon as so many updates are made."""

    def __init__(self, update: int, action: Callable[[], object]) -> None:
        self._update = update
        self._thread = Thread(target=action)

    def __call__(self, progress: Progress) -> None:
        if progress.update >= self._update and self._thread.ident is None:
            self._thread.start()

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


def joined(path: Path) -> dict[int, int]:
    """Return the update at which each worker joined."""
    events = read_run(path).events
    return {e["worker"]: e["update"] for e in events if e["event"] == "worker_joined"}


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("transport", ["shm", "ray"])
def test_workers_come_and_go_while_the_run_goes_on(tmp_path: Path, transport: str) -> None:
    path = tmp_path / "run"
    changes: list[Change] = []

    def change() -> None:
        for count, newest in ((4, 3), (1, 0), (2, 4)):
            changes.append(set_workers(path, count))
            while newest not in joined(path):
                Event().wait(0.02)

    compute_time = {"law": "constant", "mean": 0.01}
    config = configure(800, transport=transport, compute_time=compute_time)
    beside = Beside(30, change)
    result = read_run(run(config, path, progress=beside))
    beside.join()
    assert changes == [Change(3, 4, [3], []), Change(4, 1, [], [1, 2, 3]), Change(1, 2, [4], [])]
    kinds = [event["event"] for event in result.events]
    assert kinds.count("workers_changed") == 3
    assert kinds.count("worker_removed") == 3
    assert "worker_lost" not in kinds
    assert not list(path.glob("request-*"))
    check_trace(result, added={worker: joined(path)[worker] for worker in (3, 4)})
    used = set(result.trace["worker"][-100:])
    assert used <= {0, 4}
    # Every update ages the snapshots of all workers but one: those used, and those held last.
    trace = result.trace
    sizes = team_sizes(result.events, 3, 800)
    assert set(sizes) == {1, 2, 3, 4}
    held = 799 - trace[trace["worker"].isin([0, 4])].groupby("worker")["update"].max()
    assert trace["staleness"].sum() + held.sum() == (sizes - 1).sum()
