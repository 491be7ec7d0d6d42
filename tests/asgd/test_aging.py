"""Parts of a table are merged as they age; no row is lost or read twice if the writer is killed."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from asgd.config.make import make_config
from asgd.rundir.aging import FAN_IN, MOST_ROWS, AgingTable, parts_due
from asgd.rundir.columns import METRICS, SKIPPED, TRACE_COLUMNS
from asgd.rundir.parts import covered_parts, parts_of
from asgd.rundir.reader import Run, read_run
from asgd.rundir.repair import cut_back, recorded_updates
from asgd.rundir.writer import RunWriter
from tests.support.killing import killed_at

Columns = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    config = make_config({"run": {"updates": 10_000_000, "eval_every": 1}})
    return RunWriter.create(tmp_path / "run", config).path


def rows(first: int, size: int) -> Columns:
    update = np.arange(first, first + size)
    staleness = np.minimum(update % 7, update)
    ones = {name: np.ones(size, kind) for name, kind in TRACE_COLUMNS.items()}
    return ones | {
        "update": update,
        "worker": update % 3,
        "staleness": staleness,
        "read_version": update - staleness,
        "applied_seconds": update / 10,
    }


def write(path: Path, sizes: Iterator[int] | list[int], first: int = 0) -> int:
    writer = RunWriter(path)
    for size in sizes:
        writer.trace(rows(first, size))
        losses = np.arange(first, first + size)
        writer.loss({"update": losses, "seconds": losses / 10, "loss": 1.0 / (1 + losses)})
        first += size
    return first


def check(path: Path, updates: int) -> Run:
    run = read_run(path)
    expected = pd.DataFrame(rows(0, updates))[list(TRACE_COLUMNS)]
    pd.testing.assert_frame_equal(run.trace, expected, check_dtype=False)
    assert run.loss["update"].tolist() == list(range(updates))
    assert recorded_updates(path) == run.recorded_updates == updates
    found, trace = run.outline, run.trace
    assert found.updates == updates
    assert found.by_worker == trace.groupby("worker").size().to_dict()
    assert found.mean_staleness == pytest.approx(trace["staleness"].mean(), rel=1e-12)
    tail = trace["staleness"][-max(1, updates // 10) :]
    assert found.recent_staleness == pytest.approx(tail.mean(), rel=1e-12)
    return run


def test_old_parts_become_one(path: Path) -> None:
    updates = write(path, [2] * (3 * FAN_IN + 5))
    assert [len(parts_of(path / name)) for name in ("trace", "loss.parquet")] == [8, 8]
    check(path, updates)
    assert len(pd.read_parquet(path / "trace")) == updates


def test_another_writer_continues_merging(path: Path) -> None:
    middle = write(path, [3] * 20)
    updates = write(path, [3] * 20, middle)
    assert len(parts_of(path / "trace")) == 1 + 40 - FAN_IN
    check(path, updates)


def test_a_long_run_leaves_few_parts_and_writes_each_row_a_few_times() -> None:
    rng = np.random.default_rng(0)
    rows, written, most = [], 0, 0
    for _ in range(100_000):
        rows.append(int(rng.integers(1, 20_000)))
        written += rows[-1]
        while due := parts_due(rows):
            assert sum(rows[due]) <= MOST_ROWS
            assert len(rows[due]) > 1
            written += sum(rows[due])
            rows[due] = [sum(rows[due])]
        most = max(most, len(rows))
    total = sum(rows)
    assert most < 3 * total / MOST_ROWS + 4 * FAN_IN
    assert written < 5 * total


@pytest.mark.parametrize("kept", [0, 1, 200])
def test_a_cut_may_split_a_merged_part(path: Path, kept: int) -> None:
    updates = write(path, [10] * (FAN_IN + 2))
    assert updates > 200
    cut_back(path, kept)
    losses = len(read_run(path).loss)
    assert (len(read_run(path).trace), losses) == (kept, kept + 1)
    writer = RunWriter(path)
    for size in range(1, 4):  # hidden if the cut part kept the name of the merged part
        writer.trace(rows(kept, size))
        kept += size
    assert len(read_run(path).trace) == kept == recorded_updates(path)


@pytest.mark.parametrize("most", [1, 7, 45, 90, 1000])
def test_some_losses_are_equally_spaced_and_include_the_last(path: Path, most: int) -> None:
    write(path, [3] * 30)
    losses = read_run(path).loss["loss"].tolist()
    found = read_run(path).some_losses(most)
    step = -(-len(losses) // most)
    assert found == losses[::-1][::step][::-1]
    assert 0 < len(found) <= most


@pytest.mark.slow
def test_a_merge_killed_at_any_file_operation_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"run": {"updates": 1000, "eval_every": 1}})
    for kill_at in count():
        path = RunWriter.create(tmp_path / str(kill_at), config).path
        before = write(path, [2] * (FAN_IN - 1))
        with killed_at(kill_at, monkeypatch) as killed:
            write(path, [2], before)
        trace = read_run(path).trace["update"].tolist()
        assert trace in (list(range(before)), list(range(before + 2)))
        cut_back(path, before)  # as a resumed run does
        assert not covered_parts(path / "trace")
        assert len(read_run(path).trace) == before
        assert not list(path.glob("*/.*"))
        if not killed:
            assert kill_at > FAN_IN
            return


def test_reading_continues_while_parts_are_merged(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = write(path, [2] * (FAN_IN - 1))
    real, merged = Run._parts, []

    def parts(run: Run, table: str, *begun: int) -> Iterator[Any]:
        for number, part in enumerate(real(run, table, *begun)):
            if number == 3 and not merged:
                merged.append(write(path, [2], updates))
            yield part

    monkeypatch.setattr(Run, "_parts", parts)
    assert len(read_run(path).trace) == merged[0] == updates + 2


def test_reading_continues_while_a_restored_server_cuts_the_last_part(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, [20, 30])
    real, cut = Run._parts, []

    def parts(run: Run, table: str, *begun: int) -> Iterator[Any]:
        yield from real(run, table, *begun)
        if not cut:
            cut.append(cut_back(path, 35))

    monkeypatch.setattr(Run, "_parts", parts)
    assert read_run(path).trace["update"].tolist() == list(range(35))
    assert cut


@pytest.mark.parametrize("table", [SKIPPED, METRICS])
def test_a_cut_between_two_tables_is_no_missing_loss(
    path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    """Losses at even updates, the others skipped; cut where the second table is read."""
    writer = RunWriter(path)
    for first in (0, 20):
        update = np.arange(first, first + 20)
        writer.trace(rows(first, 20))
        writer.metrics((one, {"distance": 1.0}) for one in update[::2].tolist())
        writer.loss({"update": update[::2], "seconds": update[::2] / 10, "loss": update[::2]})
        writer.skipped(update[1::2])
    real, cut = Run._parts, []

    def parts(run: Run, name: str, *begun: int) -> Iterator[Any]:
        if name == table and not cut:
            cut.append(cut_back(path, 25))
        return real(run, name, *begun)

    monkeypatch.setattr(Run, "_parts", parts)
    run = read_run(path)
    found = run.loss["update"] if table == SKIPPED else run.metrics.index
    assert found.tolist() == list(range(0, 25, 2))
    assert cut


def test_a_disk_without_space_for_a_merge_leaves_the_parts(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: AgingTable, due: slice) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AgingTable, "_merge", full)
    updates = write(path, [1] * (FAN_IN + 3))
    assert len(parts_of(path / "trace")) == FAN_IN + 3
    check(path, updates)
