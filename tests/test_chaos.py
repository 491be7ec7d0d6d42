"""Real runs under faults at random moments: nothing is missing, made twice or unaccounted for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.ray
@pytest.mark.slow
def test_runs_survive_the_death_of_workers_servers_and_a_node() -> None:
    command = [sys.executable, "scripts/bench_chaos.py", "--runs", "3"]
    command += ["--updates", "300", "--faults", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs finished         3 of 3" in done.stdout
    assert "invariants violated   0" in done.stdout
    injected = re.search(r"(\d+) faults \(.*node \d", done.stdout)
    assert injected is not None
    assert int(injected[1]) >= 5
