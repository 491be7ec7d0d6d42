"""Runs over hosts with networks of their own, on a Ray cluster started as its page tells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.report.activity import workers_table
from analysis.report.write import write_report
from asgd.rundir.reader import read_run
from tests.support.hosts import why_no_hosts
from tests.support.invariants import check_trace
from tests.support.ray_hosts import RayHosts, ray_hosts

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts())),
]

SERVER = "--labels=asgd=server"

CONFIG = """
problem.kind = "quadratic"
cluster.workers = 3
run.updates = 400
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    """Provide a head without cores, a host with one core for the server, and one with two."""
    with ray_hosts(3, tmp_path_factory.mktemp("home"), rate="1gbit") as cluster:
        _, server, other = cluster.hosts
        cluster.join(server, "--num-cpus=1", SERVER)
        cluster.join(other, "--num-cpus=2")
        yield cluster


def test_workers_go_where_cores_are_and_the_report_names_the_hosts(
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
