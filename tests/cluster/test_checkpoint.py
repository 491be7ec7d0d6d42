"""Checkpoints, restarts from them, and the lease: exact, even if files are torn or damaged."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from asgd.config.tables import LeaseKind, MetricsConfig
from asgd.errors import InputError, RunFailedError
from asgd.rundir import claims
from asgd.rundir.checkpoint import CHECKPOINTS, DamagedCheckpointError, paths
from asgd.rundir.claims import LeaseLostError
from asgd.rundir.reader import read_run
from cluster.actors import RecorderActor
from cluster.core.state import State
from cluster.metrics import Metrics
from cluster.storage.checkpoint import load, pack, save, unpack
from cluster.storage.lease import Lease, only_launcher
from cluster.storage.recorder import Recorder
from cluster.storage.recovery import start_server
from cluster.storage.write_ahead import WriteAheadLog, remove_log
from tests.support.faults import Crowd, replay_run
from tests.support.invariants import check_gradients
from tests.support.machine import EXACT, Machine, configure, contents, work


@pytest.fixture
def state() -> State:
    crowd = Crowd(configure(workers=3, updates=500, schedule="uniform"))
    crowd.join_all()
    work(crowd, 37)
    return crowd.server.state()


def same(one: State, other: State) -> bool:
    return pack(one) == pack(other)


def test_saved_state_is_read_back_to_the_last_bit(tmp_path: Path, state: State) -> None:
    read = load(save(tmp_path, state))
    assert read.counts == state.counts
    np.testing.assert_array_equal(read.parameters, state.parameters)
    assert len(read.rule) == 1
    np.testing.assert_array_equal(read.rule[0], state.rule[0])
    assert len(list(tmp_path.iterdir())) == 1


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_flipped_bit_and_every_torn_file_is_noticed(data: st.DataObject) -> None:
    crowd = Crowd(configure())
    crowd.join_all()
    content = pack(crowd.server.state())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DamagedCheckpointError):
        unpack(bytes(flipped))
    with pytest.raises(DamagedCheckpointError):
        unpack(content[: data.draw(st.integers(0, len(content) - 1))])


def test_objects_are_never_unpickled(state: State) -> None:
    poisoned = State(state.counts, np.array([{"a": 1}], dtype=object), ())
    with pytest.raises(ValueError, match="allow_pickle"):
        pack(poisoned)


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    crowd = Crowd(configure(updates=100))
    crowd.join_all()
    for updates in (0, 20, 40, 60):
        work(crowd, updates)
        save(tmp_path, crowd.server.state())
    assert [load(path).version for path in paths(tmp_path)] == [60, 40]


def test_a_copy_by_hand_is_no_checkpoint(tmp_path: Path, state: State) -> None:
    path = save(tmp_path, state)
    (tmp_path / "checkpoint-backup.bin").write_bytes(path.read_bytes())
    assert paths(tmp_path) == [path]


def test_a_full_disk_does_not_lose_older_checkpoints(tmp_path: Path, state: State) -> None:
    resource = pytest.importorskip("resource")
    kept = save(tmp_path, state)
    before = kept.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            save(tmp_path, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert kept.read_bytes() == before


def test_a_disk_that_changes_a_checkpoint_is_noticed_before_older_ones_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path / "run", configure(updates=100))
    machine.work(25)
    machine.work(45)
    kept = paths(machine.path / CHECKPOINTS)

    def fsync(descriptor: int) -> None:
        """Flip one bit of a checkpoint when it is flushed."""
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name.startswith("checkpoint-"):
            flip(path)

    monkeypatch.setattr(os, "fsync", fsync)
    machine.work(65)
    (event,) = machine.events("checkpoint_damaged")
    assert "reads differently from what was written" in event["reason"]
    assert paths(machine.path / CHECKPOINTS) == kept
    assert [load(path).version for path in kept] == [40, 20]


def test_one_worker_resumed_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    through = Machine(tmp_path / "through", configure())
    through.work(60)
    broken = Machine(tmp_path / "broken", configure())
    for reached in (33, 47, 58):
        broken.work(reached)
        broken.restart()
        assert broken.crowd.server.version == reached // 20 * 20
    broken.work(60)
    assert broken.crowd.stopped == {0: "finished"}
    one, other = read_run(through.path), read_run(broken.path)
    for column in EXACT:
        np.testing.assert_array_equal(one.trace[column], other.trace[column])
    np.testing.assert_array_equal(one.loss["update"], [0, 10, 20, 30, 40, 50, 60])
    np.testing.assert_array_equal(one.loss["update"], other.loss["update"])
    np.testing.assert_array_equal(one.loss["loss"], other.loss["loss"])
    np.testing.assert_array_equal(through.crowd.server.parameters, broken.crowd.server.parameters)
    assert (other.trace["applied_seconds"].diff().dropna() >= 0).all()
    assert [e["updates_lost"] for e in broken.events("server_restored")] == [13, 7, 18]


@pytest.mark.parametrize(
    "cluster", [{}, {"schedule": "uniform"}, {"mode": "sync"}, {"mode": "bounded"}]
)
def test_no_update_is_missing_or_made_twice(tmp_path: Path, cluster: dict[str, Any]) -> None:
    config = configure(workers=3, updates=200, **cluster)
    machine = Machine(tmp_path / "run", config)
    for reached in (31, 45, 97, 199):
        work(machine.crowd, reached, seed=reached)
        machine.crowd.die(reached % 3)
        machine.record()
        machine.restart()
    machine.work(200)
    run = read_run(machine.path)
    assert len(run.trace) == 200
    check_gradients(run)
    np.testing.assert_array_equal(replay_run(run)[-1], machine.crowd.server.parameters)


@pytest.mark.parametrize("durability", ["log", "checkpoint"])
def test_a_drawn_order_continues_after_a_restart(tmp_path: Path, durability: str) -> None:
    config = configure(4, 200, durability, schedule="uniform")
    through, broken = Machine(tmp_path / "a", config), Machine(tmp_path / "b", config)
    through.work(200)
    broken.work(130)
    broken.restart()
    broken.work(200)
    np.testing.assert_array_equal(
        read_run(through.path).trace["worker"], read_run(broken.path).trace["worker"]
    )


def test_a_checkpoint_made_from_the_log_has_the_order_of_its_update(tmp_path: Path) -> None:
    """Otherwise, a server restored from it would draw the same worker twice."""
    machine = Machine(tmp_path / "run", configure(3, 160, "log", schedule="uniform"))
    machine.work(25)
    work(machine.crowd, 45, seed=1)
    before = machine.crowd.server.ledger.checkpoint
    machine.restart()
    after = machine.crowd.server.ledger.checkpoint
    assert before is not None
    assert after is not None
    assert before.version == after.version == 40
    assert before.counts.order == after.counts.order


def test_a_gradient_for_the_previous_server_is_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure(workers=2, updates=200))
    machine.work(45)
    late = machine.crowd.workers[0].compute(machine.crowd.at_hand[0])
    machine.restart()
    assert late.read_version > machine.crowd.server.version  # its staleness would be negative
    machine.crowd.send(late)
    assert machine.crowd.server.version == 40
    assert machine.crowd.at_hand[0].epoch == 1


def test_stopped_run_loses_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure(workers=2, updates=200))
    machine.work(33)
    machine.crowd.server.stop("interrupted")
    machine.recorder.record(machine.crowd.server.drain())
    machine.restart()
    (event,) = machine.events("server_restored")
    assert (event["from_version"], event["to_version"], event["updates_lost"]) == (33, 33, 0)


def test_a_restored_server_of_a_finished_run_stops(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure())
    machine.work(60)
    machine.restart()
    assert machine.crowd.stopped == {0: "finished"}
    assert machine.crowd.server.version == 60


def test_run_that_never_saved_anything_starts_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure())
    work(machine.crowd, 15)
    machine.writer.trace(machine.crowd.server.drain().trace)  # killed in the middle of a record
    machine.restart()
    assert machine.crowd.server.version == 0
    machine.work(60)
    run = read_run(machine.path)
    np.testing.assert_array_equal(run.trace["update"], np.arange(60))
    assert run.loss["update"].tolist() == [0, 10, 20, 30, 40, 50, 60]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_checkpoint_is_reported_and_the_older_one_used(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure())
    machine.work(25)
    machine.work(45)
    newest, older = paths(machine.path / CHECKPOINTS)
    flip(newest)
    machine.restart()
    assert machine.crowd.server.version == 20
    (event,) = machine.events("checkpoint_damaged")
    assert event["file"] == newest.name
    assert "checksum" in event["reason"]
    assert paths(machine.path / CHECKPOINTS) == [older]
    assert machine.events("server_restored")[0]["updates_lost"] == 25


def test_without_a_good_checkpoint_the_record_is_kept(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure())
    machine.work(25)
    machine.work(45)
    for path in paths(machine.path / CHECKPOINTS):
        flip(path)
    with pytest.raises(RunFailedError, match="none of its 2 checkpoints"):
        machine.restart()
    assert len(read_run(machine.path).trace) == 45
    assert len(paths(machine.path / CHECKPOINTS)) == 2


@pytest.mark.parametrize(("durability", "reached"), [("log", 13), ("checkpoint", 0)])
def test_damaged_first_checkpoint_begins_the_run_again(
    tmp_path: Path, durability: str, reached: int
) -> None:
    machine = Machine(tmp_path / "run", configure(durability=durability))
    machine.work(13)
    flip(paths(machine.path / CHECKPOINTS)[0])
    machine.restart()
    assert machine.crowd.server.version == reached
    machine.work(60)
    run = read_run(machine.path)
    check_gradients(run)
    assert len(run.trace) == 60
    assert run.loss["update"].tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert [e["updates_lost"] for e in machine.events("server_restored")] == [13 - reached]


def test_checkpoint_beyond_the_trace_is_not_used(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure())
    machine.work(25)
    machine.work(45)
    (machine.path / "trace" / "part-000000000025.parquet").write_bytes(b"PAR1 torn")
    machine.restart()
    assert machine.crowd.server.version == 20
    assert "ends at update 25" in machine.events("checkpoint_damaged")[0]["reason"]
    machine.work(60)
    np.testing.assert_array_equal(read_run(machine.path).trace["update"], np.arange(60))


def test_damaged_losses_do_not_end_the_run(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure())
    machine.work(25)
    (machine.path / "loss.parquet" / "part-000000000000.parquet").write_bytes(b"PAR1 torn")
    machine.restart()
    machine.work(60)
    run = read_run(machine.path)
    assert run.loss["update"].tolist() == [30, 40, 50, 60]
    assert len(machine.events("loss_damaged")) == 1
    np.testing.assert_array_equal(run.trace["update"], np.arange(60))


def test_checkpoint_beyond_damaged_members_is_not_used(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure(workers=2, mode="sync"))
    machine.work(25)
    machine.work(45)
    (machine.path / "members" / "part-000000000025.parquet").write_bytes(b"PAR1 torn")
    machine.restart()
    assert machine.crowd.server.version == 20
    machine.work(60)
    run = read_run(machine.path)
    check_gradients(run)
    assert run.members["update"].nunique() == 60


def test_an_interrupted_restore_has_recorded_the_lost_updates(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure())
    machine.work(25)
    (machine.path / "trace" / ".part-000000000000.parquet.tmp").mkdir()  # the cut cannot write
    with pytest.raises(OSError, match="directory"):
        machine.restart()
    (event,) = machine.events("server_restored")
    assert (event["from_version"], event["to_version"], event["updates_lost"]) == (25, 20, 5)


def test_torn_event_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure())
    machine.work(25)
    with (machine.path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "worker_lost"})[:9])
    (machine.path / "trace" / ".part-000000000025.parquet.tmp").write_bytes(b"torn")
    machine.restart()
    assert [event["event"] for event in read_run(machine.path).events] == [
        "start",
        "server_restored",
    ]
    assert read_run(machine.path).state == "unfinished"
    assert not list(machine.path.rglob("*.tmp"))


def test_record_after_a_lost_one_is_not_written(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure())
    machine.work(10)
    work(machine.crowd, 30)
    machine.crowd.server.drain()
    machine.work(45)
    assert len(read_run(machine.path).trace) == 10
    assert [load(path).version for path in paths(machine.path / CHECKPOINTS)] == [0]


def kept(recorder: Recorder) -> int:
    """Return the pickled size of a recorder without its threads."""
    threads = ("_evaluator", "_hurried", "_writing")
    parts = {name: part for name, part in vars(recorder).items() if name not in threads}
    return len(pickle.dumps(parts))


def test_each_loss_is_written_once_and_not_kept(tmp_path: Path) -> None:
    """Otherwise, a record of a longer run would take more time and memory."""
    machine = Machine(tmp_path / "run", configure(updates=10_000))
    machine.work(2000)
    before = contents(machine.path / "loss.parquet")
    size = kept(machine.recorder)
    machine.work(6000)
    after = contents(machine.path / "loss.parquet")
    del before[machine.path / "loss.parquet"]
    assert before.items() <= after.items()
    assert kept(machine.recorder) == pytest.approx(size, abs=200)
    assert machine.recorder.latest_loss[0] == 6000
    np.testing.assert_array_equal(read_run(machine.path).loss["update"], np.arange(0, 6001, 10))


@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.parametrize("lease", ["flock", "file"])
def test_server_that_lost_its_lease_writes_nothing(tmp_path: Path, lease: LeaseKind) -> None:
    """Neither do its recorders, nor a server or a recorder that is started late in its epoch."""
    path, directory = tmp_path / "run", tmp_path / "run" / CHECKPOINTS
    boards = MetricsConfig(tensorboard=True)
    config = structs.replace(configure(3, 400, "log", lease=lease), metrics=boards)
    machine = Machine(path, config)
    crowd = machine.crowd
    umask = os.umask(0)
    os.umask(umask)
    recorder, idle = machine.recorder, RecorderActor(config, str(path), 0, umask)
    remove_log(directory)
    crowd.server.log = WriteAheadLog(directory, 0, 0, 1, 20, segment_bytes=4000, lease=lease)
    work(crowd, 45)
    machine.record()
    work(crowd, 65)
    machine.restart()
    before = contents(path)
    del before[directory]  # claims come and go there

    crowd.die(0)
    work(crowd, 400)
    assert crowd.server.version > 80
    assert "another server has taken over" in str(crowd.stopped)
    record = crowd.server.drain()
    assert all(map(len, (record.trace["update"], record.evaluations, record.events)))
    assert record.checkpoint is not None
    assert start_server(config, crowd.initial, path, 0, None).stopping
    with pytest.raises(LeaseLostError, match="another server has taken over"):
        recorder.record(record)
    for actor in (idle, RecorderActor(config, str(path), 0, umask)):
        actor.record(replace(record, number=0))
        assert "another server has taken over" in str(actor.latest().error)
    crowd.server.log.close()
    del idle, actor
    gc.collect()  # closes files, which writes their buffers
    after = contents(path)
    del after[directory]
    assert after == before

    machine.work(400)
    check_gradients(read_run(path))
    np.testing.assert_array_equal(replay_run(read_run(path))[-1], machine.crowd.server.parameters)


CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.link", "os.symlink")


class Watch:
    """Records all changes in a run directory, and those made while no process holds its lease."""

    def __init__(self, path: Path, kind: LeaseKind) -> None:
        self.seen: list[str] = []
        self.unlocked: list[str] = []
        self.on = True
        self._path = path
        self._lease = path / CHECKPOINTS / "lease"
        self._kind = kind
        sys.addaudithook(self._hear)

    def note(self, what: str) -> None:
        self.seen.append(what)
        if self._kind == "file":
            if not [*self._lease.parent.glob("lease-*")]:
                self.unlocked.append(what)
            return
        with self._lease.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
        self.unlocked.append(what)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or event not in CHANGES or isinstance(arguments[0], int):
            return
        file = Path(os.fsdecode(arguments[0]))
        writes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)
        own = file.name.startswith(("lease", ".lease"))
        if writes and file.is_relative_to(self._path) and not own:
            self.note(f"{event} {file.relative_to(self._path)}")

    def show(self, *_: object) -> None:
        """Stand in for a metrics board, which writes when it is called."""
        self.note("board")


@pytest.mark.parametrize("lease", ["flock", "file"])
def test_everything_is_written_under_the_lease(tmp_path: Path, lease: LeaseKind) -> None:
    path = tmp_path / "run"
    tables = {"mode": "bounded", "max_staleness": 1, "lease": lease}
    machine = Machine(path, configure(3, 200, "log", **tables))
    machine.restart()
    watch = Watch(path, lease)
    machine.recorder = Recorder(path, machine.crowd.problem, 1, Metrics([watch]))
    for reached in range(20, 201, 20):
        log = WriteAheadLog(path / CHECKPOINTS, 1, reached, 1, 20, lease=lease)
        log.close()
        machine.crowd.die(0)
        machine.crowd.join(0)
        machine.work(reached)
    watch.on = False
    assert not watch.unlocked
    assert {re.sub("[0-9]+", "N", what) for what in watch.seen if "os." not in what} == {
        "board",
        "open checkpoints/checkpoint-N.bin.tmp",
        "open checkpoints/log-N-N.bin",
        "open events.jsonl",
        "open loss.parquet/.part-N.parquet.tmp",
        "open members/.part-N.parquet.tmp",
        "open trace/.part-N.parquet.tmp",
    }


@pytest.mark.parametrize("kind", ["flock", "file"])
def test_epochs_grow(tmp_path: Path, kind: LeaseKind) -> None:
    lease = Lease(tmp_path, kind)
    assert [lease.take() for _ in range(12)] == list(range(12))
    with lease.held(11):
        pass
    with pytest.raises(LeaseLostError), lease.held(10):
        pass


def test_the_lease_works_over_nfs_and_is_on_disk_once_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, synced = fcntl.flock, []

    def flock(file: IO[str], operation: int) -> None:
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if operation & fcntl.LOCK_EX and mode == os.O_RDONLY:  # as NFS clients do
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        lock(file, operation)

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append(path.name if path.is_dir() else path.read_text())

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(os, "fsync", fsync)
    lease = Lease(tmp_path / "run")
    with lease.held(lease.take()):
        assert synced == ["000000000000\n", "run"]


WRITES = """
import sys
from pathlib import Path
from cluster.storage.lease import Lease

with Lease(Path(sys.argv[1]), sys.argv[2]).held(0):
    print(flush=True)
    sys.stdin.readline()
    Path(sys.argv[1], "written").touch()
"""


@pytest.mark.parametrize("kind", ["flock", "file"])
@pytest.mark.parametrize("killed", [False, True])
def test_the_lease_is_taken_when_its_writer_is_done_or_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: LeaseKind, killed: bool
) -> None:
    monkeypatch.setattr(claims, "SILENT_SECONDS", 600.0)  # a death is known at once
    lease = Lease(tmp_path, kind)
    assert lease.take() == 0
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path), kind], **pipes) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdout.readline()
        with ThreadPoolExecutor(1) as thread:
            taken = thread.submit(lease.take)
            with pytest.raises(TimeoutError):
                taken.result(0.2)
            if killed:
                writer.kill()
            else:
                writer.stdin.write(b"\n")
                writer.stdin.flush()
            assert taken.result(60) == 1
            assert (tmp_path / "written").exists() is not killed
    with pytest.raises(LeaseLostError), lease.held(0):
        pass
    assert not [*tmp_path.glob("lease-*")]


@pytest.mark.parametrize("kind", ["flock", "file"])
def test_one_launcher_at_a_time(tmp_path: Path, kind: LeaseKind) -> None:
    directory = tmp_path / CHECKPOINTS
    with (
        only_launcher(directory, kind),
        pytest.raises(InputError, match=rf"still running \(process {os.getpid()}"),
        only_launcher(directory, kind),
    ):
        pass
    with only_launcher(directory, kind):
        pass


FIRST_RECORD = """
import sys
from pathlib import Path

import numpy as np

from asgd.config.make import make_config
from asgd.problems.make import make_problem
from asgd.rundir.writer import RunWriter
from asgd.rundir.checkpoint import CHECKPOINTS
from cluster.storage.lease import Lease
from cluster.core.messages import Gradient
from cluster.storage.recorder import Recorder
from cluster.core.server import ParameterServer

path, config = Path(sys.argv[1]), make_config({"cluster": {"workers": 1}})
RunWriter.create(path, config)
problem = make_problem(config)
recorder = Recorder(path, problem, Lease(path / CHECKPOINTS).take())
server = ParameterServer(config, np.ones(problem.dim))
server.join(0, 0.0)
server.receive(Gradient(0, 0, 0, 0, np.ones(problem.dim), 0.0), 1.0)
before = set(sys.modules)
recorder.record(server.drain())
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""


def test_first_record_does_not_import_pandas(tmp_path: Path) -> None:
    """The import would occupy a core for a third of a run of one second."""
    command = [sys.executable, "-c", FIRST_RECORD, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pandas" not in done.stdout
