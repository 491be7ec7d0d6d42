"""Several workers in one process: equal records, a common death, and places for added workers."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Event, Lock, Thread
from typing import Any

import numpy as np
import pytest

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.errors import InputError
from asgd.progress import Progress
from asgd.rundir.reader import Run, read_run
from asgd.simulation.simulate import simulate
from cluster import run
from cluster.core.messages import Array, Snapshot
from cluster.core.worker import Worker
from cluster.storage.verify import verify
from cluster.team import set_workers
from tests.support.invariants import check_complete, check_gradients, check_trace, violations
from tests.support.plugins import Bowl
from tests.support.processes import actor_processes


def configure(workers: int, together: int, updates: int, **tables: Any) -> RunConfig:
    cluster = {"workers": workers, "workers_per_process": together, **tables.pop("cluster", {})}
    return make_config(
        {
            "problem": {"kind": "softmax"},
            "optimizer": {"learning_rate": 0.1, "batch_size": 4},
            "cluster": cluster,
            "run": {"updates": updates, "eval_every": 50, "seed": 6, **tables.pop("run", {})},
            **tables,
        }
    )


class Processes:
    """A `progress` callback that watches the worker processes of a run.

    After 20 updates, it kills a process of `kind`, if given. Then, once the run has `joined` events
    of joining workers, it makes the file `until`.
    """

    def __init__(self, until: Path, kind: str = "", joined: int = 0) -> None:
        self.older = actor_processes("WorkerActor")
        self.seen: set[int] = set()
        self.killed = 0
        self._until, self._kind, self._joined = until, kind, joined

    def __call__(self, progress: Progress) -> None:
        self.seen |= self.now
        if self._kind and not self.killed:
            if progress.update <= 20:
                return
            found = self.now if self._kind == "WorkerActor" else actor_processes(self._kind)
            self.killed = min(found)
            os.kill(self.killed, signal.SIGKILL)
        events = read_run(self._until.parent / "run").events
        if sum(event["event"] == "worker_joined" for event in events) >= self._joined:
            self._until.touch()

    @property
    def now(self) -> set[int]:
        return actor_processes("WorkerActor") - self.older


def slow(until: Path, fault: str = "slow", after: int = 0) -> dict[str, Any]:
    """Return a problem whose gradients get slower and slower until the file `until` exists."""
    options = {"fault": fault, "until": str(until), "after": after}
    return {"kind": "tests.support.plugins:bowl", "options": options}


def reasons(result: Run) -> dict[int, str]:
    """Return why each worker was lost; assert that none was lost twice."""
    lost = [event for event in result.events if event["event"] == "worker_lost"]
    found = {event["worker"]: event["reason"] for event in lost}
    assert len(found) == len(lost)
    return found


def check_sound(result: Run) -> None:
    assert violations(result, []) == []
    assert verify(result, replayed=True).findings == []


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("transport", ["tcp", "shm", "ray"])
def test_records_equal_those_of_one_process_for_each_worker(tmp_path: Path, transport: str) -> None:
    """They are equal to the last bit, because the server draws the order."""
    cluster = {"transport": transport, "schedule": "uniform"}
    processes = Processes(tmp_path / "until")
    result = read_run(
        run(configure(5, 2, 200, cluster=cluster), tmp_path / "run", progress=processes)
    )
    assert len(processes.seen) == 3  # for 2, 2 and 1
    check_trace(result)
    check_sound(result)
    simulated = read_run(simulate(configure(5, 1, 200, cluster=cluster), tmp_path / "simulated"))
    for column in ("worker", "sequence", "read_version", "batch_size", "gradient_norm"):
        np.testing.assert_array_equal(result.trace[column], simulated.trace[column])
    np.testing.assert_array_equal(result.parameters, simulated.parameters)


class Reused(Bowl):
    """Returns the same memory for each gradient, and records whether two are computed at once."""

    dtype = np.dtype(np.float64)

    def __init__(self) -> None:
        super().__init__()
        self.memory = np.empty(2)
        self.meeting = Barrier(2)
        self.met = False

    def gradient(self, x: Array, indices: Any) -> Array:
        try:
            self.meeting.wait(0.2)
            self.met = True
        except BrokenBarrierError:
            self.meeting.reset()
        self.memory[:] = x
        return self.memory


def test_workers_take_turns_and_keep_their_gradients() -> None:
    config, problem, turn = configure(2, 2, 10), Reused(), Lock()
    found: dict[int, Array] = {}

    def compute(worker: int) -> None:
        snapshot = Snapshot(np.full(2, float(worker)), 0, 0, 0, 4)
        found[worker] = Worker(config, worker, problem, turn).compute(snapshot).gradient

    threads = [Thread(target=compute, args=(worker,)) for worker in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problem.met
    for worker in range(2):
        np.testing.assert_array_equal(found[worker], np.full(2, float(worker)))


@pytest.mark.usefixtures("shared_ray")
def test_each_worker_waits_by_itself(tmp_path: Path) -> None:
    """If workers waited one after another, the run would take the sum of the added times."""
    cluster = {"compute_time": {"law": "constant", "mean": 0.1}}
    result = read_run(run(configure(16, 16, 160, cluster=cluster), tmp_path / "run"))
    check_trace(result)
    assert (result.trace["compute_seconds"] >= 0.1).all()
    assert result.trace["applied_seconds"].iloc[-1] < 160 * 0.1 / 2


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("transport", ["tcp", "shm", "ray"])
def test_the_death_of_a_process_is_the_death_of_its_workers(tmp_path: Path, transport: str) -> None:
    until = tmp_path / "until"
    config = configure(8, 4, 600, problem=slow(until), cluster={"transport": transport})
    processes = Processes(until, "WorkerActor", joined=12)
    result = read_run(run(config, tmp_path / "run", progress=processes))
    check_sound(result)
    lost = reasons(result)
    assert set(lost) in ({0, 1, 2, 3}, {4, 5, 6, 7})
    assert all(why.startswith("its process died: killed (") for why in lost.values())
    assert len(processes.seen) == 3  # one new process, for all four
    events = Counter(
        (event["event"], event["worker"] in lost) for event in result.events if "worker" in event
    )
    assert events["worker_joined", True] == 8
    assert events["worker_joined", False] == 4
    assert events["gradient_lost", False] == 0
    assert 0 < events["gradient_lost", True] <= 4


@pytest.mark.usefixtures("shared_ray")
def test_workers_of_a_process_that_hangs_are_replaced(tmp_path: Path) -> None:
    problem = {"kind": "tests.support.plugins:bowl", "options": {"fault": "hang", "after": 100}}
    config = configure(3, 3, 150, problem=problem, cluster={"worker_timeout": 2.0})
    result = read_run(run(config, tmp_path / "run"))
    check_complete(result)
    check_gradients(result)  # a replay would hang too
    lost = reasons(result)
    assert set(lost) == {0, 1, 2}
    (first,) = [worker for worker, why in lost.items() if why.startswith("silent for ")]
    others = {why for worker, why in lost.items() if worker != first}
    assert others == {f"its process was ended: worker {first} was {lost[first]}"}


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("transport", ["shm", "ray"])
def test_a_worker_whose_code_raises_does_not_affect_the_others(
    tmp_path: Path, transport: str
) -> None:
    until = tmp_path / "until"
    problem = slow(until, "stumble", after=30)
    config = configure(4, 4, 400, problem=problem, cluster={"transport": transport})
    processes = Processes(until, joined=5)
    result = read_run(run(config, tmp_path / "run", progress=processes))
    check_sound(result)
    ((worker, why),) = reasons(result).items()
    assert why.startswith("ZeroDivisionError: once")
    assert len(processes.seen) == 1  # it restarts in the same process
    joined = Counter(e["worker"] for e in result.events if e["event"] == "worker_joined")
    assert joined == {**dict.fromkeys(range(4), 1), worker: 2}
    gone = [e["worker"] for e in result.events if e["event"] == "gradient_lost"]
    assert gone == [worker]


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("transport", ["tcp", "ray"])
def test_workers_of_a_process_continue_with_a_new_server(tmp_path: Path, transport: str) -> None:
    until = tmp_path / "until"
    config = configure(6, 4, 400, problem=slow(until), cluster={"transport": transport})
    processes = Processes(until, "ServerActor", joined=6)
    result = read_run(run(config, tmp_path / "run", progress=processes))
    check_sound(result)
    assert reasons(result) == {}
    assert len(processes.seen) == 2
    assert [e["updates_lost"] for e in result.events if e["event"] == "server_restored"] == [0]


@pytest.mark.usefixtures("shared_ray")
def test_added_workers_take_the_free_room_in_processes(tmp_path: Path) -> None:
    path, until, found = tmp_path / "run", tmp_path / "until", []

    def resize() -> None:
        for count, joined, removed in ((6, 6, 0), (2, 6, 4), (4, 8, 4)):
            set_workers(path, count)
            while occurrences("worker_joined") < joined or occurrences("worker_removed") < removed:
                pause.wait(0.1)  # because each check reads the events
            found.append(len(processes.now))
        until.touch()

    def occurrences(kind: str) -> int:
        return sum(event["event"] == kind for event in read_run(path).events)

    def watch(progress: Progress) -> None:
        processes(progress)
        if progress.update > 20 and resizing.ident is None:
            resizing.start()

    resizing, pause = Thread(target=resize, daemon=True), Event()
    processes = Processes(until, joined=100)
    result = read_run(run(configure(3, 4, 400, problem=slow(until)), path, progress=watch))
    check_sound(result)
    assert "worker_lost" not in {event["event"] for event in result.events}
    assert found == [2, 1, 1]  # worker 3 beside 0 to 2; at last 6 and 7 beside 0 and 1


def test_an_accelerator_needs_one_worker_per_process() -> None:
    with pytest.raises(
        InputError, match=r"cluster.*gpus_per_worker = 0.5 .* workers_per_process = 4, .*expected"
    ):
        configure(8, 4, 10, cluster={"gpus_per_worker": 0.5})
