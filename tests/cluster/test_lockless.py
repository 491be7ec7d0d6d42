"""Runs in a directory without locks: they are refused, or use claims instead."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asgd.rundir.reader import Run, read_run
from asgd.rundir.repeats import read_runs
from cluster.storage.verify import verify
from tests.support.invariants import check_gradients
from tests.support.lockless import without_locks
from tests.support.processes import below, parts
from tests.support.ray_hosts import wait_for

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
PATIENCE = 280.0

# Continues until a file exists.
CONFIG = """
problem.kind = "tests.support.plugins:bowl"
problem.options = {{ fault = "slow", until = "{}" }}
optimizer.learning_rate = 0.01
cluster.workers = 3
run.updates = 600
run.eval_every = 50
run.checkpoint_every = 50
"""


def asgd(directory: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start a command for which the directory has no locks."""
    command = (sys.executable, "-m", "asgd", *arguments)
    return subprocess.Popen(
        without_locks(directory, *command), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "run.toml").write_text(CONFIG.format(tmp_path / "enough"))
    (tmp_path / "mount").mkdir()
    yield tmp_path / "mount"
    for pid, line in below(os.getpid()).items():
        if str(tmp_path) in line:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def refusal(child: subprocess.Popen[str]) -> str:
    errors = child.communicate(timeout=PATIENCE)[1]
    assert child.returncode == 2
    assert re.fullmatch(r"asgd: .*\n", errors)
    return errors


@pytest.mark.parametrize(("command", "repeats"), [("run", 1), ("run", 2), ("simulate", 2)])
def test_a_directory_without_locks_is_refused_before_anything_is_made(
    place: Path, command: str, repeats: int
) -> None:
    (place / "empty").mkdir()
    config = place.parent / "run.toml"
    for out in (place / "empty", place / "some" / "where"):
        more = ("--out", out, "--set", f"run.repeats={repeats}")
        assert refusal(asgd(place, command, config, *more)) == (
            f'asgd: cluster.lease = "flock": {out} is on a file system without locks (No locks '
            'available): expected cluster.lease = "file", a local disk, or NFS version 4\n'
        )
    assert [*place.rglob("*")] == [place / "empty"]


def test_a_simulation_needs_no_locks_and_repeats_need_none_with_claims(place: Path) -> None:
    few = ("--set", "run.updates=10", "--quiet")
    (place.parent / "enough").touch()
    for out, more in (("one", ()), ("two", ("--set=run.repeats=2", "--set=cluster.lease=file"))):
        config = place.parent / "run.toml"
        child = asgd(place, "simulate", config, "--out", place / out, *few, *more)
        assert child.communicate(timeout=PATIENCE) == (None, "")
    assert [run.state for run in read_runs(place / "two")] == ["finished"] * 2
    assert not [*place.glob("two/lock*")]


def launcher(child: subprocess.Popen[str]) -> int:
    """Return the process id of the launcher, a descendant of the started process."""
    [pid] = [pid for pid, line in below(child.pid).items() if "-m\0asgd\0run" in line]
    return pid


@pytest.mark.slow
def test_every_gradient_counts_once_although_processes_are_killed(place: Path) -> None:
    """The server, its recorder and the launcher are killed; then the run is resumed."""
    out = place / "run"
    more = ("--out", out, "--set", "cluster.lease=file", "--quiet")
    child = asgd(place, "run", place.parent / "run.toml", *more)
    known = 0

    def go_on(restored: int) -> None:
        def holds(run: Run) -> bool:
            times = sum(event["event"] == "server_restored" for event in run.events)
            return times == restored and len(run.trace) > known + 20

        nonlocal known
        known = len(wait_for(out, holds, PATIENCE).trace)

    go_on(0)
    for number, name in enumerate(("server", "recorder"), start=1):
        [pid] = parts(launcher(child), name)
        os.kill(pid, signal.SIGKILL)
        go_on(number)
    assert "is still running (process" in refusal(asgd(place, "run", "--resume", out))
    os.kill(launcher(child), signal.SIGKILL)
    errors = child.communicate(timeout=PATIENCE)[1]
    failed = read_run(out)
    assert (failed.state, errors) == ("failed", f"asgd: {failed.failure}\n")
    assert not list((out / "checkpoints").glob("lock-*"))  # the guard removed it

    (place.parent / "enough").touch()
    child = asgd(place, "run", "--resume", out, "--quiet")
    assert child.communicate(timeout=PATIENCE) == (None, "")
    run = read_run(out)
    assert run.state == "finished"
    assert [e["updates_lost"] for e in run.events if e["event"] == "server_restored"] == [0] * 3
    check_gradients(run)
    assert verify(run).findings == []
    assert not [*out.glob("checkpoints/lock-*"), *out.glob("checkpoints/lease-*")]
