"""Compute times have the configured law, mean and coefficient of variation."""

from __future__ import annotations

import numpy as np
import pytest

from asgd.config.make import make_config
from asgd.delays import ComputeTime

SIZE = 40_000


def law_of(workers=2, **compute_time) -> ComputeTime:
    config = make_config({"cluster": {"workers": workers, "compute_time": compute_time}})
    return ComputeTime.from_config(config.cluster)


@pytest.mark.parametrize(
    ("law", "variation", "expected"),
    [
        ("exponential", 0.3, 1.0),
        ("gamma", 0.3, 0.3),
        ("gamma", 2.0, 2.0),
        ("lognormal", 0.5, 0.5),
    ],
)
def test_mean_and_coefficient_of_variation(law, variation, expected):
    compute = law_of(law=law, mean=[0.02, 0.5], variation=variation)
    for worker, mean in enumerate((0.02, 0.5)):
        times = compute.draw_many(worker, SIZE, np.random.default_rng(worker)) / mean
        assert times.min() > 0
        assert abs(times.mean() - 1.0) < 4.0 * times.std() / np.sqrt(SIZE)
        squares = (times - 1.0) ** 2
        assert abs(squares.mean() - expected**2) < 4.0 * squares.std() / np.sqrt(SIZE)


def test_gamma_of_variation_one_is_exponential():
    rng = np.random.default_rng(0)
    times = law_of(law="gamma", mean=1.0, variation=1.0).draw_many(0, SIZE, rng)
    for t in (0.1, 1.0, 3.0):
        p = np.exp(-t)
        assert abs((times > t).mean() - p) < 4.0 * np.sqrt(p * (1 - p) / SIZE)


def test_constant_and_none():
    rng = np.random.default_rng(0)
    assert law_of(law="constant", mean=0.25).draw_many(1, 3, rng).tolist() == [0.25] * 3
    assert law_of(law="none", mean=0.25).draw_many(1, 3, rng).tolist() == [0.0] * 3


def test_one_mean_serves_every_worker():
    assert law_of(workers=3, law="exponential", mean=0.1).mean.tolist() == [0.1, 0.1, 0.1]


def test_only_the_exponential_law_is_memoryless():
    laws = ("none", "constant", "exponential", "gamma", "lognormal")
    assert [law for law in laws if law_of(law=law).memoryless] == ["exponential"]


def test_times_drawn_together_equal_times_drawn_one_by_one():
    for law in ("exponential", "gamma", "lognormal"):
        compute = law_of(law=law)
        first = compute.draw_many(0, 5, np.random.default_rng(3))
        rng = np.random.default_rng(3)
        again = [compute.draw_many(0, 1, rng)[0] for _ in range(5)]
        np.testing.assert_array_equal(first, again)
