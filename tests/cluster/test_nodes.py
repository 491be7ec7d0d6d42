"""A run on several Ray nodes, which die one after another, the server's among them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from asgd.rundir.reader import read_run
from tests.support.processes import processes_in

ROOT = Path(__file__).parents[2]

# Three nodes that listen on loopback: the driver's, one for the server and one more. The last one
# dies with all its processes. On the server's node, only the raylet is killed, so other processes
# live on for a while.
SCRIPT = """
import os, signal, sys, urllib.request
from ray.cluster_utils import Cluster
from asgd.config.make import make_config
from asgd.rundir.reader import read_run
from cluster import run

size = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=size)
server = cluster.add_node(**size, labels={"asgd": "server"})
other = cluster.add_node(**size)
doomed = [
    lambda: cluster.remove_node(other, allow_graceful=False),
    lambda: os.kill(server.all_processes["raylet"][0].process.pid, signal.SIGKILL),
]
events = lambda: [e["event"] for e in read_run(sys.argv[1]).events]
pages = lambda: [e["url"] for e in read_run(sys.argv[1]).events if e["event"] == "metrics"]
read = lambda page: urllib.request.urlopen(page, timeout=30).read()
shown = lambda number: len(pages()) == number and b"ray_asgd_updates_total" in read(pages()[-1])
conditions = [
    lambda update: update > 40 and shown(1),
    lambda update: "worker_lost" in events() and events().count("worker_joined") > 3,
    lambda update: "server_restored" in events() and events()[-1] == "worker_joined" and shown(2),
]

def watch(progress):
    if conditions[0](progress.update):
        conditions.pop(0)
        if doomed:
            doomed.pop(0)()
        else:
            open(sys.argv[2], "w").close()
            conditions.append(lambda update: False)

problem = {"kind": "tests.support.plugins:bowl", "options": {"fault": "slow", "until": sys.argv[2]}}
config = {
    "problem": problem,
    "optimizer": {"learning_rate": 0.01},
    "cluster": {"workers": 3},
    "run": {"updates": 3000, "eval_every": 100},
    "metrics": {"prometheus": True},
}
try:
    run(make_config(config), sys.argv[1], cluster.address, watch)
finally:
    cluster.shutdown()
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """Provide a directory for Ray, whose processes never outlive the test."""
    path = Path(tempfile.mkdtemp(prefix="a-", dir="/tmp"))
    (path / "ray").mkdir()
    yield path
    for pid in processes_in(path):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_run_survives_the_death_of_its_nodes(tmp_path: Path, directory: Path) -> None:
    out = tmp_path / "run"
    health = {"initial_delay_ms": 500, "period_ms": 500, "timeout_ms": 1000, "failure_threshold": 4}
    # A Ray of this process has its token in the environment; these nodes have none.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out), str(tmp_path / "enough")],
        cwd=ROOT,
        env={
            **environment,
            **{f"RAY_health_check_{name}": str(value) for name, value in health.items()},
            "RAY_TMPDIR": str(directory),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_metrics_report_interval_ms": "500",
            "RAY_worker_maximum_startup_concurrency": "64",  # otherwise one for each core
            "RAY_worker_niceness": "0",  # otherwise 15, and workers wait for others
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr.count("asks for no token: anyone who reaches it can use it\n") == 1

    result = read_run(out)
    assert result.state == "finished"
    kinds = [event["event"] for event in result.events]
    joined = [event for event in result.events if event["event"] == "worker_joined"]
    # One worker on each node at the start: one on the server's.
    assert sorted(event["transport"] for event in joined[:3]) == ["shm", "tcp", "tcp"]
    lost, restored = kinds.index("worker_lost"), kinds.index("server_restored")
    assert lost < restored
    # Metrics were read on the page of each server's own node.
    pages = {event["url"] for event in result.events if event["event"] == "metrics"}
    assert len(pages) == 2
    assert kinds.count("server_restored") == 1
    assert len({event["worker"] for event in joined[-3:]}) == 3
    # No update is missing, and no gradient was applied twice.
    trace = result.trace
    np.testing.assert_array_equal(trace["update"], np.arange(3000))
    np.testing.assert_array_equal(trace["staleness"], trace["update"] - trace["read_version"])
    assert trace["staleness"].min() >= 0
    assert not trace.duplicated(["worker", "sequence"]).any()
    missing = {(e["worker"], e["sequence"]) for e in result.events if e["event"] == "gradient_lost"}
    assert not missing & set(zip(trace["worker"], trace["sequence"], strict=True))
