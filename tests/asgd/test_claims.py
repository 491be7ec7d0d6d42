"""Exclusive use of a path, by locks and by claims, between real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from asgd.config.tables import LeaseKind
from asgd.rundir import claims
from asgd.rundir.claims import HeldError, LeaseLostError, claimed, held_alone, settle

ROOT = Path(__file__).parents[2]

HOLDS = """
import sys, time
from pathlib import Path
from asgd.rundir.claims import held_alone
with held_alone(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""
# Starts a process in its own PID namespace. We cannot look it up, as if it ran on another host.
ELSEWHERE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@contextmanager
def holder(path: Path, lease: LeaseKind, *before: str) -> Iterator[int]:
    """Provide the id of a process that holds a path."""
    command = [*before, sys.executable, "-c", HOLDS, str(path), lease]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            yield int(children) if before else process.pid
        finally:
            process.kill()


def can_be_elsewhere() -> bool:
    return not subprocess.run([*ELSEWHERE, "true"], capture_output=True, check=False).returncode


@pytest.mark.parametrize("lease", ["flock", "file"])
def test_one_process_holds_a_path_until_it_ends(tmp_path: Path, lease: LeaseKind) -> None:
    path = tmp_path / "lock"
    with holder(path, lease) as pid:
        with pytest.raises(HeldError) as error, held_alone(path, lease):
            pass
        assert error.value.holder.startswith(f"process {pid}")
        os.kill(pid, signal.SIGSTOP)  # a stopped process still holds the path
        with pytest.raises(HeldError), held_alone(path, lease):
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with held_alone(path, lease) as check:
            check()
    with held_alone(path, lease):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["lock"] * (lease == "flock")


@pytest.mark.skipif(not can_be_elsewhere(), reason="a PID namespace needs root")
def test_a_claim_from_elsewhere_counts_while_its_heartbeat_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    with holder(path, "file", *ELSEWHERE) as pid:
        with pytest.raises(HeldError, match="is held by process 1 on"), held_alone(path, "file"):
            pass
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(claims, "SILENT_SECONDS", 3.0)  # longer than between heartbeats
        [claim] = tmp_path.glob("lock-*")
        with held_alone(path, "file") as check:
            check()
            assert not claim.exists()  # so its process will notice
            os.kill(pid, signal.SIGCONT)
            check()
            with (
                pytest.raises(HeldError, match=f"process {os.getpid()} "),
                held_alone(path, "file"),
            ):
                pass


def test_a_process_that_lost_its_claim_is_told(tmp_path: Path) -> None:
    with held_alone(tmp_path / "lock", "file") as check:
        [claim] = tmp_path.glob("lock-*")
        claim.unlink()
        with pytest.raises(LeaseLostError, match="another process has taken over"):
            check()


@pytest.mark.parametrize("content", ["", "3", '{"host": "far", "pid": 1}'])
def test_a_claim_of_an_unknown_process_counts_until_it_was_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """The age of its last heartbeat is ignored, because clocks of hosts may differ."""
    monkeypatch.setattr(claims, "SILENT_SECONDS", 0.5)
    claim = tmp_path / "lock-0"
    claim.write_text(content)
    for beat in (0.0, 1e11):
        os.utime(claim, (beat, beat))
    start = claims.time.monotonic()
    with claimed(tmp_path / "lock") as own:
        assert settle(tmp_path / "lock", own) is None
    assert claims.time.monotonic() >= start + 0.5
    assert not claim.exists()
