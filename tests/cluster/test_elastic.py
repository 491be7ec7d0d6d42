"""Workers are added to a run, and removed from it, while it continues."""

from __future__ import annotations

import re
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.profile.fitting import fit_run
from asgd.__main__ import main
from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.errors import InputError
from asgd.progress import Progress
from asgd.rundir.events import team_sizes
from asgd.rundir.reader import read_run
from asgd.simulation.simulate import simulate
from cluster import run
from cluster.core.server import REMOVED
from cluster.team import Change, Request, Team, set_workers, take_requests
from tests.support.faults import Crowd, gradients_of, replay
from tests.support.invariants import check_trace

MODES = [
    {"mode": "async"},
    {"mode": "bounded", "max_staleness": 2},
    {"mode": "sync"},
    {"schedule": "uniform"},
]


LEAST_SQUARES = {"kind": "least_squares"}


def configure(updates: int, problem: dict[str, Any] = LEAST_SQUARES, **cluster: Any) -> RunConfig:
    return make_config(
        {
            "problem": problem,
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

    # The run always ends, and every worker is told so or was removed.
    assert crowd.server.version == 25
    assert set(crowd.stopped) == {*team, *retired}
    record = crowd.server.drain()
    points = replay(config, crowd.problem, crowd.initial, record)
    np.testing.assert_allclose(crowd.server.parameters, points[-1], rtol=1e-12)
    np.testing.assert_array_equal(record.trace["update"], np.arange(25))
    if cluster.get("mode") == "sync":
        assert not record.trace["staleness"].any()

    # All gradients of a removed worker were applied, up to the end of the run.
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
    crowd.join(2)  # late: it restarted before its removal was known
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


def test_an_added_worker_takes_the_part_with_the_fewest_workers() -> None:
    config = make_config({"data": {"shards": "partition"}, "cluster": {"workers": 3}})
    team = Team(config)
    assert team.resize(5).added == [3, 4]  # parts 0 and 1, a second time
    assert team.resize(2).removed == [2, 3, 4]
    assert team.resize(4).added == [5, 6]  # part 2, which nobody had, then part 0
    team.members.remove(0)  # given up after many failures
    assert team.resize(5).added == [7, 8]  # parts 1 and 2: worker 6 has part 0
    events = [{"event": "workers_changed", "workers": [1, 5]}]
    assert Team(config, events).resize(3).added == [6]
    shared = make_config({"cluster": {"workers": 3}})
    assert Team(shared, events).resize(3).added == [6]


def joined(path: Path) -> dict[int, int]:
    """Return the update at which each worker joined."""
    events = read_run(path).events
    return {e["worker"]: e["update"] for e in events if e["event"] == "worker_joined"}


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("transport", ["shm", "ray"])
def test_workers_join_and_leave_during_a_run(tmp_path: Path, transport: str) -> None:
    path, changed = tmp_path / "run", tmp_path / "changed"
    changes: list[Change] = []

    def change() -> None:
        for count, newest in ((4, 3), (1, 0), (2, 4)):
            changes.append(set_workers(path, count))
            while newest not in joined(path):
                pause.wait(0.1)  # because each check reads the events
        with pytest.raises(InputError, match=re.escape("workers = 0: expected 1 to 512")):
            set_workers(path, 0)
        changed.touch()

    def watch(progress: Progress) -> None:
        if progress.update > 20 and changing.ident is None:
            changing.start()

    changing, pause = Thread(target=change, daemon=True), Event()
    slow = {
        "kind": "tests.support.plugins:bowl",
        "options": {"fault": "slow", "until": str(changed)},
    }
    config = configure(1200, problem=slow, transport=transport)
    result = read_run(run(config, path, progress=watch))
    assert changes == [Change(3, 4, [3], []), Change(4, 1, [], [1, 2, 3]), Change(1, 2, [4], [])]
    kinds = [event["event"] for event in result.events]
    assert kinds.count("workers_changed") == kinds.count("worker_removed") == 3
    assert "worker_lost" not in kinds
    assert not list(path.glob("request-*"))
    check_trace(result, added={worker: joined(path)[worker] for worker in (3, 4)})

    # Every update ages the snapshots of all workers but one, including those held at the end.
    trace = result.trace
    sizes = team_sizes(result.events, 3, 1200)
    assert set(sizes) == {1, 2, 3, 4}
    held = 1199 - trace[trace["worker"].isin([0, 4])].groupby("worker")["update"].max()
    assert trace["staleness"].sum() + held.sum() == (sizes - 1).sum()
    # The fit cannot check this, because it does not know the snapshots held at the end.
    fit = fit_run(result)
    assert fit.workers == pytest.approx(sizes[fit.start_up :].mean())

    with pytest.raises(InputError, match="the run is not running; it is finished"):
        set_workers(path, 2)


def test_workers_of_a_resumed_run_are_those_of_the_last_change() -> None:
    config = configure(10)
    team = Team(config)
    events: list[dict[str, Any]] = []
    for workers in (4, 2, 3):
        team.resize(workers)
        events.append({"event": "workers_changed", "workers": list(team.members)})
    assert team.members == [0, 1, 4]
    resumed = Team(config, events)
    assert resumed.members == [0, 1, 4]
    assert resumed.resize(4).added == [5]


def test_no_worker_is_added_whose_compute_time_is_unknown() -> None:
    team = Team(configure(10, compute_time={"law": "constant", "mean": [0.1, 0.2, 0.3]}))
    with pytest.raises(InputError, match="expected at most 3, because compute_time"):
        team.resize(4)
    assert team.resize(1).removed == [1, 2]


@pytest.mark.parametrize("content", [b"", b"[4]", b'{"workers": 0}', b'{"workers": 4, "x": 1}'])
def test_an_invalid_request_is_removed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "request-0a.json").write_bytes(content)
    assert list(take_requests(tmp_path)) == [Request("0a", None)]
    assert not list(tmp_path.iterdir())


def test_requests_are_taken_one_by_one(tmp_path: Path) -> None:
    for name in ("0a", "0b"):
        (tmp_path / f"request-{name}.json").write_bytes(b'{"workers": 2}')
    assert next(take_requests(tmp_path)) == Request("0a", 2)
    assert list(take_requests(tmp_path)) == [Request("0b", 2)]


def test_the_command_refuses_a_path_without_an_active_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = simulate(configure(20), tmp_path / "simulated")
    for run_, message in (
        (tmp_path / "none", "not a run directory"),
        (path, "a simulated run; only real runs"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["workers", str(run_), "3"])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
