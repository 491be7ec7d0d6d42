"""Schedules by update number, and what the configuration accepts as one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asgd.config import make_config
from asgd.errors import InputError
from asgd.schedules import Schedule, batch_schedule, learning_rate_schedule


def test_value_holds_from_its_update_on() -> None:
    schedule = Schedule(1.0, [2, 5], [0.5, 0.25])
    expected = [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert [schedule(update) for update in range(7)] == expected
    np.testing.assert_array_equal(schedule.array(7), expected)


def test_constant() -> None:
    schedule = Schedule(3)
    assert schedule(0) == schedule(10**9) == 3
    np.testing.assert_array_equal(schedule.array(3), [3, 3, 3])


def test_from_configuration() -> None:
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
        ({"at": [1, 2], "values": [0.1]}, "at has 2 entries and values 1"),
        ({"at": [5, 5], "values": [0.1, 0.2]}, "growing"),
        ({"at": [5], "values": [-0.1]}, "values"),
        ({"at": [0], "values": [0.1]}, "at"),
        ({"at": [5], "value": [0.1]}, "value: unknown key"),
    ],
)
def test_impossible_schedules_are_refused(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make_config({"optimizer": {"learning_rate_schedule": schedule}})
    assert "optimizer.learning_rate_schedule" in str(error.value)
