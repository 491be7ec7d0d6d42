"""Real runs with faults at random times: no gradient is missing, repeated or unreported."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from asgd.progress import Progress
from asgd.rundir.checkpoint import CHECKPOINTS
from scripts.bench_chaos import Injector
from scripts.hosts_chaos import KILLS, PARTITIONS, drawn

ROOT = Path(__file__).parents[2]


def test_the_injector_does_not_damage_the_last_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / CHECKPOINTS
    directory.mkdir()
    (directory / "checkpoint-000000000200.bin").write_bytes(bytes(100))
    final = directory / "checkpoint-000000000300.bin"
    final.write_bytes(bytes(100))
    with Injector(tmp_path, 300, ["checkpoint"], 0, None) as injector:
        injector.watch(
            Progress(
                update=300,
                updates=300,
                updates_per_second=1.0,
                mean_staleness=0.0,
                loss=None,
                workers=4,
            )
        )
        injector._thread.join()
    assert not injector.injected
    assert all(path.read_bytes() == bytes(100) for path in directory.iterdir())


@pytest.mark.ray
@pytest.mark.slow
def test_runs_survive_the_death_of_workers_servers_and_a_node() -> None:
    command = [sys.executable, "scripts/bench_chaos.py", "--runs", "2"]
    command += ["--updates", "1000", "--faults", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs finished         2 of 2" in done.stdout
    assert "invariants violated   0" in done.stdout
    injected = re.search(r"(\d+) faults \(.*node \d", done.stdout)
    assert injected is not None
    assert int(injected[1]) >= 2  # a run may end before its last fault is due


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_launcher_reports_the_cause_and_leaves_nothing() -> None:
    command = [sys.executable, "scripts/bench_chaos.py", "--launched", "2", "--seed", "1"]
    done = subprocess.run(
        [*command, "--faults", "2"], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"2 runs, [1-4] faults \(.*\); 0 runs wrong", done.stdout)


def test_every_partition_and_kill_is_drawn() -> None:
    faults = drawn(np.random.default_rng(0), len(PARTITIONS) + 3, 2 * len(KILLS))
    counts = Counter(faults)
    assert len(faults) == len(PARTITIONS) + 3 + 2 * len(KILLS)
    assert {counts[kind] for kind in PARTITIONS} == {1, 2}
    assert {counts[(kind,)] for kind in KILLS} == {2}
