"""Epochs: the server hands out each position once; a run uses each sample once an epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.draws import WorkerDraws
from asgd.epochs import EpochOrders, Handout
from asgd.errors import InputError
from asgd.problems.make import make_problem
from asgd.rundir.columns import POSITION_COLUMNS, POSITIONS
from asgd.rundir.reader import read_run
from asgd.rundir.tables import read_table, write_table
from asgd.simulation.simulate import simulate
from asgd.verify import record_findings, replay_findings
from tests.support.faults import Crowd
from tests.support.invariants import check_epochs


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    steps=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 15)), max_size=80
    ),
)
def test_every_position_is_used_once_despite_faults(
    sizes: list[int], steps: list[tuple[int, int, int]]
) -> None:
    handout = Handout(sizes)
    held: dict[int, tuple[int, int, int]] = {}
    used: list[list[int]] = [[] for _ in sizes]
    saved = handout.state(), [list(one) for one in used], [0] * 6
    log: list[tuple[int, int, int, int]] = []
    number = [0] * 6

    def apply(worker: int) -> None:
        entry = (worker, *held.pop(worker))
        handout.use(*entry)
        log.append(entry)
        _, _, position, size = entry
        used[worker % len(sizes)] += range(position, position + size)

    for kind, worker, size in steps:
        if kind == 0 and worker in held:  # the worker dies
            handout.give_back(worker, held.pop(worker)[0])
        elif kind == 1:  # a checkpoint
            saved, log = (handout.state(), [list(one) for one in used], list(number)), []
        elif kind == 2:  # the server dies and restarts with or without its log
            handout = Handout(sizes)
            handout.restore(saved[0])
            used, held = [list(one) for one in saved[1]], {}
            kept = log if size > 7 else []
            log = []
            for entry in kept:
                handout.use(*entry)
                log.append(entry)
                used[entry[0] % len(sizes)] += range(entry[2], entry[2] + entry[3])
        elif worker in held:
            apply(worker)
        else:
            number[worker] += 1
            held[worker] = (number[worker], *handout.take(worker, number[worker], size))
            part = sizes[worker % len(sizes)]
            _, first, length = held[worker]
            assert 1 <= length <= size
            assert first // part == (first + length - 1) // part  # within one epoch
    for worker in list(held):
        apply(worker)
    # A worker that continues alone fills the gaps first.
    for part in range(len(sizes)):
        for step in range(200):
            held[part] = (10**6 + step, *handout.take(part, 10**6 + step, 4))
            apply(part)
        end = handout.state()[part].end
        assert sorted(used[part]) == list(range(end))
        assert handout.state()[part].open == []


def test_a_position_cannot_be_used_twice() -> None:
    handout = Handout([10])
    handout.use(0, 0, 4, 6)
    handout.use(1, 0, 0, 2)
    assert handout.state()[0].open == [(2, 2)]
    with pytest.raises(ValueError, match="positions 4 to 9 of part 0 were used before"):
        handout.use(0, 1, 4, 6)
    assert handout.take(0, 2, 3) == (2, 2)
    assert handout.take(0, 3, 3) == (10, 3)


def test_orders_are_random_and_depend_on_the_seed_alone() -> None:
    part = np.arange(100, 150)
    orders, again = EpochOrders(3, [part]), EpochOrders(3, [part])
    first = [orders.batch(0, 50 * epoch, 50) for epoch in range(40)]
    for epoch in reversed(range(40)):  # other epochs in between change nothing
        np.testing.assert_array_equal(again.batch(7, 50 * epoch + 10, 5), first[epoch][10:15])
    assert all(sorted(order) == part.tolist() for order in first)
    assert len({tuple(order) for order in first}) == 40
    # The sum over places of place times sample is normal with a known variance: 4 standard errors.
    centred = np.arange(50) - 24.5
    z = (np.array(first) - 124.5) @ centred / (np.sum(centred**2) / np.sqrt(49))
    assert abs(z.mean()) < 4 / np.sqrt(40)
    assert abs(np.mean(z**2) - 1) < 4 * np.sqrt(2 / 40)
    assert not np.array_equal(EpochOrders(4, [part]).batch(0, 0, 50), first[0])


QUEUE = {"cluster": {"compute_time": {"law": "constant"}}, "simulation": {"service_time": 1e-3}}


def configure(updates: int = 700, **tables: dict[str, Any]) -> RunConfig:
    data = {
        "problem": {"kind": "logistic"},  # 569 samples
        "data": {"sampling": "epoch"},
        "optimizer": {"batch_size": 16},
        "cluster": {"workers": 5, "compute_time": {"law": "exponential"}},
        "run": {"updates": updates, "eval_every": 100},
    }
    own = {name: {**table, **tables.get(name, {})} for name, table in data.items()}
    return make_config({**tables, **own})


@pytest.mark.parametrize(
    ("tables", "epochs"),
    [
        ({}, 18),  # 569 = 35 * 16 + 9: 36 updates an epoch
        ({"data": {"shards": "by_label"}}, 15),  # 114 = 7 * 16 + 2; the slowest part counts
        ({"optimizer": {"batch_schedule": {"at": [300], "values": [37]}}}, 32),
        ({"cluster": {"schedule": "uniform"}}, 18),
        ({"simulation": {"staleness": "poisson"}}, 19),
        ({"optimizer": {"batch_size": 1000}}, 680),  # a batch is an epoch
        (QUEUE, 18),
    ],
    ids=["shared", "by_label", "schedule", "uniform", "independent", "large", "queue"],
)
def test_a_simulated_run_uses_every_sample_once_an_epoch(tmp_path, tables, epochs):
    config = configure(**tables)
    run = read_run(simulate(config, tmp_path / "run"))
    assert min(whole for whole, _ in check_epochs(run, make_problem(config))) >= epochs
    assert record_findings(run) == []
    if config.optimizer.batch_size == 16:
        assert replay_findings(run, {}) == []


@pytest.mark.parametrize("data", [{}, {"shards": "partition"}], ids=["shared", "partition"])
def test_a_simulation_hands_out_the_same_positions_as_a_server(tmp_path, data):
    config = configure(200, data=data, optimizer={"batch_schedule": {"at": [90], "values": [5]}})
    run = read_run(simulate(config, tmp_path / "run"))
    crowd = Crowd(config)
    crowd.join_all()
    for worker in run.trace["worker"].tolist():
        crowd.push(worker)
    record = crowd.server.drain()
    for name in POSITION_COLUMNS:
        np.testing.assert_array_equal(record.positions[name], run.positions[name])
    for name in ("worker", "sequence", "read_version", "batch_size"):
        np.testing.assert_array_equal(record.trace[name], run.trace[name])
    np.testing.assert_allclose(crowd.server.parameters, run.parameters, rtol=1e-12)


def test_epochs_allow_one_local_step_only(tmp_path):
    local = {"local_steps": 1, "local_learning_rate": 0.05}
    run = read_run(simulate(configure(100, optimizer=local), tmp_path / "run"))
    check_epochs(run, make_problem(run.config))
    assert replay_findings(run, {}) == []
    with pytest.raises(InputError) as error:
        configure(100, optimizer={**local, "local_steps": 2})
    assert str(error.value) == (
        "configuration: optimizer.local_steps = 2 does not go with data.sampling = 'epoch', which "
        "hands out the samples of one batch: expected data.sampling = 'replacement'"
    )


def test_sampling_with_replacement_uses_no_positions(tmp_path):
    config = configure(100, data={"sampling": "replacement"})
    run = read_run(simulate(config, tmp_path / "run"))
    assert run.positions.empty
    assert not (run.path / POSITIONS).exists()
    draws = WorkerDraws(config, make_problem(config))
    np.testing.assert_array_equal(draws.batch(1, 2, 16, 0), draws.batch(1, 2, 16, 99))


def test_positions_used_twice_or_missing_are_found(tmp_path):
    config = configure(60)
    run = read_run(simulate(config, tmp_path / "run"))
    path = run.path / POSITIONS / "part-000000000000.parquet"
    rows = read_table(path, POSITION_COLUMNS, 60)
    changed = {name: column.copy() for name, column in rows.items()}
    changed["position"][7] = changed["position"][3] + 2
    write_table(path, changed, POSITION_COLUMNS)
    (found,) = record_findings(read_run(run.path))
    assert "was used twice" in found
    write_table(path, {name: column[:-1] for name, column in rows.items()}, POSITION_COLUMNS)
    (found,) = record_findings(read_run(run.path))
    assert "do not belong to the gradients in the trace" in found
    path.unlink()
    assert record_findings(read_run(run.path))
