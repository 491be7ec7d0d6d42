"""The run directory: what is written is read back, and torn files do not make it unreadable."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from asgd.config import make_config
from asgd.errors import InputError
from asgd.files import replace_file
from asgd.trace import MEMBER_COLUMNS, TRACE_COLUMNS, RunWriter, read_run


def rows(first: int, count: int) -> dict[str, np.ndarray]:
    update = np.arange(first, first + count)
    return {**{name: np.zeros(count) for name in TRACE_COLUMNS}, "update": update}


@pytest.fixture
def writer(tmp_path: Path) -> RunWriter:
    return RunWriter.create(tmp_path / "run", make_config())


def test_parts_are_joined_in_order_of_update(writer: RunWriter) -> None:
    writer.trace(rows(1000, 500))
    writer.trace(rows(0, 1000))
    writer.trace(rows(1500, 0))
    trace = read_run(writer.path).trace
    assert trace["update"].tolist() == list(range(1500))
    assert {name: trace[name].dtype for name in TRACE_COLUMNS} == TRACE_COLUMNS


def test_a_new_run_is_readable_before_its_first_update(writer: RunWriter) -> None:
    run = read_run(writer.path)
    assert run.trace.empty
    assert run.loss.empty
    assert run.state == "unfinished"
    assert run.config == make_config()
    assert run.environment["cores"] >= 1


def test_state_follows_the_last_event_that_ends_a_run(writer: RunWriter) -> None:
    writer.event("interrupted", update=3)
    assert read_run(writer.path).state == "interrupted"
    writer.event("finish", update=5)
    assert read_run(writer.path).state == "finished"


@pytest.mark.parametrize(
    "name", ["trace", "checkpoints", "environment.json", "trace/part-000000000000.parquet"]
)
def test_a_directory_that_leads_elsewhere_is_refused(
    writer: RunWriter, tmp_path: Path, name: str
) -> None:
    place = writer.path / name
    if place.exists():
        place.rename(tmp_path / "was")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{name}: is neither a file nor a directory"):
        read_run(writer.path)
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(InputError, match=f"{name}: is neither a file nor a directory"):
        read_run(writer.path)


def test_a_link_to_a_run_is_followed(writer: RunWriter, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(writer.path)
    assert read_run(tmp_path / "latest").config == make_config()


def test_a_file_is_not_written_through_a_link_in_the_way(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for link in (tmp_path / "profile.json", tmp_path / ".profile.json.tmp"):
        link.symlink_to(precious)
    replace_file(tmp_path / "profile.json", b"new")
    assert precious.read_text() == "kept"
    assert (tmp_path / "profile.json").read_bytes() == b"new"
    assert not (tmp_path / "profile.json").is_symlink()


def test_a_torn_last_event_is_left_out(writer: RunWriter) -> None:
    with (writer.path / "events.jsonl").open("a") as file:
        file.write('{"event": "fin')
    assert [event["event"] for event in read_run(writer.path).events] == ["start"]


def test_event_after_a_torn_one_is_kept(writer: RunWriter) -> None:
    for torn in (b'{"event": "fin', bytes(10)):
        with (writer.path / "events.jsonl").open("ab") as file:
            file.write(torn)
        writer.event("checkpoint_damaged")
        writer.cut(0)
        writer.event("server_restored")
    kinds = [event["event"] for event in read_run(writer.path).events]
    assert kinds == ["start", *["checkpoint_damaged", "server_restored"] * 2]
    RunWriter(writer.path).sync()


def test_torn_events_of_a_run_made_before_are_left_out(writer: RunWriter) -> None:
    with (writer.path / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "fin{"event": "failed"}\n')
    writer.event("interrupted")
    assert read_run(writer.path).state == "interrupted"


def test_cut_leaves_the_temporary_files_of_others(writer: RunWriter) -> None:
    writer.trace(rows(0, 10))
    others = [writer.path / name for name in ("profile.json.tmp", "request-0a.json.tmp")]
    torn = [writer.path / name / ".part-1.parquet.tmp" for name in ("loss.parquet", "trace")]
    for path in (*others, *torn):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"torn")
    writer.cut(5)
    assert sorted(writer.path.rglob("*.tmp")) == sorted(others)


def test_losses_that_cannot_be_read_are_put_aside(writer: RunWriter) -> None:
    writer.trace(rows(0, 10))
    for update in (0, 3, 5, 8):
        writer.loss({"update": [update], "seconds": [0.1 * update], "loss": [2.3]})
    path = writer.path / "loss.parquet" / "part-000000000003.parquet"
    damaged = path.read_bytes()[:-20]
    path.write_bytes(damaged)
    writer.cut(5)
    run = read_run(writer.path)
    assert len(run.trace) == 5
    assert run.loss["update"].tolist() == [0, 5]
    event = run.events[-1]
    assert event["event"] == "loss_damaged"
    assert event["file"] == "loss.parquet/_damaged-000000000003.parquet"
    assert (writer.path / event["file"]).read_bytes() == damaged
    pd.testing.assert_frame_equal(pd.read_parquet(writer.path / "loss.parquet"), run.loss)


def test_record_ends_where_members_are_damaged(writer: RunWriter) -> None:
    writer.trace(rows(0, 30))
    for first in (3, 20):
        writer.members({name: [first] for name in MEMBER_COLUMNS})
    assert writer.recorded_updates() == 30
    part = writer.path / "members" / "part-000000000020.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    assert writer.recorded_updates() == 20
    writer.cut(20)
    assert read_run(writer.path).members["update"].tolist() == [3]


def test_temporary_files_of_a_torn_write_are_ignored(writer: RunWriter) -> None:
    writer.trace(rows(0, 10))
    (writer.path / "trace" / ".part-000000000010.parquet.tmp").write_bytes(b"PAR1 torn")
    assert len(read_run(writer.path).trace) == 10
    assert len(pd.read_parquet(writer.path / "trace")) == 10


def test_a_damaged_part_is_named(writer: RunWriter) -> None:
    (writer.path / "trace" / "part-000000000000.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"part-000000000000\.parquet"):
        _ = read_run(writer.path).trace


def test_losses_of_a_run_made_before_they_came_in_parts_are_read_and_gone_on_with(
    writer: RunWriter,
) -> None:
    writer.loss({"update": [0, 25, 50], "seconds": [0.0, 0.1, 0.2], "loss": [2.3, 1.9, 1.8]})
    losses = writer.path / "loss.parquet"
    (part,) = losses.iterdir()
    single = part.rename(writer.path / "single")
    losses.rmdir()
    for name in ("loss.parquet", "loss-single.parquet"):  # the second: a cut that was interrupted
        single = single.rename(writer.path / name)
        assert read_run(writer.path).loss["loss"].tolist() == [2.3, 1.9, 1.8]
    writer.cut(25)
    assert writer.recorded_losses() == [(0, 0.0, 2.3), (25, 0.1, 1.9)]
    writer.loss({"update": [50], "seconds": [0.3], "loss": [1.7]})
    assert read_run(writer.path).loss["loss"].tolist() == [2.3, 1.9, 1.7]


def test_a_directory_in_use_is_refused(writer: RunWriter) -> None:
    with pytest.raises(InputError, match="not empty"):
        RunWriter.create(writer.path, make_config())


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunWriter.create(tmp_path / "file" / "run", make_config())


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a run directory"):
        read_run(tmp_path)
