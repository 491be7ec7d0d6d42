"""Real runs continue after the loss of the server, of the recorder or of all processes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from analysis.prediction.predict import predict
from asgd.__main__ import main
from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.errors import InputError, RunFailedError
from asgd.progress import Progress
from asgd.rundir.changes import change_settings
from asgd.rundir.checkpoint import CHECKPOINTS, paths
from asgd.rundir.reader import Run, read_run
from asgd.rundir.repeats import read_runs
from asgd.simulation.simulate import simulate
from cluster import resume, run
from cluster.storage.checkpoint import load
from cluster.storage.verify import verify
from tests.support.faults import replay_run
from tests.support.invariants import check_gradients
from tests.support.processes import actor_processes, below, processes_in

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
EXACT = ("update", "worker", "sequence", "read_version", "staleness", "gradient_norm")


def configure(
    updates: int,
    every: int = 50,
    mean: float = 0.005,
    durability: str = "auto",
    **cluster: Any,
) -> RunConfig:
    compute_time = {"law": "constant", "mean": mean}
    run = {"updates": updates, "eval_every": 25, "checkpoint_every": every}
    return make_config(
        {
            "problem": {"kind": "quadratic"},
            "optimizer": {"rule": "momentum", "learning_rate": 0.01, "batch_size": 4},
            "cluster": {"compute_time": compute_time, **cluster},
            "run": {**run, "durability": durability},
        }
    )


class Killer:
    """Kills an actor's process each time the newest checkpoint has reached the next update.

    A restored server is killed only once there is a newer checkpoint than it was restored from.
    """

    def __init__(self, kind: str, path: Path, *updates: int) -> None:
        self.kind = kind
        self.path = path
        self.updates = list(updates)
        self.killed: set[int] = set()

    def __call__(self, progress: Progress) -> None:
        newest = paths(self.path / CHECKPOINTS)[:1]
        if not self.updates or not newest:
            return
        version = int(newest[0].stem[-12:])
        events = restored(read_run(self.path))
        if version >= self.updates[0] and all(version > event["to_version"] for event in events):
            self.updates.pop(0)
            (pid,) = actor_processes(self.kind) - self.killed
            self.killed.add(pid)
            os.kill(pid, signal.SIGKILL)


def check_continuous(result: Run) -> None:
    """Assert that no update is missing or made twice, and no gradient applied twice."""
    trace, updates = result.trace, result.config.run.updates
    assert result.state == "finished"
    np.testing.assert_array_equal(trace["update"], np.arange(updates))
    np.testing.assert_array_equal(trace["staleness"], trace["update"] - trace["read_version"])
    assert trace["staleness"].min() >= 0
    assert (trace["applied_seconds"].diff().dropna() >= 0).all()
    np.testing.assert_array_equal(result.loss["update"], np.arange(0, updates + 1, 25))
    assert not trace.duplicated(["worker", "sequence"]).any()
    assert load(paths(result.path / CHECKPOINTS)[0]).version == updates


def check_same(one: Run, other: Run) -> None:
    """Assert that two runs are equal except for their times."""
    for column in EXACT:
        np.testing.assert_array_equal(one.trace[column], other.trace[column])
    np.testing.assert_array_equal(one.loss["update"], other.loss["update"])
    np.testing.assert_array_equal(one.loss["loss"], other.loss["loss"])
    pd.testing.assert_frame_equal(one.metrics, other.metrics)
    final = [load(paths(result.path / CHECKPOINTS)[0]) for result in (one, other)]
    np.testing.assert_array_equal(final[0].parameters, final[1].parameters)


def restored(result: Run) -> list[dict[str, Any]]:
    return [event for event in result.events if event["event"] == "server_restored"]


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(("transport", "durability"), [("shm", "log"), ("ray", "checkpoint")])
def test_a_killed_server_is_restored(tmp_path: Path, transport: str, durability: str) -> None:
    config = configure(900, mean=0.01, durability=durability, workers=3, transport=transport)
    killer = Killer("ServerActor", tmp_path / "run", 50, 350)
    result = read_run(run(config, tmp_path / "run", progress=killer))
    assert len(killer.killed) == 2
    check_continuous(result)
    events = restored(result)
    assert [event["epoch"] for event in events] == [1, 2]
    for event in events:
        lost = event["updates_lost"]
        assert lost == event["from_version"] - event["to_version"] >= 0
        assert lost == 0 if durability == "log" else event["to_version"] % 50 == 0
    check_gradients(result)
    final = load(paths(result.path / CHECKPOINTS)[0]).parameters
    np.testing.assert_array_equal(final, replay_run(result)[-1])
    assert events[1]["to_version"] > events[0]["to_version"] > 0
    assert not [event for event in result.events if event["event"] == "worker_lost"]


@pytest.mark.usefixtures("shared_ray")
def test_a_killed_recorder_is_restarted_with_a_new_server(tmp_path: Path) -> None:
    killer = Killer("RecorderActor", tmp_path / "run", 50)
    # Long enough for calls of the killer during the run, even on a busy machine.
    config = configure(1200, mean=0.01, workers=2)
    result = read_run(run(config, tmp_path / "run", progress=killer))
    assert killer.killed
    check_continuous(result)
    assert len(restored(result)) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_one_worker_with_a_killed_server_equals_the_undisturbed_run(tmp_path: Path) -> None:
    config = configure(400, workers=1)
    measured = make_config({"problem": {"kind": "tests.support.plugins:measured"}}).problem
    config = msgspec.structs.replace(config, problem=measured)
    one = read_run(run(config, tmp_path / "one"))
    killer = Killer("ServerActor", tmp_path / "other", 50)
    other = read_run(run(config, tmp_path / "other", progress=killer))
    assert killer.killed
    check_continuous(other)
    check_same(one, other)
    assert one.metrics.index.tolist() == one.loss["update"].tolist()
    assert list(one.metrics) == ["distance", "=first"]


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_interrupted_repeats_are_resumed_to_the_last_bit(tmp_path: Path) -> None:
    config = configure(200, every=1000, workers=1)
    one = read_run(run(config, tmp_path / "one"))

    def interrupt(progress: Progress) -> None:
        if progress.update >= 100:
            raise KeyboardInterrupt

    twice = msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, repeats=2))
    with pytest.raises(KeyboardInterrupt):
        run(twice, tmp_path / "two", progress=interrupt)
    (interrupted,) = read_runs(tmp_path / "two")
    assert interrupted.state == "interrupted"
    done = len(interrupted.trace)
    assert 100 <= done < 200
    main(["run", "--resume", str(tmp_path / "two"), "--quiet"])
    other, anew = read_runs(tmp_path / "two")
    check_continuous(other)
    check_same(one, other)
    (event,) = restored(other)
    assert (event["from_version"], event["updates_lost"]) == (done, 0)
    check_continuous(anew)
    assert not restored(anew)
    for path in (tmp_path / "two", other.path):
        with pytest.raises(InputError, match="finished"):
            resume(path)


REPEATS = """
import contextlib, json, sys
import ray
from analysis.prediction.predict import predict
from asgd.__main__ import main
from asgd.console.live import LiveRun
from cluster import resume

seen = []

def look(live, progress=None):
    (node,) = ray.nodes()
    seen.append([node["MetricsExportPort"], int(node["Resources"]["object_store_memory"])])
    if len(seen) == 1:
        raise KeyboardInterrupt

LiveRun.__call__ = look
config, out = sys.argv[1:]
with contextlib.suppress(SystemExit):
    main(["run", config, "--out", out, "--quiet"])
resume(out, progress=look)
print(json.dumps(seen), file=sys.stderr)
"""


@pytest.mark.slow
def test_repeats_share_a_ray_with_the_configured_port_and_enough_memory(tmp_path: Path) -> None:
    """The command line starts the repeats, and Python resumes them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tables = msgspec.to_builtins(configure(30, workers=1))
    tables["problem"] = {"kind": "softmax"}  # of dimension 650
    tables["run"]["repeats"] = 2
    tables["metrics"] |= {"prometheus": True, "port": port}
    (tmp_path / "c.json").write_text(json.dumps(tables), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", REPEATS, tmp_path / "c.json", tmp_path / "two"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    assert [one.state for one in read_runs(tmp_path / "two")] == ["finished", "finished"]
    seen = json.loads(done.stderr.splitlines()[-1])
    assert len(seen) >= 3
    room = 100_000_000 + 4 * (1 + 8) * 8 * 650
    assert seen == [[port, room]] * len(seen)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Provide a separate file system of 16 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.usefixtures("shared_ray")
def test_run_on_a_full_disk_is_readable_and_resumed(small_disk: Path) -> None:
    ballast = small_disk / "ballast"

    def fill(progress: Progress) -> None:
        if progress.update >= 50 and not ballast.exists():
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    config = configure(300, workers=2)
    with pytest.raises(RunFailedError, match="No space left on device"):
        run(config, small_disk / "run", progress=fill)
    failed = read_run(small_disk / "run")
    assert failed.state != "finished"
    assert len(failed.trace) < 300
    ballast.unlink()
    resume(small_disk / "run")
    result = read_run(small_disk / "run")
    check_continuous(result)
    check_gradients(result)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("name", ["", "run"])
def test_run_on_a_disk_that_disappears_is_resumed_when_it_is_back(
    small_disk: Path, tmp_path: Path, name: str
) -> None:
    """While the disk is away, nothing is written into its mount point."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    mount = ["mount", "--bind", str(small_disk), str(mounted)]
    umount = ["umount", "--lazy", str(mounted)]
    subprocess.run(mount, check=True)

    def take_away(progress: Progress) -> None:
        if progress.update >= 50 and mounted.is_mount():
            subprocess.run(umount, check=True)

    message = f"{mounted / name}: was removed, moved or unmounted during the run"
    with pytest.raises(RunFailedError, match=f"^{re.escape(message)}$"):
        run(configure(300, workers=2), mounted / name, progress=take_away)
    assert not list(mounted.iterdir())
    subprocess.run(mount, check=True)
    try:
        resume(mounted / name)
    finally:
        subprocess.run(umount, check=True)
    result = read_run(small_disk / name)
    check_continuous(result)
    check_gradients(result)


SCRIPT = """
import json, sys
from asgd.config.make import make_config
from cluster import run
from asgd.rundir.checkpoint import paths
from pathlib import Path

def show(progress):
    if len(paths(Path(sys.argv[1], "checkpoints"))) == 2:
        print(progress.update, flush=True)

run(make_config(json.loads(sys.argv[2])), sys.argv[1], progress=show)
"""


@pytest.fixture
def machine() -> Iterator[Callable[[Path, RunConfig], int]]:
    """Return a function that starts a run, kills all its processes, and returns its update."""
    tmp = tempfile.TemporaryDirectory(prefix="a-", dir="/tmp", ignore_cleanup_errors=True)

    def crash(out: Path, config: RunConfig) -> int:
        child = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(out), config.to_json()],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": tmp.name},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert child.stdout is not None
        reached = int(child.stdout.readline())
        # At one instant, as in a power cut, so that no process sees another die.
        machine = {child.pid, *below(child.pid), *processes_in(tmp.name)}
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in machine:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        child.communicate()
        while left := processes_in(tmp.name):  # started while the others were killed
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return reached

    yield crash
    tmp.cleanup()


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_run_of_a_dead_machine_is_resumed_even_with_a_damaged_checkpoint(
    tmp_path: Path, machine: Callable[[Path, RunConfig], int]
) -> None:
    config = configure(200, every=10, mean=0.02, workers=1)
    reached = machine(tmp_path / "run", config)
    assert read_run(tmp_path / "run").state == "unfinished"
    newest = paths(tmp_path / "run" / CHECKPOINTS)[0]
    data = bytearray(newest.read_bytes())
    data[-1] ^= 128
    newest.write_bytes(data)
    result = read_run(resume(tmp_path / "run"))
    check_continuous(result)
    assert sum(event["event"] == "checkpoint_damaged" for event in result.events) == 1
    (event,) = restored(result)
    assert event["updates_lost"] == 0
    assert event["to_version"] >= reached
    check_same(read_run(run(config, tmp_path / "undisturbed")), result)


@pytest.mark.usefixtures("shared_ray")
def test_an_active_run_is_not_resumed(tmp_path: Path) -> None:
    refused: list[str] = []

    def also_resume(progress: Progress) -> None:
        if not refused:
            with pytest.raises(InputError) as raised:
                resume(tmp_path / "run")
            refused.append(str(raised.value))

    run(configure(60, workers=1), tmp_path / "run", progress=also_resume)
    assert "still running" in refused[0]
    assert not restored(read_run(tmp_path / "run"))


@pytest.mark.usefixtures("shared_ray")
def test_messages_of_ray_about_a_lost_worker_are_logged_and_not_printed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "cluster.local_ray.session")
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if "died or was killed" in caplog.text:
            raise KeyboardInterrupt
        if progress.update and not killed:
            killed.append(min(actor_processes("WorkerActor")))
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(KeyboardInterrupt):
        run(configure(10**6, workers=2), tmp_path / "run", progress=kill)
    assert f"Worker PID: {killed[0]} " in caplog.text
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_server_that_always_dies_ends_the_run(tmp_path: Path) -> None:
    config = configure(10**6, every=10**5, workers=1)

    def kill(progress: Progress) -> None:
        for pid in actor_processes("ServerActor"):
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(RunFailedError, match=r"died 6 times .*; last cause: its process died"):
        run(config, tmp_path / "run", progress=kill)
    found = read_run(tmp_path / "run")
    assert found.state == "failed"
    assert "; last cause: its process died: killed (" in str(found.failure)


def test_simulation_is_not_resumed(tmp_path: Path) -> None:
    path = simulate(configure(20), tmp_path / "simulated")
    with pytest.raises(InputError, match="only real runs can be resumed"):
        resume(path)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_finished_run_continues_with_changed_settings_as_if_scheduled(tmp_path: Path) -> None:
    """With one worker, it equals the run with a schedule of rates and batches to the last bit."""
    path = run(configure(200, workers=1), tmp_path / "run")
    with pytest.raises(InputError, match=r"finished; --set run.updates=N asks"):
        resume(path)
    changes = ["run.updates=400", "optimizer.learning_rate=0.002", "optimizer.batch_size=8"]
    changed = read_run(resume(path, changes=changes))
    check_continuous(changed)
    scheduled = configure(400, workers=1)
    optimizer = msgspec.to_builtins(scheduled.optimizer) | {
        "learning_rate_schedule": {"at": [200], "values": [0.002]},
        "batch_schedule": {"at": [200], "values": [8]},
    }
    scheduled = make_config(msgspec.to_builtins(scheduled) | {"optimizer": optimizer})
    assert changed.config == scheduled
    check_same(changed, read_run(run(scheduled, tmp_path / "scheduled")))
    (event,) = [event for event in changed.events if event["event"] == "settings_changed"]
    assert event["update"] == 200
    assert event["changes"] == {
        "run.updates": [200, 400],
        "optimizer.learning_rate": [0.01, 0.002],
        "optimizer.batch_size": [4, 8],
    }
    assert not verify(changed, replayed=True).findings
    predict(changed, models=["replay"], paths=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["cluster.workers=8"], "cluster.workers=8: expected one of"),
        (["run.updates=99"], "run.updates = 99: expected at least 100, already made"),
        (["optimizer.learning_rate=-1"], "optimizer.learning_rate = -1: expected"),
        (["updates=200"], "expected table.key=value"),
    ],
)
def test_settings_that_cannot_change_are_refused_and_nothing_is_written(
    tmp_path: Path, changes: list[str], message: str
) -> None:
    path = simulate(configure(100), tmp_path / "run")
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    with pytest.raises(InputError, match=message):
        change_settings(path, changes, 100)
    assert before == {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def test_a_second_change_keeps_the_first(tmp_path: Path) -> None:
    path = simulate(configure(100), tmp_path / "run")
    change_settings(path, ["optimizer.learning_rate=0.5", "run.updates=200"], 100)
    change_settings(path, ["optimizer.learning_rate=0.25"], 120)
    config = change_settings(path, ["optimizer.learning_rate=0.125", "run.updates=300"], 120)
    schedule = config.optimizer.learning_rate_schedule
    assert (config.optimizer.learning_rate, schedule.at, schedule.values) == (
        0.01,
        [100, 120],
        [0.5, 0.125],
    )
    assert read_run(path).config == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "{run}"], "only real runs can be resumed"),
        (["--resume", "{run}/nowhere"], "not a run directory"),
        (["some.toml", "--resume", "{run}"], "expected no CONFIG"),
        ([], "Missing argument 'CONFIG'"),
    ],
)
def test_the_command_refuses_unusable_arguments_of_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    path = simulate(configure(20), tmp_path / "simulated")
    with pytest.raises(SystemExit) as exit_:
        main(["run", *(argument.format(run=path) for argument in arguments)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
