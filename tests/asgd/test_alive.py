"""Heartbeat files of a live process, of a dead one, and of one on another host."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asgd.rundir import alive
from asgd.rundir.alive import heartbeat, read_heartbeat

HOLDS = """
import sys, time
from pathlib import Path
from asgd.rundir.alive import heartbeat
with heartbeat(Path(sys.argv[1])):
    print("alive", flush=True)
    time.sleep(60)
"""


def test_a_process_is_here_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "alive\n"
        sign = read_heartbeat(tmp_path)
        assert sign is not None
        assert (sign.presence, sign.host, sign.pid) == ("here", platform.node(), process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        sign = read_heartbeat(tmp_path)
        assert sign is not None
        assert sign.presence == "gone"


def test_an_orderly_end_removes_the_heartbeat_file(tmp_path: Path) -> None:
    with heartbeat(tmp_path):
        assert read_heartbeat(tmp_path) is not None
    assert read_heartbeat(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_the_heartbeat_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "_BEAT_SECONDS", 0.001)
    path = tmp_path / "alive"
    with heartbeat(tmp_path):
        os.utime(path, (0.0, 0.0))
        while path.stat().st_mtime == 0.0:
            pass


def test_the_last_heartbeat_decides_about_a_process_on_another_host(tmp_path: Path) -> None:
    path = tmp_path / "alive"
    path.write_text(json.dumps({"host": "far-away", "pid": 1}), encoding="utf-8")
    sign = read_heartbeat(tmp_path)
    assert sign is not None
    assert sign.presence == "elsewhere"
    os.utime(path, (0.0, 0.0))
    sign = read_heartbeat(tmp_path)
    assert sign is not None
    assert sign.presence == "silent"
    assert sign.age > 1e9


@pytest.mark.parametrize("damage", ["", "3", "{}", '{"host": "x", "pid": "y"}', "\udcff"])
def test_a_damaged_file_is_no_heartbeat(tmp_path: Path, damage: str) -> None:
    (tmp_path / "alive").write_text(damage, encoding="utf-8", errors="surrogateescape")
    assert read_heartbeat(tmp_path) is None
