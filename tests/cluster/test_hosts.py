"""Runs over several hosts, some of which are cut off from the network and reconnected.

Ray is started on the hosts with the commands on the page on clusters.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from analysis.report.activity import workers_table
from analysis.report.write import write_report
from asgd.rundir.reader import Run, read_run
from cluster.storage.verify import verify
from tests.support.hosts import parted, why_no_hosts
from tests.support.invariants import check_gradients, check_trace
from tests.support.processes import below
from tests.support.ray_hosts import RayHosts, ray_hosts, wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts())),
]

SERVER = "--labels=asgd=server"
PATIENCE = 100.0

CONFIG = """
problem.kind = "quadratic"
cluster.workers = 3
run.updates = 400
"""

# Continues, more and more slowly, until a file exists.
STEADY = """
problem.kind = "tests.support.plugins:bowl"
problem.options = {{ fault = "slow", until = "{}" }}
optimizer.learning_rate = 0.01
cluster.workers = 3
run.updates = 2000
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    """Provide a head without cores, on three hosts."""
    with ray_hosts(3, tmp_path_factory.mktemp("home"), rate="1gbit") as cluster:
        yield cluster


@pytest.fixture
def cluster(hosts: RayHosts) -> RayHosts:
    """Add a host with one core for the server, and one with two, unless they are there."""
    _, server, other = hosts.hosts
    hosts.complete({server: ("--num-cpus=1", SERVER), other: ("--num-cpus=2",)})
    return hosts


class Steady:
    """A run that continues until `finish`."""

    def __init__(self, cluster: RayHosts, path: Path) -> None:
        self.out = path / "run"
        self._enough = path / "enough"
        (path / "run.toml").write_text(STEADY.format(self._enough))
        self._process = cluster.run(path / "run.toml", self.out)

    def __enter__(self) -> Steady:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in below(self._process.pid):  # the launcher, if it is still there
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(PATIENCE)

    def wait(self, holds: Callable[[Run], bool]) -> Run:
        """Wait until a condition holds for the run."""
        return wait_for(self.out, holds, PATIENCE)

    def go_on(self) -> Run:
        """Wait for more updates."""
        known = len(self.wait(lambda run: True).trace)
        return self.wait(lambda run: len(run.trace) > known + 20)

    def until_all_work(self) -> None:
        """Wait for updates of every worker."""
        known = len(self.wait(lambda run: True).trace)
        self.wait(lambda run: set(run.trace["worker"][known:]) == {0, 1, 2})

    def finish(self) -> Run:
        """Let the run end, and check that each gradient was applied once or reported."""
        self._enough.touch()
        said = self._process.communicate(timeout=PATIENCE)
        assert self._process.returncode == 0, said
        run = read_run(self.out)
        assert run.state == "finished"
        check_gradients(run)
        assert verify(run).findings == []
        return run


def named(run: Run, kind: str) -> list[dict[str, object]]:
    return [event for event in run.events if event["event"] == kind]


def test_workers_are_placed_on_free_cores_and_the_report_names_the_hosts(
    cluster: RayHosts, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    out = tmp_path / "run"
    with cluster.run(tmp_path / "run.toml", out) as run:
        assert run.wait() == 0, run.communicate()
    result = read_run(out)
    check_trace(result)
    assert result.environment["host"] == "host1"
    [server] = [e["host"] for e in result.events if e["event"] == "server_placed"]
    table = workers_table(result)
    assert server == "host2"
    assert sorted(table["host"]) == ["host2", "host3", "host3"]
    shared = table["host"] == server
    assert (table["transport"][shared] == "shm").all()
    assert (table["transport"][~shared] == "tcp").all()
    page = write_report([out], tmp_path / "report.html").read_text()
    assert all(f'data-label="host" class="text">{host}<' in page for host in set(table["host"]))


def test_a_run_survives_short_cuts_and_replaces_a_silent_host(
    cluster: RayHosts, tmp_path: Path
) -> None:
    head, server, other = cluster.hosts
    with Steady(cluster, tmp_path) as steady:
        steady.go_on()
        # The server's answers do not reach the workers: their connections are half open.
        server.cut(other)
        time.sleep(2)
        server.mend(other)
        with parted([other], [head, server]):
            time.sleep(2)
        untouched = steady.go_on()
        cluster.give_up(other)
        with parted([other], [head, server]):
            steady.wait(lambda run: len(named(run, "worker_joined")) == 5)
        # The host is reconnected while the replacements work.
        steady.go_on()
        run = steady.finish()
    assert not named(untouched, "worker_lost")
    assert not named(untouched, "connection_lost")
    lost = named(run, "worker_lost")
    assert [event["host"] for event in lost] == ["host3", "host3"]
    assert {event["reason"] for event in lost} == {"its node is gone"}
    assert [event["host"] for event in named(run, "worker_placed")[3:]] == ["host2", "host2"]
    assert not named(run, "server_restored")


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "lost"), [(5.0, 0), (60.0, 2), (math.inf, 2)])
def test_a_run_continues_without_a_host_that_is_cut_off(
    cluster: RayHosts, tmp_path: Path, seconds: float, lost: int
) -> None:
    """The cut is shorter than Ray needs to notice it, longer, or lasts until the run ends."""
    head, server, other = cluster.hosts
    with Steady(cluster, tmp_path) as steady, contextlib.ExitStack() as links:
        steady.go_on()
        if lost:
            cluster.give_up(other)
        links.enter_context(parted([other], [head, server]))
        if math.isfinite(seconds):
            time.sleep(seconds)
        if lost:
            steady.wait(lambda run: len(named(run, "worker_joined")) == 3 + lost)
            steady.go_on()
        if math.isfinite(seconds):
            links.close()
        steady.until_all_work()
        run = steady.finish()
    assert [event["host"] for event in named(run, "worker_lost")] == ["host3"] * lost
    assert not named(run, "server_restored")


@pytest.mark.slow
@pytest.mark.parametrize("driver", [False, True])
def test_server_cut_off_for_seconds_loses_nothing(
    cluster: RayHosts, tmp_path: Path, driver: bool
) -> None:
    """It is cut off from the workers on the other host, and in one case from the driver."""
    head, server, other = cluster.hosts
    with Steady(cluster, tmp_path) as steady:
        steady.go_on()
        with parted([server], [head, other] if driver else [other]):
            time.sleep(5)
        steady.until_all_work()
        run = steady.finish()
    assert not named(run, "worker_lost")
    assert not named(run, "server_restored")


@pytest.mark.slow
def test_unreachable_workers_are_replaced_on_the_host_of_the_server(
    cluster: RayHosts, tmp_path: Path
) -> None:
    """Ray still reaches their host, so their node does not count as gone."""
    _, server, other = cluster.hosts
    with Steady(cluster, tmp_path) as steady:
        steady.go_on()
        with parted([server], [other]):
            steady.wait(lambda run: len(named(run, "worker_lost")) >= 2)
            steady.until_all_work()
        run = steady.finish()
    assert not named(run, "server_restored")
    assert {event["host"] for event in named(run, "worker_lost")} == {"host3"}
    assert {event["host"] for event in named(run, "worker_placed")[3:]} == {"host2"}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [False, True])
def test_server_cut_off_from_the_driver_is_replaced(
    cluster: RayHosts, tmp_path: Path, workers: bool
) -> None:
    """In one case it is cut off from workers too. It lives on, but writes nothing into the run."""
    head, server, other = cluster.hosts
    with Steady(cluster, tmp_path) as steady:
        steady.go_on()
        cluster.give_up(server)
        with parted([server], [head, other] if workers else [head]):
            steady.wait(lambda run: len(named(run, "worker_joined")) == 6)
            steady.go_on()
            old = [
                line for line in below(server.pid).values() if line.startswith("ray::ServerActor")
            ]
        steady.go_on()
        run = steady.finish()
    assert len(old) == 1, "expected the old server to live on"
    [restored] = named(run, "server_restored")
    assert restored["updates_lost"] == 0
    assert [event["host"] for event in named(run, "server_placed")] == ["host2", "host1"]
    assert {event["host"] for event in named(run, "worker_placed")[3:]} == {"host3"}


@pytest.mark.slow
def test_run_waits_for_nodes_when_all_are_gone(hosts: RayHosts, tmp_path: Path) -> None:
    """As with spot instances, both worker nodes die, and two new ones start after 30 s."""
    _, *others = hosts.hosts
    hosts.complete(dict.fromkeys(others, ("--num-cpus=1",)))
    with Steady(hosts, tmp_path) as steady:
        steady.go_on()
        hosts.kill(*others)
        waiting = steady.wait(lambda run: bool(named(run, "waiting_for_nodes")))
        time.sleep(30)
        waited = named(read_run(steady.out), "worker_placed")
        hosts.complete(dict.fromkeys(others, ("--num-cpus=1",)))
        steady.wait(lambda run: len(named(run, "worker_joined")) == 6)
        run = steady.finish()
    assert not named(run, "server_restored")  # it is on the head, with the driver
    # Placements before it waits may be more than three: Ray notices one node's death first, and
    # its workers then go to the other.
    placed = named(waiting, "worker_placed")
    assert {event["worker"] for event in placed} == {0, 1, 2}
    assert waited == placed, "expected no placement while there is no node"
    assert {event["host"] for event in named(run, "worker_placed")} == {"host2", "host3"}
    # Ray notices the death of a process before or after that of its node.
    for event in named(run, "worker_lost"):
        assert str(event["reason"]).startswith(("its node is gone", "its process died: killed"))
        assert event["host"] in ("host2", "host3")
