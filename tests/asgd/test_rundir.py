"""The run directory: it is read as it was written, even with torn files."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from asgd.config.make import make_config
from asgd.errors import InputError
from asgd.rundir.columns import MEMBER_COLUMNS, SHARED, TRACE_COLUMNS
from asgd.rundir.files import replace_file
from asgd.rundir.reader import read_run
from asgd.rundir.repair import cut_back, recorded_updates
from asgd.rundir.writer import RunWriter


def rows(first: int, count: int) -> dict[str, np.ndarray]:
    update = np.arange(first, first + count)
    ones, zeros = np.ones(count), {name: np.zeros(count) for name in TRACE_COLUMNS}
    return {**zeros, "update": update, "read_version": update, "batch_size": ones}


@pytest.fixture
def writer(tmp_path: Path) -> RunWriter:
    return RunWriter.create(tmp_path / "run", make_config({"run": {"eval_every": 5}}))


def test_parts_are_joined_in_order_of_update(writer: RunWriter) -> None:
    writer.trace(rows(0, 1000))
    writer.trace(rows(1000, 500))
    writer.trace(rows(1500, 0))
    trace = read_run(writer.path).trace
    assert trace["update"].tolist() == list(range(1500))
    assert {name: trace[name].dtype for name in TRACE_COLUMNS} == TRACE_COLUMNS


def test_a_new_run_is_readable_before_its_first_update(writer: RunWriter) -> None:
    run = read_run(writer.path)
    assert run.trace.empty
    assert run.loss.empty
    assert run.state == "unfinished"
    assert run.config == make_config({"run": {"eval_every": 5}})
    assert run.environment["cores"] >= 1


def test_state_follows_the_last_event_that_ends_a_run(writer: RunWriter) -> None:
    writer.event("interrupted", update=3)
    assert read_run(writer.path).state == "interrupted"
    writer.event("finish", update=5)
    assert read_run(writer.path).state == "finished"


@pytest.mark.parametrize(
    "name",
    [
        "trace",
        "checkpoints",
        "environment.json",
        "trace/part-000000000000.parquet",
        "loss.parquet/deeper/still/elsewhere.parquet",
    ],
)
def test_a_link_or_a_pipe_inside_a_run_is_refused(
    writer: RunWriter, tmp_path: Path, name: str
) -> None:
    place = writer.path / name
    place.parent.mkdir(parents=True, exist_ok=True)
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
    assert read_run(tmp_path / "latest").path == tmp_path / "latest"


def test_replacing_a_file_does_not_follow_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for link in (tmp_path / "profile.json", tmp_path / ".profile.json.tmp"):
        link.symlink_to(precious)
    replace_file(tmp_path / "profile.json", b"new")
    assert precious.read_text() == "kept"
    assert (tmp_path / "profile.json").read_bytes() == b"new"
    assert not (tmp_path / "profile.json").is_symlink()


def test_a_torn_last_event_is_ignored(writer: RunWriter) -> None:
    with (writer.path / "events.jsonl").open("a") as file:
        file.write('{"event": "fin')
    assert [event["event"] for event in read_run(writer.path).events] == ["start"]


def test_event_after_a_torn_one_is_kept(writer: RunWriter) -> None:
    for torn in (b'{"event": "fin', bytes(10)):
        with (writer.path / "events.jsonl").open("ab") as file:
            file.write(torn)
        writer.event("checkpoint_damaged")
        cut_back(writer.path, 0)
        writer.event("server_restored", to_version=0)
    kinds = [event["event"] for event in read_run(writer.path).events]
    assert kinds == ["start", *["checkpoint_damaged", "server_restored"] * 2]
    RunWriter(writer.path).sync()


def test_a_damaged_event_is_named(writer: RunWriter) -> None:
    with (writer.path / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "fin{"event": "failed"}\n')
    writer.event("interrupted")
    with pytest.raises(InputError, match=r"events\.jsonl: line 2 is not an event"):
        _ = read_run(writer.path).state


def test_a_cut_keeps_the_temporary_files_of_other_processes(writer: RunWriter) -> None:
    writer.trace(rows(0, 10))
    others = [writer.path / name for name in ("profile.json.tmp", "request-0a.json.tmp")]
    torn = [writer.path / name / ".part-1.parquet.tmp" for name in ("loss.parquet", "trace")]
    for path in (*others, *torn):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"torn")
    cut_back(writer.path, 5)
    assert sorted(writer.path.rglob("*.tmp")) == sorted(others)


def test_unreadable_losses_are_set_aside(writer: RunWriter) -> None:
    writer.trace(rows(0, 10))
    for update in (0, 5, 10, 15):
        writer.loss({"update": [update], "seconds": [0.1 * update], "loss": [2.3]})
    path = writer.path / "loss.parquet" / "part-000000000005.parquet"
    damaged = path.read_bytes()[:-20]
    path.write_bytes(damaged)
    cut_back(writer.path, 10)
    run = read_run(writer.path)
    assert len(run.trace) == 10
    assert run.loss["update"].tolist() == [0, 10]
    event = run.events[-1]
    assert event["event"] == "loss_damaged"
    assert event["file"] == "loss.parquet/_damaged-000000000005.parquet"
    assert (writer.path / event["file"]).read_bytes() == damaged
    pd.testing.assert_frame_equal(pd.read_parquet(writer.path / "loss.parquet"), run.loss)


def test_missing_losses_are_reported(tmp_path: Path) -> None:
    config = make_config({"run": {"eval_every": 5, "updates": 30}})
    writer = RunWriter.create(tmp_path / "run", config)
    writer.trace(rows(0, 30))
    for update in (0, 5, 10, 15, 20):
        writer.loss({"update": [update], "seconds": [0.1 * update], "loss": [2.3]})
    (writer.path / "loss.parquet" / "part-000000000010.parquet").unlink()
    with pytest.raises(InputError, match="the loss after update 10 is missing"):
        _ = read_run(writer.path).loss
    cut_back(writer.path, 30)
    run = read_run(writer.path)
    assert run.loss["update"].tolist() == [0, 5, 15, 20]
    assert run.events[-1]["file"] == "loss.parquet/_damaged-000000000010.parquet"
    writer.event("finish")
    with pytest.raises(InputError, match="the loss after update 25 is missing"):
        _ = read_run(writer.path).loss


def measured(writer: RunWriter, *updates: int) -> None:
    """Write a part of metrics and a part of losses for each of the updates."""
    for update in updates:
        writer.metrics([(update, {"accuracy": 0.1 * update, "second": 1.0})])
        writer.loss({"update": [update], "seconds": [0.1 * update], "loss": [2.3]})


def test_metrics_have_a_column_each(writer: RunWriter) -> None:
    assert read_run(writer.path).metrics.empty
    writer.trace(rows(0, 10))
    writer.loss({"update": [0], "seconds": [0.0], "loss": [2.3]})  # before there were metrics
    measured(writer, 5, 10)
    metrics = read_run(writer.path).metrics
    assert metrics.index.tolist() == [5, 10]
    assert metrics.to_dict("list") == {"accuracy": [0.5, 1.0], "second": [1.0, 1.0]}
    cut_back(writer.path, 9)
    assert read_run(writer.path).metrics.index.tolist() == [5]


def test_missing_and_unreadable_metrics_are_reported(writer: RunWriter) -> None:
    writer.trace(rows(0, 20))
    measured(writer, 0, 5, 10, 15)
    part = writer.path / "metrics" / "part-000000000010.parquet"
    content = part.read_bytes()
    part.unlink()
    with pytest.raises(InputError, match="metrics: update 10 is missing; a part was lost"):
        _ = read_run(writer.path).metrics
    part.write_bytes(content[:-20])
    with pytest.raises(InputError, match="part-000000000010"):
        _ = read_run(writer.path).metrics
    cut_back(writer.path, 20)
    run = read_run(writer.path)
    assert run.metrics.index.tolist() == [0, 5, 15]
    assert run.events[-1]["event"] == "metrics_damaged"
    assert run.events[-1]["file"] == "metrics/_damaged-000000000010.parquet"


def test_a_finished_run_with_a_short_trace_is_refused(tmp_path: Path) -> None:
    config = make_config({"run": {"updates": 30}})
    writer = RunWriter.create(tmp_path / "run", config)
    writer.trace(rows(0, 20))
    run = read_run(writer.path)
    assert len(run.trace) == run.outline.updates == 20
    writer.event("finish")
    for read in (lambda run: run.trace, lambda run: run.outline):
        with pytest.raises(InputError, match="20 updates, but the finished run made 30; a part"):
            read(read_run(writer.path))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("staleness", 2, "update 13: staleness 2 is not update - read_version"),
        ("sequence", -1, "update 13: sequence -1 is negative"),
        ("worker", -2, "update 13: worker -2 is not a worker"),
        ("batch_size", 0, "update 13: batch_size 0 is not positive"),
        ("compute_seconds", np.nan, "update 13: compute_seconds nan is not a time"),
        ("applied_seconds", -1.0, "update 13: applied_seconds -1 is not a time"),
        ("gradient_norm", -1.0, "update 13: gradient_norm -1 is not a norm"),
    ],
)
def test_impossible_rows_are_named(writer: RunWriter, name: str, value: float, reason: str) -> None:
    writer.trace(rows(0, 10))
    trace = rows(10, 10)
    trace[name] = np.where(trace["update"] == 13, value, trace[name])
    writer.trace(trace)
    with pytest.raises(InputError, match=f"trace: {reason}"):
        _ = read_run(writer.path).trace


def test_more_rows_than_the_run_has_updates_are_refused(writer: RunWriter) -> None:
    """A few bytes of Parquet can claim millions of rows."""
    writer.trace(rows(0, 5001))
    for read in (lambda run: run.trace, lambda run: run.outline):
        with pytest.raises(InputError, match="5001 rows, expected at most 5000"):
            read(read_run(writer.path))
    writer.trace(rows(0, 5000))
    writer.trace(rows(5000, 1))
    with pytest.raises(InputError, match="5001 rows, expected at most 5000"):
        _ = read_run(writer.path).trace


def test_the_outline_agrees_with_the_whole_trace(writer: RunWriter) -> None:
    rng = np.random.default_rng(0)
    for first, count in ((0, 700), (700, 80), (780, 40)):
        part = rows(first, count)
        part["staleness"] = np.minimum(rng.integers(9, size=count), part["update"])
        part["read_version"] = part["update"] - part["staleness"]
        part["worker"], part["applied_seconds"] = rng.integers(-1, 3, count), part["update"] / 10
        writer.trace(part)
    run = read_run(writer.path)
    found, trace = run.outline, run.trace
    assert (found.updates, found.seconds) == (820, 81.9)
    assert found.mean_staleness == pytest.approx(trace["staleness"].mean(), rel=1e-12)
    assert found.recent_staleness == pytest.approx(trace["staleness"][-82:].mean(), rel=1e-12)
    assert found.by_worker == trace.groupby("worker").size().to_dict()


def test_record_ends_where_members_are_damaged(writer: RunWriter) -> None:
    trace = rows(0, 30)
    trace["worker"] = np.where(np.isin(trace["update"], (3, 20)), SHARED, 0)
    writer.trace(trace)
    assert recorded_updates(writer.path) == 3
    for first in (3, 20):
        members = {name: [0] for name in MEMBER_COLUMNS}
        writer.members(members | {"update": [first], "batch_size": [1]})
    assert recorded_updates(writer.path) == 30
    part = writer.path / "members" / "part-000000000020.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    assert recorded_updates(writer.path) == 20
    cut_back(writer.path, 20)
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
