import re
import tracemalloc
from functools import partial

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import analysis
from analysis.models import memory
from analysis.models.ensemble import (
    QUANTILE_PATHS,
    _loss_quantiles,
    _quantile_paths,
    per_update,
    run_ensemble,
)
from analysis.models.memory import BLOCK_SCALARS, block_sizes
from asgd.config.make import make_config
from asgd.errors import InputError
from asgd.problems.make import make_problem
from asgd.problems.scalar import Quadratic
from tests.support.plugins import Threaded


class Walk:
    """A random walk that can remember every point it visits."""

    def __init__(self, x, rng, seen=None):
        self.x, self.rng, self.seen = x, rng, seen
        self.remember()

    def remember(self):
        if self.seen is not None:
            self.seen.append(self.x.copy())

    def step(self, k):
        self.x += 0.1 * self.rng.standard_normal(self.x.shape)
        self.remember()

    def position(self):
        return self.x


class Bowl(Quadratic):
    """f = |x|^2 over R^3."""

    dim = 3

    def initial_point(self, rng):
        return rng.standard_normal(3)

    def loss(self, x):
        return (x * x).sum(axis=-1)


class Still(Walk):
    def step(self, k):
        pass


class Failing(Walk):
    def step(self, k):
        raise RuntimeError("broken model")


class Exploding(Walk):
    def step(self, k):
        self.x *= 1e200


def test_statistics_are_those_of_all_paths():
    seen = []
    paths, updates = 14_001, 5
    ensemble = run_ensemble(
        lambda x, rng: Walk(x, rng, seen), Bowl(), updates, paths, 3, "walk", threads=1
    )
    assert len(seen) == (updates + 1) * len(block_sizes(paths, 3)) > 2 * (updates + 1)
    x = np.concatenate([seen[i : i + updates + 1] for i in range(0, len(seen), updates + 1)], 1)
    loss = (x * x).sum(axis=-1)
    np.testing.assert_array_equal(ensemble.update, np.arange(updates + 1))
    np.testing.assert_allclose(ensemble.mean, x.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(ensemble.second_moment, (x * x).mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(ensemble.loss_mean, loss.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(ensemble.loss_std, loss.std(axis=1), rtol=1e-12, atol=1e-12)
    # the quantiles are those of a part of the paths; their levels among all have a known error
    level = (loss[1:, :, None] <= ensemble.loss_quantiles[1:, None, :]).mean(axis=1)
    q = ensemble.quantile_levels
    assert np.all(np.abs(level - q) < 4 * np.sqrt(q * (1 - q) / QUANTILE_PATHS))
    np.testing.assert_array_equal(ensemble.final, x[-1])
    assert ensemble.paths == paths


def test_moments_can_be_left_out_and_change_nothing_else():
    def walk(**options):
        return run_ensemble(Walk, Bowl(), 5, 1_000, 3, "walk", **options)

    full, lean = walk(), walk(moments=False)
    assert lean.mean.shape == lean.second_moment.shape == (0, 3)
    np.testing.assert_array_equal(lean.loss_mean, full.loss_mean)
    np.testing.assert_array_equal(lean.loss_quantiles, full.loss_quantiles)
    np.testing.assert_array_equal(lean.final, full.final)


@pytest.mark.parametrize("paths", [QUANTILE_PATHS, QUANTILE_PATHS // 3])
def test_quantiles_of_few_paths_are_exact(paths):
    seen = []
    ensemble = run_ensemble(
        lambda x, rng: Walk(x, rng, seen), Bowl(), 2, paths, 3, "walk", threads=1
    )
    x = np.concatenate([seen[i : i + 3] for i in range(0, len(seen), 3)], 1)
    levels = ensemble.quantile_levels
    expected = np.quantile((x * x).sum(axis=-1), levels, axis=1, method="weibull").T
    np.testing.assert_allclose(ensemble.loss_quantiles, expected)


def test_a_band_from_few_paths_contains_a_new_path_with_its_probability():
    """With 19 paths the 5 % and 95 % quantiles are the extremes; 5 % of paths are beyond each."""
    paths, trials = 19, 3000
    losses = np.random.default_rng(0).standard_normal((trials, paths + 1))
    low, high = _loss_quantiles(losses[:, :paths].copy(), np.array([0.05, 0.95])).T
    inside = np.mean((losses[:, -1] >= low) & (losses[:, -1] <= high))
    assert abs(inside - 0.9) < 4 * np.sqrt(0.9 * 0.1 / trials)


def test_memory_of_statistics_does_not_grow_with_the_paths():
    """Ten times the paths keep as many losses; only their final points, subtracted here, grow."""

    def peak(paths):
        updates = 400
        options = {"initial": [1.0], "threads": 1}
        tracemalloc.start()
        run_ensemble(Still, Quadratic(), updates, paths, 0, "walk", **options)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used - 8 * paths

    few, many = peak(40_000), peak(400_000)
    # the final points, the state of one block, and 2 * 400 moments of each block
    assert many - few < 3_000_000
    assert few > 8 * 400 * QUANTILE_PATHS


def test_quantile_paths_lie_in_every_block():
    paths = 123_457
    kept = _quantile_paths(paths)
    assert len(np.unique(kept)) == QUANTILE_PATHS
    counts = np.histogram(kept, np.cumsum([0, *block_sizes(paths, 1)]))[0]
    share = np.array(block_sizes(paths, 1)) * QUANTILE_PATHS / paths
    assert np.all(np.abs(counts - share) <= 1)


@pytest.mark.parametrize("problem", [Quadratic(), Bowl()])
def test_number_of_threads_does_not_matter(problem):
    runs = [
        run_ensemble(Walk, problem, 20, 45_000, 11, "walk", threads=threads)
        for threads in (1, 2, 3)
    ]
    for other in runs[1:]:
        for name in ("mean", "second_moment", "loss_mean", "loss_std", "loss_quantiles", "final"):
            np.testing.assert_array_equal(getattr(runs[0], name), getattr(other, name))


def test_seed_and_name_choose_the_numbers():
    def final(seed, name):
        return run_ensemble(Walk, Quadratic(), 3, 10, seed, name).final

    np.testing.assert_array_equal(final(1, "walk"), final(1, "walk"))
    assert not np.any(final(1, "walk") == final(2, "walk"))
    assert not np.any(final(1, "walk") == final(1, "other"))


def test_recorded_updates():
    every = run_ensemble(Walk, Quadratic(), 10, 100, 0, "walk")
    some = run_ensemble(Walk, Quadratic(), 10, 100, 0, "walk", record=[7, 2])
    np.testing.assert_array_equal(some.update, [2, 7])
    np.testing.assert_array_equal(some.mean, every.mean[[2, 7]])
    np.testing.assert_array_equal(some.final, every.final)


def test_without_quantiles():
    ensemble = run_ensemble(Walk, Quadratic(), 4, 10, 0, "walk", quantile_levels=())
    assert ensemble.loss_quantiles.shape == (5, 0)


def test_initial_point():
    default = run_ensemble(Walk, Bowl(), 1, 10, 5, "walk")
    again = run_ensemble(Walk, Bowl(), 1, 10, 5, "other")
    np.testing.assert_array_equal(default.mean[0], again.mean[0])
    given = run_ensemble(Walk, Bowl(), 1, 10, 5, "walk", initial=[1.0, 2.0, 3.0])
    np.testing.assert_array_equal(given.mean[0], [1.0, 2.0, 3.0])


def test_several_initial_points_share_the_paths_and_the_quantiles():
    starts, paths = np.arange(15.0).reshape(5, 3), 45_003
    assert len(block_sizes(paths, 3)) > 2
    levels = (0.1, 0.3, 0.5, 0.7, 0.9)
    still = run_ensemble(Still, Bowl(), 1, paths, 5, "walk", initial=starts, quantile_levels=levels)
    found, counts = np.unique(still.final, axis=0, return_counts=True)
    np.testing.assert_array_equal(found, starts)
    assert np.ptp(counts) == 1
    np.testing.assert_array_equal(still.loss_quantiles[1], (starts**2).sum(axis=1))


def test_precision_of_the_paths():
    ensemble = run_ensemble(Walk, Quadratic(), 2, 10, 0, "walk", dtype=np.float32)
    assert ensemble.final.dtype == np.float32
    assert ensemble.mean.dtype == np.float64


@pytest.mark.parametrize("paths", [1, 15, 100, 9_999, 20_000, 123_457])
@pytest.mark.parametrize("dim", [1, 10, 650, 100_000])
def test_blocks_are_large_enough_and_complete(paths, dim):
    sizes = block_sizes(paths, dim)
    assert sum(sizes) == paths
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == 1 or min(sizes) * dim >= BLOCK_SCALARS


def test_large_states_get_small_blocks():
    assert max(block_sizes(100, 100_000, state_copies=200)) * 100_000 * 200 <= 2 * 2**26


def test_progress_ends_at_the_total():
    calls = []
    run_ensemble(
        Walk, Quadratic(), 50, 30_000, 0, "walk", progress=lambda *call: calls.append(call)
    )
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (50 * len(block_sizes(30_000, 1)),) * 2


def test_a_failing_model_fails_the_call():
    with pytest.raises(RuntimeError, match="broken model"):
        run_ensemble(Failing, Quadratic(), 50, 50_000, 0, "walk")


def test_divergence_is_reported_not_raised():
    ensemble = run_ensemble(Exploding, Quadratic(), 3, 30_000, 0, "walk")
    assert ensemble.loss_mean[0] == 1.0
    assert np.isinf(ensemble.loss_mean[-1])
    assert not np.isfinite(ensemble.loss_quantiles[-1]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record": [3, 11]}, "record = .* from 0 to 10"),
        ({"record": []}, "record = "),
        ({"initial": [1.0, 2.0]}, r"initial.shape = \(2,\): expected \(1,\)"),
        ({"initial": [[1.0, 2.0]]}, r"initial.shape = \(1, 2\): expected \(1,\)"),
        ({"paths": 0}, "paths = 0: expected a whole number >= 1"),
        ({"paths": 10**9}, "record = 11 updates .* 1000000000 paths: expected less than 4 GB"),
    ],
)
def test_unusable_options(options, message):
    arguments = {"updates": 10, "paths": 10, "seed": 0, "name": "walk"} | options
    with pytest.raises(InputError, match=message):
        run_ensemble(Walk, Quadratic(), **arguments)


def test_per_update():
    np.testing.assert_array_equal(per_update(0.5, 3, "eta"), [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(per_update([1, 2, 3], 3, "eta"), [1.0, 2.0, 3.0])
    for bad in ([1, 2], 0.0, [1, -1, 1], np.nan, np.ones((3, 1))):
        with pytest.raises(InputError, match="eta"):
            per_update(bad, 3, "eta")


def test_models_take_their_arguments_by_partial():
    seen = []
    run_ensemble(partial(Walk, seen=seen), Quadratic(), 2, 5, 0, "walk")
    assert [x.shape for x in seen] == [(5, 1)] * 3


class Wide(Bowl):
    """Many parameters."""

    dim = 20_000


def test_memory_is_announced_and_kept_to(caplog, monkeypatch):
    """The announced memory is the memory taken, whatever number of threads is asked for."""
    options = {"initial": np.zeros(Wide.dim), "record": [0, 2], "quantile_levels": ()}
    small = run_ensemble(Walk, Wide(), 2, 64, 3, "walk", threads=2, **options)
    assert not caplog.messages
    monkeypatch.setattr(memory, "ANNOUNCED_BYTES", 10**6)
    # 10.2 MB for all final points, 0.6 MB for the statistics of each of two threads and two more
    monkeypatch.setattr(memory, "STATISTICS_BYTES", 13 * 10**6)
    tracemalloc.start()
    again = run_ensemble(Walk, Wide(), 2, 64, 3, "walk", threads=64, **options)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    (said,) = caplog.messages
    announced = (
        float(re.fullmatch(r"walk: its paths take up to (\S+) GB of memory", said)[1]) * 2**30
    )
    assert 0.4 * announced < used < 1.1 * announced
    assert announced < 13 * 10**6 + 2 * 4 * 16 * 8 * Wide.dim  # the state of two blocks
    np.testing.assert_array_equal(small.mean, again.mean)


def test_a_single_block_uses_one_blas_thread() -> None:
    problem = make_problem(make_config({"problem": {"kind": "tests.support.plugins:Threaded"}}))
    Threaded.seen.clear()
    with threadpool_limits(2, user_api="blas"):
        analysis.sme_sgd(problem, 0.01, 10, 2, 0)
    assert set(Threaded.seen) == {1}
