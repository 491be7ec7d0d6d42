"""Schedules by update number, and the schedules that a configuration accepts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import optimal_batch_schedule
from asgd.config.make import load_config, make_config
from asgd.errors import InputError
from asgd.rundir.reader import read_run
from asgd.schedules import (
    Schedule,
    batch_schedule,
    learning_rate_schedule,
    with_batch_sizes,
)
from asgd.simulation.simulate import simulate


def test_value_holds_from_its_update_on() -> None:
    schedule = Schedule(1.0, [2, 5], [0.5, 0.25])
    expected = [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert [schedule(update) for update in range(7)] == expected
    np.testing.assert_array_equal(schedule.array(7), expected)


def test_a_constant_schedule() -> None:
    schedule = Schedule(3)
    assert schedule(0) == schedule(10**9) == 3
    np.testing.assert_array_equal(schedule.array(3), [3, 3, 3])


def test_schedules_of_a_configuration() -> None:
    optimizer = make_config(
        {
            "optimizer": {
                "learning_rate": 0.1,
                "batch_size": 2,
                "learning_rate_schedule": {"at": [10], "values": [0.01]},
                "batch_schedule": {"at": [5, 7], "values": [4, 8]},
            }
        }
    ).optimizer
    rate, batch = learning_rate_schedule(optimizer), batch_schedule(optimizer)
    assert [rate(9), rate(10)] == [0.1, 0.01]
    assert [batch(4), batch(5), batch(7)] == [2, 4, 8]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"at": [1, 2], "values": [0.1]}, "at has 2 entries, values has 1"),
        ({"at": [5, 5], "values": [0.1, 0.2]}, "expected increasing update numbers"),
        ({"at": [5], "values": [-0.1]}, "values"),
        ({"at": [0], "values": [0.1]}, "at"),
        ({"at": [5], "value": [0.1]}, "value: unknown key"),
    ],
)
def test_impossible_schedules_are_refused(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make_config({"optimizer": {"learning_rate_schedule": schedule}})
    assert "optimizer.learning_rate_schedule" in str(error.value)


def test_a_run_follows_the_optimal_schedule(tmp_path: Path) -> None:
    batches = optimal_batch_schedule(2.0, 4.0, 0.01, 0.75, 400, budget=1600)
    assert batches[0] == 1 < batches[-1]
    tables = {
        "problem": {"kind": "quadratic"},
        "optimizer": {"learning_rate": 0.01, "batch_size": 7},
        "cluster": {"workers": 4},
        "run": {"updates": 400},
    }
    config = with_batch_sizes(make_config(tables), batches)
    np.testing.assert_array_equal(batch_schedule(config.optimizer).array(400), batches)
    run = read_run(simulate(config, tmp_path / "run"))
    np.testing.assert_array_equal(run.trace["batch_size"], batches[run.trace["read_version"]])
    assert run.trace["staleness"].max() > 0
    assert load_config(run.path / "config.json") == config
    read = Counter({0: 4} | dict.fromkeys(range(1, 400), 1))
    under_way = [*(read - Counter(run.trace["read_version"].tolist())).elements()]
    assert len(under_way) == 3
    assert run.trace["batch_size"].sum() == 1600 - (batches[under_way] - batches[0]).sum() == 1514
    assert with_batch_sizes(config, [3, 3]).optimizer.batch_schedule.at == []


@pytest.mark.parametrize("sizes", [[], [1.5], [[1, 2]], [0, 1], [2, 0]])
def test_sequences_that_are_no_batch_sizes_are_refused(sizes: Any) -> None:
    with pytest.raises(InputError, match=r"batch_size|batch_schedule"):
        with_batch_sizes(make_config(), sizes)
