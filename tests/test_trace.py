"""The run directory: what is written is read back, and torn files do not make it unreadable."""

from pathlib import Path

import numpy as np
import pytest

from asgd.config import make_config
from asgd.errors import InputError
from asgd.trace import LOSS_COLUMNS, TRACE_COLUMNS, RunWriter, read_run


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


def test_a_torn_last_event_is_left_out(writer: RunWriter) -> None:
    with (writer.path / "events.jsonl").open("a") as file:
        file.write('{"event": "fin')
    assert [event["event"] for event in read_run(writer.path).events] == ["start"]


def test_temporary_files_of_a_torn_write_are_ignored(writer: RunWriter) -> None:
    writer.trace(rows(0, 10))
    (writer.path / "trace" / "part-000000000010.parquet.tmp").write_bytes(b"PAR1 torn")
    assert len(read_run(writer.path).trace) == 10


def test_a_damaged_part_is_named(writer: RunWriter) -> None:
    (writer.path / "trace" / "part-000000000000.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"part-000000000000\.parquet"):
        _ = read_run(writer.path).trace


def test_loss_is_replaced_as_a_whole(writer: RunWriter) -> None:
    writer.loss({name: [0] for name in LOSS_COLUMNS})
    writer.loss({"update": [0, 25], "seconds": [0.0, 0.1], "loss": [2.3, 1.9]})
    assert read_run(writer.path).loss["loss"].tolist() == [2.3, 1.9]


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
