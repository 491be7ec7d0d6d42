"""Random streams: draws depend only on the seed, the name and the address."""

from __future__ import annotations

import numpy as np
import pytest

from asgd.config.make import make_config
from asgd.draws import WorkerDraws
from asgd.problems.linear import LeastSquares
from asgd.streams import KeyedStream, standard_normals, stream


def test_streams_repeat_and_differ_by_name_and_seed():
    draws = {
        (seed, name): tuple(stream(seed, name).random(4))
        for seed in (0, 1)
        for name in ("initial", "schedule")
    }
    assert draws[0, "initial"] == tuple(stream(0, "initial").random(4))
    assert len(set(draws.values())) == 4


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("bits", [np.random.SFC64, np.random.PCG64, np.random.MT19937])
@pytest.mark.parametrize("shape", [(400_001, 1), (1,)])
def test_standard_normals_have_their_moments_and_tail(dtype, bits, shape):
    """Both precisions are tested, because float32 has its own method."""
    out, size = np.empty(shape, dtype), shape[0]
    z = standard_normals(out, np.random.Generator(bits(3)))
    assert z is out
    assert np.all(np.isfinite(z))
    z = z.reshape(-1).astype(float)
    if size > 1:
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(np.mean(z**power) - moment) < 4 * np.sqrt(variance / size)
        tail = 0.0026998
        assert abs(np.mean(np.abs(z) > 3) - tail) < 4 * np.sqrt(tail / size)
        half = size // 2  # the two numbers of a pair lie half an array apart
        for lag in (1, half, half + 1):
            assert abs(np.mean(z[lag:] * z[:-lag])) < 4 / np.sqrt(size - lag)


def test_keyed_draws_depend_on_the_address_alone():
    first, second = KeyedStream(3, "batch"), KeyedStream(3, "batch")
    addresses = [(w, s, v) for w in range(3) for s in (0, 1, 2**40) for v in (0, 7)]
    drawn = {address: tuple(first.at(*address).random(5)) for address in addresses}
    for address in reversed(addresses):
        second.at(*address).integers(10, size=3, dtype=np.int32)  # leaves half a word buffered
        assert tuple(second.at(*address).random(5)) == drawn[address]
    assert len(set(drawn.values())) == len(addresses)
    other = {tuple(KeyedStream(*key).at(0, 0).random(5)) for key in ((4, "batch"), (3, "time"))}
    assert len(other | {drawn[0, 0, 0]}) == 3


def test_neighbouring_addresses_are_uncorrelated():
    keyed = KeyedStream(0, "batch")
    table = np.array([[keyed.at(w, s).standard_normal() for s in range(200)] for w in range(100)])
    z = [
        np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1] * np.sqrt(99 * 200),
        np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1] * np.sqrt(100 * 199),
        table.mean() * np.sqrt(table.size),
    ]
    assert np.abs(z).max() < 4.0


def draws_of(seed=0, law="exponential", mean=0.01, workers=4, n=1797) -> WorkerDraws:
    compute = {"law": law, "mean": mean}
    return WorkerDraws(
        make_config(
            {"cluster": {"workers": workers, "compute_time": compute}, "run": {"seed": seed}}
        ),
        LeastSquares(np.zeros((n, 1)), np.zeros(n)),
    )


@pytest.mark.parametrize("size", [1, 16, 300, 5000])
def test_batches_do_not_depend_on_the_order_of_requests(size):
    forward, backward = draws_of(), draws_of()
    addresses = [(w, s) for w in (0, 3) for s in (0, 1, 63, 64, 200)]
    there = {a: forward.batch(*a, size).tolist() for a in addresses}
    for address in reversed(addresses):
        backward.batch(*address, 7)  # another size in between changes nothing
        assert backward.batch(*address, size).tolist() == there[address]
    assert len({tuple(batch[:1] + batch[-8:]) for batch in there.values()}) > len(addresses) / 2
    values = np.array(list(there.values()))
    assert values.shape == (len(addresses), size)
    assert values.min() >= 0
    assert values.max() < 1797


@pytest.mark.slow
def test_batches_of_different_sizes_share_nothing():
    draws = draws_of(n=10**9)
    small = np.concatenate([draws.batch(0, s, 8) for s in range(200)])
    large = np.concatenate([draws.batch(0, s, 16) for s in range(200)])
    assert len(np.unique(np.concatenate([small, large]))) > 0.999 * (small.size + large.size)


def test_batches_are_uniform():
    draws = draws_of(n=5)
    values = np.concatenate([draws.batch(w, s, 16) for w in range(4) for s in range(500)])
    counts = np.bincount(values, minlength=5)
    chi_square = ((counts - values.size / 5) ** 2 / (values.size / 5)).sum()
    assert chi_square < 4 + 4 * np.sqrt(2 * 4)


def test_iterated_compute_times_equal_single_ones():
    times, single = draws_of().all_compute_seconds(2), draws_of()
    assert all(next(times) == single.compute_seconds(2, s) for s in range(150))


def test_compute_times_depend_on_the_address_alone():
    one, other = draws_of(), draws_of()
    addresses = [(w, s) for w in range(4) for s in (0, 63, 64, 1000)]
    times = [one.compute_seconds(*a) for a in addresses]
    assert [other.compute_seconds(*a) for a in reversed(addresses)] == times[::-1]
    assert len(set(times)) == len(times)
    assert draws_of(seed=1).compute_seconds(0, 0) != times[0]
    sample = np.array([one.compute_seconds(1, s) for s in range(4000)])
    assert abs(sample.mean() / 0.01 - 1.0) < 4.0 / np.sqrt(4000)
