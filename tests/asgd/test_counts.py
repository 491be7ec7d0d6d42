"""Counts instead of rows: each update is counted once, even if a process is killed or reads."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.errors import InputError, NoRowsError
from asgd.rundir import counting, counts
from asgd.rundir.checkpoint import CHECKPOINTS, paths, version_of
from asgd.rundir.columns import (
    COUNTS,
    DISCARDED,
    MEMBER_COLUMNS,
    MEMBERS,
    TRACE,
)
from asgd.rundir.counts import StalenessCounts, counted_updates
from asgd.rundir.parts import first_update, parts_of
from asgd.rundir.reader import Run, read_run
from asgd.rundir.repair import cut_back, recorded_updates
from asgd.rundir.repeats import unfinished_repeats
from asgd.rundir.summary import status
from asgd.rundir.writer import RunWriter
from asgd.simulation.simulate import simulate
from cluster.storage.verify import verify
from tests.asgd.test_cli import asgd
from tests.support.counted_rows import PART, SPAN, SPANS, check, discarded, expected, trace, write
from tests.support.killing import killed_at
from tests.support.machine import Machine, configure


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the rows of two parts at once, in short spans."""
    monkeypatch.setattr(counting, "LEAST_ROWS", 2 * PART)
    sizes = {"LEAST_SPAN": SPAN, "MOST_SPANS": SPANS, "FEWEST_SPANS": 16}
    for name, value in sizes.items():
        monkeypatch.setattr(counts, name, value)


def with_counts(config: RunConfig) -> RunConfig:
    return msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, record="counts"))


@pytest.fixture
def config() -> RunConfig:
    run = {"updates": 10_000_000, "eval_every": 10_000_000, "record": "counts"}
    return make_config({"run": run})


def test_old_rows_become_exact_counts(tmp_path: Path, config: RunConfig) -> None:
    path = RunWriter.create(tmp_path / "run", config).path
    updates = write(path, config, 0, 5)
    assert counted_updates(path) == updates - PART
    assert len(list((path / "trace").iterdir())) == 1
    check(path, updates)
    updates = write(path, config, updates, 2)  # a part and a half of those in the file
    assert counted_updates(path) == updates - PART
    check(path, updates)


def test_spans_are_joined_so_that_the_file_does_not_grow(tmp_path: Path, config: RunConfig) -> None:
    path = RunWriter.create(tmp_path / "run", config).path
    updates, size = 0, SPANS * SPAN // 8
    sizes = []
    for _ in range(6):
        updates = write(path, config, updates, 4, size)
        sizes.append((path / COUNTS).stat().st_size)
    check(path, updates, 4 * SPAN)
    assert sizes[-1] < 1.3 * max(sizes[:2])
    assert read_run(path).counts["update"].nunique() <= SPANS


def test_many_rows_of_counts_join_spans_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "MOST_COUNT_ROWS", 300)
    rows = trace(0, 30 * SPAN)
    rows["staleness"] = rows["update"] % 50
    rows["read_version"] = rows["update"] - rows["staleness"]
    found = StalenessCounts.none().adding([("trace", rows)], len(rows["update"]))
    assert found.span == 2 * SPAN  # 16 spans, or a half of them, at least stay apart
    halves = [{name: column[part::2] for name, column in rows.items()} for part in (0, 1)]
    again = StalenessCounts.none().adding([("trace", half) for half in halves], 30 * SPAN)
    for name, column in found.columns.items():
        np.testing.assert_array_equal(column, again.columns[name])


def test_killed_at_any_file_operation_no_update_is_lost_or_counted_twice(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kill_at in count():
        path = RunWriter.create(tmp_path / str(kill_at), config).path
        before = write(path, config, 0, 3)
        with killed_at(kill_at, monkeypatch) as killed:
            write(path, config, before, 3)
        reached = read_run(path).recorded_updates
        assert reached in range(before, before + 4 * PART, PART)
        run = read_run(path)
        assert run.counts["updates"].sum() == run.outline.updates == reached
        cut_back(path, before + PART if reached > before else before)  # as a resumed run does
        assert counted_updates(path) in (before - PART, before + 2 * PART) or reached <= before
        assert not list(path.glob("*/.*")) + list(path.glob(".*"))
        updates = read_run(path).recorded_updates
        check(path, write(path, config, updates, 2))
        if not killed:
            assert kill_at > 10
            return


def test_reading_continues_while_rows_are_counted(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = RunWriter.create(tmp_path / "run", config).path
    updates = write(path, config, 0, 3)
    real, counted = Run._parts, []

    def parts(run: Run, table: str, *begun: int) -> Iterator[Any]:
        for part in real(run, table, *begun):
            if not counted:
                counted.append(write(path, config, updates, 3))
            yield part

    for read in (lambda run: run.counts["updates"].sum(), lambda run: run.outline.updates):
        counted.clear()
        updates = read_run(path).recorded_updates
        run = read_run(path)
        assert run.recorded_updates == updates
        with monkeypatch.context() as patch:
            patch.setattr(Run, "_parts", parts)
            assert read(run) in (updates, updates + PART, updates + 3 * PART)
            assert counted


def test_counts_of_restored_servers_equal_those_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same arrivals are recorded as rows and as counts, for several policies and restarts."""
    monkeypatch.setattr(counting, "LEAST_ROWS", 64)
    for policy in ({}, {"mode": "buffered", "gradients_per_update": 3}, {"discard_above": 2}):
        plain = configure(workers=4, updates=500, **policy)
        runs = []
        for number, one in enumerate((plain, with_counts(plain))):
            machine = Machine(tmp_path / f"{policy}-{number}", one)
            for goal in range(10, 510, 10):
                machine.work(goal, goal)
                if goal in (100, 250):
                    machine.restart()
            machine.recorder.record(machine.crowd.server.drain())
            runs.append(read_run(machine.path))
        rows, counted = runs
        assert counted_updates(counted.path) > 300
        exact = ["update", "worker", "staleness", "updates", "members", "discarded"]
        pd.testing.assert_frame_equal(rows.counts[exact], counted.counts[exact])
        assert counted.counts["updates"].sum() == 500
        assert not (findings := verify(counted).findings), findings
        if policy:
            assert counted.counts["members"].sum() + counted.counts["discarded"].sum() > 0
        else:
            damage(counted)
            assert "gradients of worker" in verify(read_run(counted.path)).findings[0]


def test_the_older_checkpoint_is_never_before_the_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "LEAST_ROWS", 1)
    machine = Machine(tmp_path / "run", with_counts(configure(workers=2, updates=200)))
    for goal in range(10, 150, 10):
        machine.work(goal)
    newest, older = paths(machine.path / CHECKPOINTS)
    assert 0 < counted_updates(machine.path) <= version_of(older)
    newest.write_bytes(b"damaged")
    machine.restart()
    assert machine.crowd.server.version == version_of(older)
    machine.work(200)
    assert read_run(machine.path).counts["updates"].sum() == 200
    assert not (findings := verify(read_run(machine.path)).findings), findings


def damage(run: Run) -> None:
    """Move the counts of one row to another worker."""
    stored = StalenessCounts.load(run.path, 10**6)
    worker = stored.columns["worker"].copy()
    worker[0] += 1
    replace(stored, columns={**stored.columns, "worker": worker}).save(run.path)


def test_without_rows_tables_are_refused_and_verify_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asgd.simulation.simulate._PART", 1000)
    run = {"updates": 3000, "eval_every": 500, "record": "counts"}
    tables = {"problem": {"kind": "quadratic"}, "cluster": {"workers": 4}, "run": run}
    path = simulate(make_config(tables), tmp_path / "run")
    found = read_run(path)
    assert counted_updates(path) == 2000
    for name in ("trace", "members", "discarded", "positions"):
        with pytest.raises(NoRowsError, match=r'run\.record = "counts": expected run.record'):
            getattr(found, name)
    rows = simulate(make_config({**tables, "run": {**run, "record": "updates"}}), tmp_path / "rows")
    pd.testing.assert_frame_equal(found.counts, read_run(rows).counts)
    assert status(found)["mean_staleness"] == status(read_run(rows))["mean_staleness"]
    exit_status, said, _ = asgd(capsys, "verify", path)
    assert exit_status == 0
    assert 'run.record = "counts" keeps no rows' in said


def test_damaged_counts_are_refused(tmp_path: Path, config: RunConfig) -> None:
    path = RunWriter.create(tmp_path / "run", config).path
    write(path, config, 0, 4)
    content = bytearray((path / COUNTS).read_bytes())
    content[len(content) // 2] ^= 1
    (path / COUNTS).write_bytes(content)
    with pytest.raises(InputError, match=r"counts.parquet: cannot be read"):
        _ = read_run(path).counts
    with pytest.raises(InputError, match=r"counts.parquet: cannot be read"):
        recorded_updates(path)
    stored = StalenessCounts.none().adding([("trace", trace(0, 100))], 100)
    StalenessCounts(stored.columns, 101, stored.span).save(path)
    with pytest.raises(InputError, match="counts 100 updates, expected 101"):
        _ = read_run(path).counts


def test_members_are_counted_with_their_own_workers() -> None:
    members = {name: np.ones(4, kind) for name, kind in MEMBER_COLUMNS.items()} | {
        "update": np.array([2, 2, 3, 3]),
        "worker": np.array([0, 1, 0, 1]),
        "read_version": np.array([2, 1, 2, 1]),
    }
    found = StalenessCounts.none().adding([("trace", trace(0, 4)), ("members", members)], 4)
    rows = pd.DataFrame(found.columns)
    rows = rows[rows["members"] > 0]
    assert rows[["worker", "staleness", "members"]].to_numpy().tolist() == [
        [0, 0, 1],
        [0, 1, 1],
        [1, 1, 1],
        [1, 2, 1],
    ]


@pytest.mark.parametrize("at", [TRACE, MEMBERS, DISCARDED, None])
def test_rows_counted_between_two_steps_of_reading_are_not_left_out(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch, at: str | None
) -> None:
    """More rows are counted before a table is opened, or right after the counts are read (None)."""
    path = RunWriter.create(tmp_path / "run", config).path
    updates, more, done = write(path, config, 0, 3), 0, False
    stored, parts = Run._stored_counts, Run._parts

    def count_more(now: str | None) -> None:
        nonlocal more, done
        if now == at and not done:
            done = True
            more = write(path, config, updates, 3)

    def counted(run: Run) -> StalenessCounts:
        found = stored(run)
        count_more(None)
        return found

    def opened(run: Run, table: str, *begun: int) -> Iterator[Any]:
        count_more(table)
        yield from parts(run, table, *begun)

    for read in (lambda run: run.outline, lambda run: run.counts):
        run, done = read_run(path), False
        _ = run.recorded_updates
        with monkeypatch.context() as patch:
            patch.setattr(Run, "_stored_counts", counted)
            patch.setattr(Run, "_parts", opened)
            found = read(run)
        if isinstance(found, pd.DataFrame):
            number = int(found["updates"].sum())
            pd.testing.assert_frame_equal(found, expected(number), check_dtype=False)
        else:
            number = found.updates
            assert found.mean_staleness == pytest.approx(trace(0, number)["staleness"].mean())
        assert number in (updates, more)
        updates = more or updates


def test_if_counting_fails_halfway_rows_are_kept_apart_from_counted_ones(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = RunWriter.create(tmp_path / "run", config).path
    writer, updates = RunWriter(path), write(path, config, 0, 3)

    def fail(directory: Path) -> None:
        raise OSError("a broken disk")

    with monkeypatch.context() as patch:  # the file of the counts is in place
        patch.setattr(counts, "sync_directory", fail)
        for _ in range(40):
            writer.trace(trace(updates, PART))
            writer.discarded(discarded(updates, PART))
            updates += PART
            writer.count(config, updates - PART)
    assert counted_updates(path) < updates - 32 * PART
    check(path, updates, 2 * SPAN)


def test_a_repeat_of_which_only_counts_are_left_is_not_begun_again(
    tmp_path: Path, config: RunConfig
) -> None:
    repeats = msgspec.structs.replace(config.run, repeats=2)
    out = tmp_path / "out"
    out.mkdir()
    whole = msgspec.structs.replace(config, run=repeats)
    (out / "config.json").write_text(whole.to_json())
    path = RunWriter.create(out / "repeat-000", config).path
    write(path, config, 0, 3)
    (path / CHECKPOINTS).mkdir()
    cut_back(path, 2 * PART)  # a server was restored and killed before its first update
    assert not list((path / "trace").iterdir())
    with unfinished_repeats(out) as left:
        assert [(directory.name, fresh is None) for directory, fresh in left] == [
            ("repeat-000", True),
            ("repeat-001", False),
        ]
    assert read_run(path).counts["updates"].sum() == 2 * PART


def test_damage_to_counted_rows_that_a_killed_process_left_is_harmless(
    tmp_path: Path, config: RunConfig
) -> None:
    path = RunWriter.create(tmp_path / "run", config).path
    updates = write(path, config, 0, 2)
    for table in (TRACE, DISCARDED):
        (saved := path / f"{table}.old").mkdir()
        for part in parts_of(path / table):
            shutil.copy(part, saved)
    updates = write(path, config, updates, 2)
    for table in (TRACE, DISCARDED):
        part = parts_of(path / f"{table}.old")[0]
        (path / table / part.name).write_bytes(b"damaged")
        shutil.rmtree(path / f"{table}.old")
    assert first_update(parts_of(path / DISCARDED)[0]) < counted_updates(path)
    assert recorded_updates(path) == updates
    cut_back(path, updates)
    check(path, updates)


def test_rows_or_counts_of_a_run_are_not_imported_as_a_log(
    tmp_path: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = RunWriter.create(tmp_path / "run", config).path
    write(path, config, 0, 5)
    for source in (path / COUNTS, path / "trace", next((path / "trace").iterdir())):
        exit_status, _, message = asgd(capsys, "import", source, "--out", tmp_path / "record")
        assert exit_status == 2
        assert 'run.record = "counts"' in message
        assert not (tmp_path / "record").exists()


def test_verify_says_what_it_checked(tmp_path: Path) -> None:
    for mode, said in (({}, True), ({"mode": "sync"}, False)):
        config = with_counts(configure(workers=2, updates=100, **mode))
        machine = Machine(tmp_path / str(said), config)
        machine.work(100)
        machine.recorder.record(machine.crowd.server.drain())
        found = verify(read_run(machine.path))
        assert not found.findings
        assert ("gradients were counted by worker" in found.checked) == said


@pytest.mark.parametrize("table", [TRACE, MEMBERS])
def test_a_lost_part_of_the_newest_rows_is_found(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    table: str,
) -> None:
    monkeypatch.setattr("asgd.simulation.simulate._PART", 1000)
    run = {"updates": 3000, "eval_every": 500, "record": "counts"}
    cluster = {"workers": 3, "mode": "buffered", "gradients_per_update": 2}
    config = make_config({"problem": {"kind": "quadratic"}, "cluster": cluster, "run": run})
    path = simulate(config, tmp_path / "run")
    (part,) = parts_of(path / table)
    part.unlink()
    if table == TRACE:
        with pytest.raises(InputError, match=r"2000 updates, but .* a part was lost"):
            _ = read_run(path).counts
    exit_status, said, _ = asgd(capsys, "verify", path)
    assert exit_status == 1
    assert "lost" in said


def test_counting_continues_after_all_discarded_rows_are_counted(
    tmp_path: Path, config: RunConfig
) -> None:
    path = RunWriter.create(tmp_path / "run", config).path
    writer = RunWriter(path)
    writer.discarded(discarded(0, PART))
    for part in range(8):
        writer.trace(trace(part * PART, PART))
        writer.count(config, part * PART)
    assert not parts_of(path / DISCARDED)
    assert counted_updates(path) > 4 * PART
    assert read_run(path).counts[["updates", "discarded"]].sum().tolist() == [8 * PART, 50]


def test_status_does_not_take_means_for_a_worker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mode, said in (("sync", "workers    3\n"), ("async", "workers    3, 3 have contributed\n")):
        cluster, run = {"workers": 3, "mode": mode}, {"updates": 30}
        config = make_config({"problem": {"kind": "quadratic"}, "cluster": cluster, "run": run})
        _, printed, _ = asgd(capsys, "status", simulate(config, tmp_path / mode))
        assert said in printed
