"""`StalenessLog`: threads and processes append to it, and it is readable at any time."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import asgd
from analysis.records.fit import fit_record
from asgd.records.reader import findings, summary
from tests.support.appends import append

ROOT = Path(__file__).parents[2]


def server(log: asgd.StalenessLog, workers: int, updates: int, seed: int) -> list[int]:
    """Log a server of memoryless workers, and return the staleness of each update."""
    rng = np.random.default_rng(seed)
    log.published(0)
    held = [log.read() for _ in range(workers)]
    found = []
    for update in range(updates):
        worker = int(rng.integers(workers))
        found.append(log.applied(worker, held[worker], loss=1.0 / (1 + update), samples=4))
        log.published(update + 1)
        held[worker] = log.read(worker)
    return found


def test_a_closed_log_is_a_record_of_tables(tmp_path: Path) -> None:
    with asgd.StalenessLog(tmp_path / "mine") as log:
        expected = server(log, 4, 3000, 0)
    record = asgd.read_record(tmp_path / "mine")
    assert (record.state, record.about.kind, record.about.unit) == ("finished", "logged", "updates")
    assert record.items["staleness"].tolist() == expected
    assert record.items["samples"].unique().tolist() == [4]
    assert np.all(np.diff(record.items["seconds"]) >= 0)
    assert findings(record) == []
    names = {file.name for file in record.path.iterdir()}
    assert names == {"record.json", "events.jsonl", "items"}


def test_a_server_of_memoryless_workers_has_its_law(tmp_path: Path) -> None:
    with asgd.StalenessLog(tmp_path / "mine") as log:
        server(log, 5, 6000, 1)
    fit = fit_record(asgd.read_record(tmp_path / "mine"))
    assert fit.workers == 5
    assert fit.conservation is not None
    assert fit.conservation.holds
    assert fit.grade == "holds"
    error = fit.shape.zeros_error
    assert abs(fit.shape.zeros - 1 / 5) < 3.0 * error


def test_a_log_is_readable_while_it_grows(tmp_path: Path) -> None:
    log = asgd.StalenessLog(tmp_path / "mine", unit="versions")
    assert asgd.read_record(log.path).items.empty
    expected = server(log, 3, 50, 2)
    with (log.path / "log.jsonl").open("ab") as file:
        file.write(b'{"read_ver')  # of a process that was killed while it wrote
    record = asgd.read_record(log.path)
    assert record.state == "running"
    assert record.items["staleness"].tolist() == expected
    assert record.about.workers
    found = summary(record)
    assert (found["rows"], found["unit"], found["workers"]) == (50, "versions", 3)
    with (log.path / "log.jsonl").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(asgd.InputError, match="line 51"):
        asgd.read_record(log.path)


def test_threads_lose_no_line(tmp_path: Path) -> None:
    log = asgd.StalenessLog(tmp_path / "mine")
    log.published(3)

    def work(worker: int) -> None:
        for number in range(500):
            log.applied(worker, log.read(version=worker), item=f"{worker}-{number}")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    record = asgd.read_record(log.path)
    names = [record.about.workers[code] for code in record.items["worker"]]
    assert Counter(names) == {str(worker): 500 for worker in range(4)}
    assert record.about.left_out == {}
    assert (3 - record.items["staleness"]).astype(str).tolist() == names


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside a thread
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # where an earlier test loaded JAX
def test_processes_lose_no_line(method: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context(method)
    log, ready = asgd.StalenessLog(tmp_path / "mine"), context.Barrier(3)
    log.published(2)
    workers = [context.Process(target=append, args=(log, one, ready)) for one in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert asgd.read_record(log.path).state == "running"  # none of them closed it
    log.published(5)
    log.close()
    record = asgd.read_record(log.path)
    assert len(record.items) == 1200
    assert record.items["worker"].value_counts().tolist() == [400] * 3
    assert set(record.items["update"]) == {2}
    assert set(record.items["in_flight"]) == {0}


@pytest.mark.parametrize(
    ("version", "staleness", "publication"),
    [(None, 11, 0), (4, 11, 0), (1, 14, 3), (5, 10, 0)],  # version 5 is not logged yet
)
def test_publication_flight_and_queue_are_distinguished(
    version: int | None, staleness: int, publication: int, tmp_path: Path
) -> None:
    with asgd.StalenessLog(tmp_path / "mine", unit="steps") as log:
        log.published(4)
        read = log.read(version=version)
        log.published(6)
        read = log.computed(read)
        log.published(15)
        assert log.applied("sampler", pickle.loads(pickle.dumps(read))) == staleness
    record = asgd.read_record(log.path)
    names = ["update", "staleness", "in_publication", "in_flight"]
    assert record.items[names].to_numpy().tolist() == [
        [15, staleness, publication, staleness - publication - 9]
    ]
    assert record.about.left_out == {}


def test_a_worker_ahead_of_the_log_does_not_end_before_it_starts(tmp_path: Path) -> None:
    """The worker reads a version, and computes, just before the trainer logs that version."""
    with asgd.StalenessLog(tmp_path / "mine") as log:
        log.published(4)
        read = log.computed(log.read(version=5))
        log.published(5)
        log.applied("worker", read)
    record = asgd.read_record(log.path)
    assert record.about.left_out == {}
    assert record.items[["staleness", "in_flight"]].to_numpy().tolist() == [[0, 0]]


def test_logging_needs_neither_pandas_nor_arrow_nor_ray(tmp_path: Path) -> None:
    code = f"""
import sys, asgd
log = asgd.StalenessLog({str(tmp_path / "mine")!r})
log.published(0)
log.applied("a", log.read(), loss=1.0)
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"ray", "pandas", "pyarrow", "scipy", "msgspec", "matplotlib", "torch"}
    record = asgd.read_record(tmp_path / "mine")  # not closed: the process is gone
    assert record.state == "stopped"
    assert len(record.items) == 1


def test_a_closed_log_refuses_items(tmp_path: Path) -> None:
    log = asgd.StalenessLog(tmp_path / "mine")
    log.published(0)
    read, other = log.read(), asgd.StalenessLog.join(log.path)
    log.applied(0, read)
    other.close()  # not the owner, so the log stays open
    other.applied(0, read)
    log.close()
    log.close()
    for one in (log, other):
        with pytest.raises(asgd.InputError, match="the log is closed"):
            one.applied(0, read)
    assert len(asgd.read_record(log.path).items) == 2
    with pytest.raises(asgd.InputError, match="no open log"):
        asgd.StalenessLog.join(log.path)


def test_a_log_without_an_item_can_be_closed(tmp_path: Path) -> None:
    with asgd.StalenessLog(tmp_path / "mine"):
        pass
    record = asgd.read_record(tmp_path / "mine")
    assert (len(record.items), record.state) == (0, "finished")


def test_a_restart_of_the_versions_is_noted(tmp_path: Path) -> None:
    with asgd.StalenessLog(tmp_path / "mine") as log:
        for version in (7, 8, 2, 3):
            log.published(version)
            log.applied(0, log.read())
    record = asgd.read_record(log.path)
    assert record.items["update"].tolist() == [7, 8, 9, 10]
    assert record.items["session"].tolist() == [0, 0, 1, 1]
    assert "falls from 8 to 2" in record.about.notes[0]


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(asgd.InputError, match="unit = 'epochs': expected one of updates"):
        asgd.StalenessLog(tmp_path / "mine", unit="epochs")
    log = asgd.StalenessLog(tmp_path / "mine")
    with pytest.raises(asgd.InputError, match="exists and is not empty"):
        asgd.StalenessLog(tmp_path / "mine")
    with pytest.raises(asgd.InputError, match="version = -1: expected a whole number >= 0"):
        log.published(-1)
    with pytest.raises(asgd.InputError, match=r"version = 1\.5: expected a whole number"):
        log.published(1.5)  # type: ignore[arg-type]
    with pytest.raises(asgd.InputError, match=r"read.version = 3: expected one published, up to 0"):
        log.applied(0, log.read(version=3))
    log.applied(0, log.read(), loss=float("nan"))
    assert os.path.getsize(log.path / "log.jsonl") > 0
    assert np.isnan(asgd.read_record(log.path).items["loss"]).all()
