"""A run of a network in PyTorch continues after the loss of a worker and of its server."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from asgd.progress import Progress
from asgd.rundir.reader import read_run
from cluster import run
from cluster.storage.verify import verify
from tests.support.invariants import check_gradients
from tests.support.processes import actor_processes

pytest.importorskip("torch", reason="PyTorch is not installed")
pytestmark = pytest.mark.ray

UPDATES, EVERY = 300, 20


class Killer:
    """Kills a worker at one update, and the server at a later one."""

    def __init__(self, worker_at: int, server_at: int) -> None:
        self._due = [(worker_at, "WorkerActor"), (server_at, "ServerActor")]

    def __call__(self, progress: Progress) -> None:
        if self._due and progress.update >= self._due[0][0] and progress.workers == 2:
            _, kind = self._due.pop(0)
            os.kill(min(actor_processes(kind)), signal.SIGKILL)


@pytest.mark.usefixtures("shared_ray")
def test_a_network_outlives_kill_9_of_a_worker_and_of_the_server(tmp_path: Path) -> None:
    config = {
        "problem": {
            "kind": "tests.support.networks:torch_perceptron",
            "options": {"dropout": 0.2},
        },
        "optimizer": {"rule": "momentum", "learning_rate": 0.05, "batch_size": 16},
        "cluster": {"workers": 2, "compute_time": {"law": "constant", "mean": 0.01}},
        "run": {"updates": UPDATES, "eval_every": 50, "checkpoint_every": EVERY},
    }
    result = read_run(run(config, tmp_path / "run", progress=Killer(EVERY, 5 * EVERY)))
    assert result.state == "finished"
    kinds = [event["event"] for event in result.events]
    assert kinds.count("worker_lost") >= 1
    assert kinds.count("server_restored") == 1
    assert kinds.index("worker_lost") < kinds.index("server_restored")
    assert result.loss["update"].tolist() == list(range(0, UPDATES + 1, 50))
    check_gradients(result)
    verdict = verify(result)
    assert not verdict.findings
    assert verdict.checked.endswith("; a replay agrees")
