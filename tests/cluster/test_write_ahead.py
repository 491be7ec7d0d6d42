"""The write-ahead log keeps every update, and ignores torn, flipped, repeated or late bytes."""

from __future__ import annotations

import resource
import struct
import threading
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd.config.make import make_config
from asgd.rundir.checkpoint import CHECKPOINTS
from asgd.rundir.reader import read_run
from cluster.core.messages import Gradient
from cluster.core.state import OrderState
from cluster.core.update import Entry, Incident, Update
from cluster.storage.lease import Lease
from cluster.storage.write_ahead import WriteAheadLog, cut_log, is_logged, read_log, segments
from tests.support.faults import replay_run
from tests.support.invariants import check_gradients
from tests.support.lines import answer
from tests.support.machine import Machine, configure, contents, work

DIMENSION = 3


def update(number: int) -> Update:
    random = np.random.default_rng(number)
    row = (number, number % 4, number // 4, number, 0, 8, 0.25, 0.5 * number, 1.5)
    members = tuple((number, w, number, number, 2, 0.125) for w in range(number % 3))
    order = OrderState([1, 2, 3, number], 1, 7, None) if number % 2 else None
    discarded = tuple((number, w, 7, number - 3, 3, 2, 0.125, 0.25) for w in range(number % 4))
    positions = tuple(range(number, number + max(len(members), 1))) if number % 5 > 1 else ()
    return Update(row, members, random.normal(size=DIMENSION), order, discarded, positions)


def incident(sequence: int) -> Incident:
    return Incident({"event": "gradient_lost", "time": 1.5, "worker": 1, "sequence": sequence})


def same(one: Entry, other: Entry) -> bool:
    if isinstance(one, Incident) or isinstance(other, Incident):
        return (
            isinstance(one, Incident) and isinstance(other, Incident) and one.event == other.event
        )
    fields = all(
        getattr(one, name) == getattr(other, name)
        for name in ("row", "members", "order", "discarded", "positions")
    )
    return fields and one.gradient.tobytes() == other.gradient.tobytes()


def begin(directory: Path, version: int = 0, segment_bytes: int = 4000) -> WriteAheadLog:
    """Return the log of a new server."""
    epoch = Lease(directory).take()
    return WriteAheadLog(directory, epoch, version, DIMENSION, 10, segment_bytes)


def write(directory: Path, start: int, end: int, segment_bytes: int = 4000) -> list[Entry]:
    """Log updates and, before every fifth, an incident; return what was logged."""
    log = begin(directory, start, segment_bytes)
    entries: list[Entry] = []
    for number in range(start, end):
        if number % 5 == 0:
            entries.append(incident(number))
        entries.append(update(number))
    for entry in entries:
        log.append(entry)
    log.close()
    return entries


def check_read(found: list[Entry], expected: list[Entry]) -> None:
    assert len(found) == len(expected)
    assert all(same(*pair) for pair in zip(found, expected, strict=True))


def index_of(entries: list[Entry], number: int) -> int:
    """Return the index of an update, given its number."""
    return [isinstance(e, Update) and e.row[0] == number for e in entries].index(True)


def test_entries_are_read_back_to_the_last_bit_across_segments(tmp_path: Path) -> None:
    entries = write(tmp_path, 0, 200)
    assert len(segments(tmp_path)) > 3
    assert all(segment.version % 10 == 0 for segment in segments(tmp_path))
    check_read(list(read_log(tmp_path, 0)), entries)
    check_read(list(read_log(tmp_path, 0, 100)), entries[: entries.index(entries[120])])
    check_read(list(read_log(tmp_path, 73)), entries[index_of(entries, 73) :])
    assert not list(read_log(tmp_path, 200))


def test_segments_before_a_version_are_removed(tmp_path: Path) -> None:
    entries = write(tmp_path, 0, 200)
    before = segments(tmp_path)
    start = before[2].version
    cut_log(tmp_path, start - 1)
    assert segments(tmp_path) == before[1:]
    cut_log(tmp_path, start)
    assert segments(tmp_path) == before[2:]
    check_read(list(read_log(tmp_path, start)), entries[index_of(entries, start) :])
    cut_log(tmp_path, 10**6)
    assert segments(tmp_path) == before[-1:]


def test_an_incident_after_the_last_update_is_ignored(tmp_path: Path) -> None:
    log = begin(tmp_path)
    for entry in (update(0), incident(3), update(1), incident(5)):
        log.append(entry)
    check_read(list(read_log(tmp_path, 0)), [update(0), incident(3), update(1)])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_torn_or_flipped_log_is_read_up_to_the_damage(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("log")
    entries = write(directory, 0, 20, segment_bytes=10**5)
    (segment,) = segments(directory)
    content = bytearray(segment.path.read_bytes().rstrip(b"\0"))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
    segment.path.write_bytes(content)
    found = list(read_log(directory, 0))
    assert len(found) < len(entries)
    check_read(found, entries[: len(found)])


@pytest.mark.parametrize("dimension", [0, 1, 2, DIMENSION - 1, DIMENSION + 1, 10**6])
def test_a_log_with_another_dimension_is_ignored(tmp_path: Path, dimension: int) -> None:
    """A run directory is not trusted, and three float64 have as many bytes as six float32."""
    log = begin(tmp_path)
    log.append(update(0))
    log.close()
    (segment,) = segments(tmp_path)
    content = bytearray(segment.path.read_bytes())
    head = content[:27] + struct.pack("<I", dimension)
    content[:35] = head + struct.pack("<I", zlib.crc32(head))
    segment.path.write_bytes(content)
    (segment,) = segments(tmp_path)
    assert segment.dimension == dimension
    assert not list(read_log(tmp_path, 0))


def test_repeated_tail_is_not_read_twice(tmp_path: Path) -> None:
    entries = write(tmp_path, 0, 20, segment_bytes=10**5)
    path = segments(tmp_path)[0].path
    content = path.read_bytes().rstrip(b"\0")
    for length in (1, 50, 300, 2000):
        path.write_bytes(content + content[-length:])
        check_read(list(read_log(tmp_path, 0)), entries)


def test_later_entries_of_a_replaced_server_are_ignored(tmp_path: Path) -> None:
    first = write(tmp_path, 0, 57)
    second = write(tmp_path, 33, 90)
    kept = [e for e in first if not isinstance(e, Incident) and e.row[0] < 33]
    found = [e for e in read_log(tmp_path, 0) if not isinstance(e, Incident)]
    check_read(found, [*kept, *(e for e in second if not isinstance(e, Incident))])


def test_replaced_server_begins_no_segment(tmp_path: Path) -> None:
    log = begin(tmp_path, segment_bytes=6000)
    Lease(tmp_path).take()
    before = contents(tmp_path)
    for number in range(30):
        log.append(update(number))
    for _ in range(2):
        with pytest.raises(OSError, match="another server has taken over"):
            log.append(update(30))
    log.close()
    assert contents(tmp_path) == before


def test_a_server_that_is_replaced_while_it_writes_stops(tmp_path: Path) -> None:
    """It is replaced at any point: between updates, during one, or while it makes a segment."""

    def write_on(log: WriteAheadLog) -> None:
        with suppress(PermissionError):
            for number in range(10**5):
                log.append(update(number))

    log = begin(tmp_path)
    for _ in range(10):
        server = threading.Thread(target=write_on, args=[log])
        server.start()
        log = begin(tmp_path)
        before = contents(tmp_path)
        server.join()
        assert contents(tmp_path) == before


def test_gap_ends_the_log(tmp_path: Path) -> None:
    entries = write(tmp_path, 0, 200)
    before = segments(tmp_path)
    before[2].path.unlink()
    gap = before[2].version
    check_read(list(read_log(tmp_path, 0)), entries[: index_of(entries, gap - 1) + 1])
    assert not list(read_log(tmp_path, gap))
    assert list(read_log(tmp_path, before[3].version))


@pytest.mark.parametrize(
    ("durability", "dimension", "logged"),
    [
        ("auto", 1000, True),
        ("auto", 1001, False),
        ("log", 10**6, True),
        ("checkpoint", 1, False),
    ],
)
def test_durability_chooses_by_dimension(durability: str, dimension: int, logged: bool) -> None:
    config = make_config({"run": {"durability": durability}})
    assert is_logged(config, dimension) == logged


MODES: list[dict[str, Any]] = [{}, {"schedule": "uniform"}, {"mode": "sync"}, {"mode": "bounded"}]


@pytest.mark.parametrize("cluster", MODES)
@pytest.mark.parametrize("recorded", [True, False])
def test_killed_server_loses_no_update(
    tmp_path: Path, cluster: dict[str, Any], recorded: bool
) -> None:
    machine = Machine(tmp_path / "run", configure(3, 200, "log", **cluster))
    for reached in (13, 31, 45, 97, 199):
        work(machine.crowd, reached, seed=reached)
        machine.crowd.die(reached % 3)
        if recorded:
            machine.record()
        before = machine.crowd.server
        version = before.version
        machine.restart()
        after = machine.crowd.server
        assert after.version == version
        np.testing.assert_array_equal(after.parameters, before.parameters)
    machine.work(200)
    assert set(machine.crowd.stopped.values()) == {"finished"}
    assert not list((machine.path / CHECKPOINTS).glob("log-*"))
    run = read_run(machine.path)
    assert [e["updates_lost"] for e in machine.events("server_restored")] == [0] * 5
    np.testing.assert_array_equal(run.trace["update"], np.arange(200))
    np.testing.assert_array_equal(run.loss["update"], np.arange(0, 201, 10))
    check_gradients(run)
    points = replay_run(run)
    np.testing.assert_array_equal(points[-1], machine.crowd.server.parameters)
    losses = [machine.crowd.problem.loss(points[update]) for update in run.loss["update"]]
    np.testing.assert_array_equal(run.loss["loss"], losses)


ACTIONS = [*["push"] * 8, "die", "join", "repeat", "record", "restart"]


@settings(max_examples=20, deadline=None)
@given(
    durability=st.sampled_from(["log", "checkpoint"]),
    cluster=st.sampled_from(MODES),
    actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2)), max_size=60),
)
def test_every_gradient_counts_once_despite_faults(
    tmp_path_factory: pytest.TempPathFactory,
    durability: str,
    cluster: dict[str, Any],
    actions: list[tuple[str, int]],
) -> None:
    path = tmp_path_factory.mktemp("machine") / "run"
    machine = Machine(path, configure(3, 40, durability, **cluster))
    sent: list[Gradient] = []
    for action, worker in actions:
        crowd = machine.crowd
        if action == "push" and worker in crowd.at_hand:
            crowd.push(worker)
            sent.append(crowd.sent[worker][-1])
        elif action == "die":
            crowd.die(worker)
        elif action == "join":
            crowd.join(worker)
        elif action == "repeat" and sent:
            crowd.send(sent[-1 - worker % len(sent)])  # for this server or for an earlier one
        elif action == "record":
            machine.record()
        elif action == "restart":
            version = crowd.server.version
            machine.restart()
            assert durability == "checkpoint" or machine.crowd.server.version == version
    machine.crowd.join_all()
    machine.work(40)
    run = read_run(path)
    assert len(run.trace) == 40
    check_gradients(run)
    np.testing.assert_array_equal(replay_run(run)[-1], machine.crowd.server.parameters)


def test_full_disk_stops_the_server_before_it_answers(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure(2, 60, "log"))
    machine.work(25)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    directory = machine.path / CHECKPOINTS
    machine.crowd.server.log = WriteAheadLog(directory, 0, 25, 1, 1000, segment_bytes=1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        work(machine.crowd, 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    version = machine.crowd.server.version
    assert 25 < version < 60
    assert "the log cannot be written (File too large)" in machine.crowd.stopped.values()
    machine.record()
    machine.restart()
    assert machine.crowd.server.version == version
    machine.work(60)
    check_gradients(read_run(machine.path))


def test_disk_that_takes_half_a_record_stops_the_server(tmp_path: Path) -> None:
    """The segment has room, but the write ends early, so the update is not made."""
    machine = Machine(tmp_path / "run", configure(2, 60, "log"))
    work(machine.crowd, 25)
    (segment,) = segments(machine.path / CHECKPOINTS)
    used = len(segment.path.read_bytes().rstrip(b"\0"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (used + 40, limits[1]))
    try:
        work(machine.crowd, 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert machine.crowd.server.version == 25
    (reason,) = set(machine.crowd.stopped.values())
    assert "bytes of the log could be written" in reason
    machine.record()
    machine.restart()
    assert machine.crowd.server.version == 25
    machine.work(60)
    check_gradients(read_run(machine.path))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("durability", ["log", "checkpoint"])
def test_refused_gradients_are_counted_over_restarts(
    tmp_path: Path, durability: str, recorded: bool
) -> None:
    """Otherwise, a run that cannot continue would never end; it ends at the eleventh refusal."""
    machine = Machine(tmp_path / "run", configure(1, 400, durability))
    for refused in range(1, 11):
        crowd = machine.crowd
        snapshot = crowd.at_hand.pop(0)
        crowd.send(answer(snapshot, 0, np.full_like(crowd.initial, np.nan)))
        work(crowd, 20 * refused - 1)
        if durability == "checkpoint":
            work(crowd, 20 * refused)
        if recorded or durability == "checkpoint":
            machine.record()
        assert crowd.server.status(0.0).rejected == refused
        machine.restart()
        assert machine.crowd.server.status(0.0).rejected == refused
    snapshot = machine.crowd.at_hand.pop(0)
    machine.crowd.send(answer(snapshot, 0, np.full_like(machine.crowd.initial, np.nan)))
    assert "11 gradients were refused" in machine.crowd.stopped[0]
