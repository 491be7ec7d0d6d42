"""The guard, which cleans up after a driver; these tests start no Ray."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.local_ray.guard import _Facts, _is_killed, guarded, processes
from cluster.local_ray.vitals import guard_of_process, ray_death
from tests.support.processes import processes_in

DRIVER = """
import os, subprocess, sys, time
from cluster.local_ray.guard import guarded, mark

directory, what = sys.argv[1:]
with guarded() as guard:
    guard.tell(directory=directory)
    if what == "guard killed":
        guard.process.kill()
        guard.process.wait()
        guard.renew()
    if what == "forked" and not os.fork():
        time.sleep(60)
    child = subprocess.Popen(["sleep", "60"], env=mark(directory), stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("what", ["", "forked", "guard killed"])
def test_the_guard_cleans_up_after_a_killed_driver(tmp_path: Path, what: str) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(directory), what],
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
    if what == "forked":
        os.killpg(driver.pid, signal.SIGKILL)
    driver.stdout.close()
    while directory.exists():  # the guard removes it last
        os.sched_yield()


def test_a_launcher_replaces_a_guard_that_was_killed() -> None:
    with guard_of_process() as guard:
        first = guard.process
        first.kill()
        first.wait()
        assert ray_death() is None
        assert guard.process is not first
        assert guard.process.poll() is None


AT_A_RUN = """
import contextlib, fcntl, os, signal, subprocess, sys, time
from cluster.local_ray.guard import guarded

run, locked, began, dies = sys.argv[1:]
lock = open(run + "/checkpoints/lock", "w")
if not locked:
    fcntl.flock(lock, fcntl.LOCK_EX)
with guarded() as guard:
    guard.tell(part="raylet", pid=os.getpid())  # as if the raylet died with the driver
    guard.tell(run=run, began=float(began), since=float(began))
    print(flush=True)
    if dies:
        os.close(guard.process.stdin.fileno())
        with contextlib.suppress(subprocess.TimeoutExpired):
            guard.process.wait(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""


def driver_at_a_run(
    run: Path, locked: str = "", began: float = 0.0, dies: str = ""
) -> subprocess.Popen[str]:
    """Start a driver that has told its guard of the run."""
    driver = subprocess.Popen(
        [sys.executable, "-c", AT_A_RUN, str(run), locked, str(began), dies],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    driver.stdout.readline()
    return driver


def test_the_guard_waits_for_the_locks_of_a_dying_driver(tmp_path: Path) -> None:
    """The kernel closes the files of a killed process one by one; here the guard's input first."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n')
    driver = driver_at_a_run(tmp_path, dies="slowly")
    _, errors = driver.communicate(timeout=30)
    assert errors == f"asgd: the launcher, process {driver.pid}, was killed or crashed\n"


@pytest.mark.parametrize(
    ("events", "locked", "began", "noted"),
    [
        ('{"event": "start"}\n', False, 0.0, True),
        ('{"event": "start"}\n{"torn', False, 0.0, True),
        ('{"event": "start"}\n{"event": "finish"}\n', False, 0.0, False),
        ('{"event": "start"}\n', True, 0.0, False),
        ('{"event": "start", "time": 5.0}\n', False, 5.0, True),
        ('{"event": "start", "time": 4.0}\n', False, 5.0, False),  # of another run
        ("", False, 5.0, False),
    ],
)
def test_the_run_of_a_killed_driver_is_recorded_as_failed(
    tmp_path: Path, events: str, locked: bool, began: float, noted: bool
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "events.jsonl").write_text(events)
    driver = driver_at_a_run(tmp_path, "other" if locked else "", began)
    with (tmp_path / "checkpoints" / "lock").open("r+") as another:
        if locked:  # another launcher continues the run
            fcntl.flock(another, fcntl.LOCK_EX)
        driver.kill()
        _, errors = driver.communicate(timeout=30)  # until the guard ends too
    reason = f"the launcher, process {driver.pid}, was killed or crashed"
    content = (tmp_path / "events.jsonl").read_text()
    assert errors == (f"asgd: {reason}\n" if noted else "")
    assert content.startswith(events)
    if noted:
        event = json.loads(content.removeprefix(events))
        assert (event["event"], event["reason"]) == ("failed", reason)
    else:
        assert content == events


@pytest.mark.parametrize(("since", "said"), [(5.0, "asgd: the disk is full\n"), (7.0, "")])
def test_a_failure_recorded_by_a_killed_driver_is_printed(
    tmp_path: Path, since: float, said: str
) -> None:
    """A driver prints a failure only after it has closed Ray, which takes seconds.

    The driver has printed failures from before `since` itself.
    """
    events = (
        '{"event": "start", "time": 5.0}\n'
        '{"event": "failed", "time": 6.0, "reason": "the disk is full"}\n'
    )
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "events.jsonl").write_text(events)
    driver = driver_at_a_run(tmp_path, began=since)
    driver.kill()
    _, errors = driver.communicate(timeout=30)
    assert errors == said
    assert (tmp_path / "events.jsonl").read_text() == events


def test_a_failure_that_cannot_be_recorded_is_printed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n')
    driver = driver_at_a_run(tmp_path)
    (tmp_path / "checkpoints" / "lock").unlink()
    (tmp_path / "checkpoints" / "lock").mkdir()  # cannot be opened
    driver.kill()
    _, errors = driver.communicate(timeout=30)
    assert errors == f"asgd: the launcher, process {driver.pid}, was killed or crashed\n"
    assert (tmp_path / "events.jsonl").read_text() == '{"event": "start"}\n'


@contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[int]:
    process = subprocess.Popen(command, **options)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def test_parts_of_ray_that_died_before_the_driver_are_named(tmp_path: Path) -> None:
    """The parent of this process stands in for the driver, two children for parts of Ray."""
    log = tmp_path / "r" / "session_1" / "logs" / "raylet.err"
    log.parent.mkdir(parents=True)
    log.write_text("one Ray agent failed, agent_name = dashboard_agent")
    told = _Facts()
    told.hear(json.dumps({"driver": os.getppid()}).encode())
    told.hear(json.dumps({"directory": str(tmp_path)}).encode())
    with child(["sleep", "60"]) as alive, child(["sleep", "60"]) as dying:
        told.hear(json.dumps({"part": "gcs_server", "pid": alive}).encode())
        told.hear(json.dumps({"part": "raylet", "pid": dying}).encode())
        assert told.poll()
        assert told.describe_end().endswith("was killed or crashed")
        os.kill(dying, signal.SIGKILL)
        assert select.select([*told.parts], [], [], 30)[0]
        assert told.poll()
        assert told.describe_end().endswith("after Ray's dashboard_agent and raylet had died")
        told.hear(json.dumps({"directory": None}).encode())
        assert told.describe_end().endswith("was killed or crashed")


def test_a_killed_process_is_distinguished_from_one_that_exits() -> None:
    with child(["sleep", "60"]) as killed, child(["false"]) as exited:
        assert not _is_killed(killed)
        os.kill(killed, signal.SIGKILL)
        assert _is_killed(killed)
        os.waitid(os.P_PID, exited, os.WEXITED | os.WNOWAIT)
        assert not _is_killed(exited)
        os.waitid(os.P_PID, killed, os.WEXITED | os.WNOWAIT)
        assert _is_killed(killed)
    assert _is_killed(exited)  # an unknown process counts as killed


TITLED = "import sys, time; file = open(sys.argv[1], 'a'); print(flush=True); time.sleep(60)"


def test_the_guard_spares_the_driver_and_other_readers_of_the_directory(tmp_path: Path) -> None:
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

    with log.open("a"), guarded() as guard:
        guard.tell(directory=str(directory))
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


def test_a_killed_process_is_found_until_it_has_exited(tmp_path: Path) -> None:
    """While its memory is freed, a killed process has open files but no command line."""
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


FORK_WITH_JAX = """
import subprocess, sys, warnings
import jax.numpy
from cluster.local_ray.session import no_fork_warnings
jax.numpy.zeros(1)

def fork():
    subprocess.run(["true"], check=True, preexec_fn=lambda: None)  # as Ray starts its processes

with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    fork()
    assert "JAX" in str(heard[0].message), heard
    with no_fork_warnings():
        fork()
    assert len(heard) == 1, heard
"""


def test_ray_starts_without_a_warning_where_a_problem_uses_jax() -> None:
    pytest.importorskip("jax")
    subprocess.run([sys.executable, "-c", FORK_WITH_JAX], check=True, timeout=120)
