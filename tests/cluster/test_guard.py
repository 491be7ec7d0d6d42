"""The process that clears up behind a driver, without any Ray."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.local_ray.guard import _Facts, guarded, processes
from tests.support.processes import processes_in

DRIVER = """
import os, subprocess, sys, time
from cluster.local_ray.guard import guarded, mark

directory, forked = sys.argv[1:]
with guarded(directory):
    if forked and not os.fork():
        time.sleep(60)
    child = subprocess.Popen(["sleep", "60"], env=mark(directory), stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("forked", ["", "forked"])
def test_what_a_killed_driver_leaves_is_cleared_up(tmp_path: Path, forked: str) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(directory), forked],
        cwd=Path(__file__).parents[2],
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


AT_A_RUN = """
import fcntl, os, sys, time
from cluster.local_ray.guard import guarded

run, locked = sys.argv[1:]
lock = open(run + "/checkpoints/lock", "w")
if not locked:
    fcntl.flock(lock, fcntl.LOCK_EX)
with guarded() as guard:
    guard.tell(part="raylet", pid=os.getpid())  # as if the kernel ended it with the driver
    guard.tell(run=run)
    print(flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("events", "locked", "noted"),
    [
        ('{"event": "start"}\n', False, True),
        ('{"event": "start"}\n{"torn', False, True),
        ('{"event": "start"}\n{"event": "finish"}\n', False, False),
        ('{"event": "start"}\n', True, False),
    ],
)
def test_run_of_a_killed_driver_says_that_it_failed(
    tmp_path: Path, events: str, locked: bool, noted: bool
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "events.jsonl").write_text(events)
    driver = subprocess.Popen(
        [sys.executable, "-c", AT_A_RUN, str(tmp_path), "other" if locked else ""],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    driver.stdout.readline()
    with (tmp_path / "checkpoints" / "lock").open("r+") as another:
        if locked:  # another launcher goes on with the run
            fcntl.flock(another, fcntl.LOCK_EX)
        driver.kill()
        _, errors = driver.communicate(timeout=30)  # the guard has this end, too
    reason = f"the launcher, process {driver.pid}, was killed or crashed"
    content = (tmp_path / "events.jsonl").read_text()
    assert errors == (f"asgd: {reason}\n" if noted else "")
    assert content.startswith(events)
    if noted:
        event = json.loads(content.removeprefix(events))
        assert (event["event"], event["reason"]) == ("failed", reason)
    else:
        assert content == events


def test_what_died_before_the_driver_is_named() -> None:
    never = 2**22 + 1  # larger than any process
    told = _Facts()
    told.hear(json.dumps({"directory": None, "driver": os.getppid()}).encode())
    told.hear(json.dumps({"part": "gcs_server", "pid": os.getpid()}).encode())
    told.hear(json.dumps({"part": "raylet", "pid": never}).encode())
    assert told.poll()
    assert told.describe_end().endswith("was killed or crashed")  # at the same moment
    told.dead["raylet"] -= 1.0
    assert told.describe_end().endswith("was killed or crashed after Ray's raylet had died")
    told.driver = never
    told.dead.clear()
    assert not told.poll()
    assert told.describe_end().endswith(f"process {never}, was killed or crashed")


TITLED = "import sys, time; file = open(sys.argv[1], 'a'); print(flush=True); time.sleep(60)"


def test_driver_and_others_that_look_into_the_directory_are_spared(tmp_path: Path) -> None:
    directory, beside = tmp_path / "files", tmp_path / "files-of-another"
    directory.mkdir()
    log = directory / "log"
    log.touch()
    children = []

    def start(name: str, file: Path) -> int:
        child = subprocess.Popen(
            [name, "-c", TITLED, str(file)], executable=sys.executable, stdout=subprocess.PIPE
        )
        children.append(child)
        assert child.stdout is not None
        child.stdout.readline()  # the file is open
        return child.pid

    with log.open("a"), guarded(str(directory)):
        start("tail", log)
        start("ray::WorkerActor", beside)
        assert processes(str(directory)) == []
        worker = start("ray::WorkerActor", log)
        assert processes(str(directory)) == [worker]
    assert not directory.exists()
    killed = children.pop()
    assert killed.wait() == -signal.SIGKILL
    assert [child.poll() for child in children] == [None, None]
    for child in children:
        child.kill()
        child.wait()
    for child in [*children, killed]:
        assert child.stdout is not None
        child.stdout.close()


LARGE = "memory = b'x' * 400_000_000; " + TITLED


def test_processes_that_still_exit_are_not_gone(tmp_path: Path) -> None:
    """Until its memory is free, a killed process has files but no name."""
    (tmp_path / "log").touch()
    child = subprocess.Popen(
        ["ray::WorkerActor", "-c", LARGE, str(tmp_path / "log")],
        executable=sys.executable,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    child.kill()
    while processes_in(tmp_path):
        found = processes(str(tmp_path))
        assert found == [child.pid] or not processes_in(tmp_path)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
