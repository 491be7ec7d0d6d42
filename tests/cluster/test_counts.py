"""A run that keeps counts: processes are killed, the run is interrupted and resumed."""

import os
import signal
from pathlib import Path

import pytest

from asgd.config.make import make_config
from asgd.progress import Progress
from asgd.rundir.checkpoint import CHECKPOINTS, paths
from asgd.rundir.counts import counted_updates
from asgd.rundir.reader import read_run
from cluster import resume, run
from cluster.storage.verify import verify
from tests.support.processes import actor_processes

pytestmark = pytest.mark.ray

UPDATES = 90_000


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("durability", ["log", "checkpoint"])
def test_counts_are_exact_after_kills_and_an_interruption(tmp_path: Path, durability: str) -> None:
    """Each kill waits until more rows are counted than at the last kill."""
    path, victims, counted = tmp_path / "run", ["RecorderActor", "ServerActor"], [0]

    def disturb(progress: Progress) -> None:
        if not (path / CHECKPOINTS).is_dir() or not paths(path / CHECKPOINTS):
            return
        found = read_run(path)
        assert found.counts["updates"].sum() >= counted[-1]
        now = counted_updates(path)
        if now == counted[-1]:
            return
        counted.append(now)
        if not victims:
            raise KeyboardInterrupt
        (pid,) = actor_processes(victims.pop())
        os.kill(pid, signal.SIGKILL)

    config = make_config(
        {
            "problem": {"kind": "quadratic"},
            "cluster": {"workers": 2},
            "run": {
                "updates": UPDATES,
                "eval_every": 5000,
                "record": "counts",
                "durability": durability,
            },
        }
    )
    with pytest.raises(KeyboardInterrupt):
        run(config, path, progress=disturb)
    assert not victims
    assert read_run(path).state == "interrupted"
    interrupted = read_run(path).counts["updates"].sum()
    assert interrupted >= counted[-1] > 0
    found = read_run(resume(path))
    assert found.state == "finished"
    assert found.counts["updates"].sum() == found.outline.updates == UPDATES
    assert counted_updates(path) > counted[-1]
    assert not (findings := verify(found).findings), findings
    restored = [event for event in found.events if event["event"] == "server_restored"]
    assert len(restored) == 3
