"""The process that clears up behind a driver, without any Ray."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.guard import guarded, processes

DRIVER = """
import os, subprocess, sys, time
from cluster.guard import guarded

token, directory, forked = sys.argv[1:]
with guarded(token, directory):
    if forked and not os.fork():
        time.sleep(60)
    child = subprocess.Popen(["sleep", "60"], env={"TOKEN": token}, stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("forked", ["", "forked"])
def test_what_a_killed_driver_leaves_is_cleared_up(tmp_path: Path, forked: str) -> None:
    token, directory = os.urandom(16).hex(), tmp_path / "files"
    directory.mkdir()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, token, str(directory), forked],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert driver.stdout is not None
    child = os.pidfd_open(int(driver.stdout.readline()))
    driver.kill()
    driver.wait()
    assert select.select([child], [], [], 30)[0]
    os.close(child)
    if forked:
        os.killpg(driver.pid, signal.SIGKILL)
    driver.stdout.close()
    while directory.exists():  # the last thing that the guard does
        os.sched_yield()


def test_driver_that_goes_on_is_spared(tmp_path: Path) -> None:
    token, directory = os.urandom(16).hex(), tmp_path / "files"
    directory.mkdir()
    with (directory / "log").open("w"), guarded(token, str(directory)):
        assert processes(token, str(directory), driver=0) == [os.getpid()]
    assert not directory.exists()
