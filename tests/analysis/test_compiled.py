"""Compiled loops: their results, and that they work where nothing can be cached on disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis.models.compiled import (
    choose,
    compiled,
    first_come,
    first_due,
    moments,
    read_update,
    serve,
    tally,
    use_ranks,
)
from analysis.models.sme_asgd import sme_asgd
from analysis.profile.queueing import MeasuredTimes, TimeTable
from asgd.delays import ComputeTime
from asgd.problems.scalar import Quadratic

ROOT = Path(__file__).parents[2]
# A short simulation that prints how many loops came from the cache on disk, and its result.
SIMULATION = """
import warnings; warnings.simplefilter("error")
import sys, analysis.models.compiled as loops
from analysis.models.sme_asgd import sme_asgd
from asgd.problems.scalar import Quadratic
assert loops.__file__.startswith(sys.argv[1]), loops.__file__
final = sme_asgd(Quadratic(), 0.1, 0.5, 3, 10, 0).final
hits = sum(sum(f.code.stats.cache_hits.values()) for f in (loops.kick, loops.relax, loops.moments))
print(hits, final.tobytes().hex())
"""


def simulate(directory: Path, home: Path) -> int:
    """Run the simulation with the packages of a directory; return how many loops came from disk.

    Checks that it prints no error and has the same result as in this process.
    """
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(directory)}
    environment.pop("XDG_CACHE_HOME", None)
    environment.pop("NUMBA_CACHE_DIR", None)
    result = subprocess.run(
        [sys.executable, "-B", "-c", SIMULATION, str(directory)],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    hits, final = result.stdout.split()
    assert final == sme_asgd(Quadratic(), 0.1, 0.5, 3, 10, 0).final.tobytes().hex()
    return int(hits)


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    """Return a directory with a copy of the packages, without compiled files."""
    for package in ("asgd", "analysis"):
        source = ROOT / package
        shutil.copytree(
            source, tmp_path / "site" / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path / "site"


def test_loops_are_kept_beside_the_source(installation: Path, tmp_path: Path) -> None:
    assert simulate(installation, tmp_path) == 0
    assert simulate(installation, tmp_path) == 6
    # a truncated file, as after a crash during a write
    torn = list((installation / "analysis" / "models" / "__pycache__").glob("compiled.kick-*.nbi"))
    assert len(torn) == 1
    torn[0].write_bytes(torn[0].read_bytes()[:10])
    assert simulate(installation, tmp_path) == 4


def test_a_read_only_installation_keeps_loops_in_the_cache_of_the_user(
    installation: Path, tmp_path: Path
) -> None:
    # a file in place of the directory stops root, too; permissions would not
    (installation / "analysis" / "models" / "__pycache__").write_text("")
    assert simulate(installation, tmp_path) == 0
    assert list((tmp_path / ".cache" / "numba").rglob("compiled.kick-*.nbc"))
    assert simulate(installation, tmp_path) == 6


def test_loops_run_where_no_cache_can_be_written(installation: Path) -> None:
    (installation / "analysis" / "models" / "__pycache__").write_text("")
    assert simulate(installation, Path("/dev/null")) == 0


def test_an_error_in_a_loop_is_raised() -> None:
    @compiled("{0}[::1]")
    def broken(x: object) -> object:
        return no_such_name  # type: ignore[name-defined] # noqa: F821

    with pytest.raises(Exception, match="no_such_name"):
        broken(np.zeros(1))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("size", [1, 7, 10_001])
def test_moments(dtype: type, size: int) -> None:
    """Moments are computed in float64 for either precision, also with a large mean."""
    values = (1e3 + np.random.default_rng(size).standard_normal(size)).astype(dtype)
    loss = values[::-1] ** 2
    exact, exact_loss = values.astype(np.longdouble), loss.astype(np.longdouble)
    mean, squares, loss_mean, loss_variance = moments(values, loss)
    np.testing.assert_allclose(mean, float(exact.mean()), rtol=1e-14)
    np.testing.assert_allclose(squares, float((exact**2).mean()), rtol=1e-14)
    np.testing.assert_allclose(loss_mean, float(exact_loss.mean()), rtol=1e-14)
    np.testing.assert_allclose(loss_variance, float(exact_loss.var()), rtol=1e-9)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [0, 8, 99])
def test_moments_of_a_diverged_path(value: float, place: int) -> None:
    values = np.ones(100)
    values[place] = value
    mean, squares, loss_mean, loss_variance = moments(values, values)
    np.testing.assert_equal([mean, loss_mean], [value, value])
    np.testing.assert_equal(squares, abs(value))
    assert np.isnan(loss_variance)


@pytest.mark.parametrize("workers", [1, 5])
def test_choice_of_a_snapshot(workers: int) -> None:
    """A number chooses by its place in the summed hazards; if all are 0, the oldest is chosen."""
    paths, length, rng = 5_000, 7, np.random.default_rng(workers)
    ages = rng.integers(length + 3, size=(paths, workers))
    hazard = rng.random((workers, length)) * (rng.random((workers, length)) < 0.3)
    hazard[:, 0], hazard[:, 1] = 0, 0.5
    uniform = rng.random(paths)
    uniform[:100] = 1 - 2.0**-53  # rounds to the whole sum; must choose the last one, not go past
    slot, later = np.empty((paths, 1), dtype=np.int64), ages.copy()
    choose(later, hazard, uniform[None], slot)
    cumulative = np.cumsum(hazard[np.arange(workers), np.minimum(ages, length - 1)], axis=1)
    passed = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(axis=1)
    possible = cumulative[:, -1] > 0
    assert 0 < possible.sum() < paths
    expected = np.where(possible, np.minimum(passed, workers - 1), ages.argmax(axis=1))
    np.testing.assert_array_equal(slot[:, 0], expected)
    ages += 1
    ages[np.arange(paths), expected] = 0
    np.testing.assert_array_equal(later, ages)
    # several updates at once equal single ones
    numbers, several = rng.random((3, paths)), np.empty((paths, 3), dtype=np.int64)
    choose(later, hazard, numbers, several)
    for k in range(3):
        choose(ages, hazard, numbers[k : k + 1], slot)
        np.testing.assert_array_equal(slot[:, 0], several[:, k])
    np.testing.assert_array_equal(later, ages)


def test_the_first_due_has_the_turn() -> None:
    """It is due again after the interpolated quantile of a number; ties go to the lowest worker."""
    paths, workers, rng = 300, 4, np.random.default_rng(0)
    levels = np.array([0.0, 0.25, 0.5, 1.0])
    quantiles = np.cumsum(rng.random((workers, len(levels))), axis=1)
    due = rng.integers(5, size=(paths, workers)).astype(float)
    uniform, slot = rng.random(paths), np.empty(paths, dtype=np.int64)
    uniform[:4] = [*levels[:3].tolist(), 1 - 2.0**-53]
    first = due.argmin(axis=1)
    expected = due.copy()
    for path, worker in enumerate(first):
        expected[path, worker] += np.interp(uniform[path], levels, quantiles[worker])
    first_due(due, quantiles, levels, uniform, slot)
    np.testing.assert_array_equal(slot, first)
    np.testing.assert_allclose(due, expected, rtol=1e-14)


def test_snapshots_are_counted_by_worker_and_age() -> None:
    paths, workers, length, rng = 300, 4, 6, np.random.default_rng(0)
    ages, slot = rng.integers(length + 3, size=(paths, workers)), rng.integers(workers, size=paths)
    slot = np.stack([slot, rng.integers(workers, size=paths)], axis=1)
    used, visited = np.zeros((workers, length)), np.zeros((workers, length))
    expected = np.zeros((2, workers * length))
    later = ages.copy()
    tally(later, slot, used, visited)
    for k in range(2):
        cell = np.minimum(ages, length - 1) + length * np.arange(workers)
        for row, cells in enumerate((cell[np.arange(paths), slot[:, k]], cell.ravel())):
            expected[row] += np.bincount(cells, minlength=workers * length)
        ages += 1
        ages[np.arange(paths), slot[:, k]] = 0
    np.testing.assert_array_equal([used.ravel(), visited.ravel()], expected)
    np.testing.assert_array_equal(later, ages)


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("kind", ["configured", "constant", "measured"])
def test_pushes_are_served_as_they_arrive(kind: str, workers: int) -> None:
    """The first arrival is served; a tie goes to the earliest read, then to the lowest number."""
    paths, updates, dead, service, rng = 20, 60, 0.25, 0.125, np.random.default_rng(workers)
    times = {
        "configured": ComputeTime("exponential", 1.0 + np.arange(workers)),
        "constant": ComputeTime("constant", np.ones(workers)),
        "measured": MeasuredTimes([rng.integers(1, 4, 3 + i) / 4 for i in range(workers)]),
    }[kind]
    table = TimeTable.of(times)
    drawn = table.draw(updates * paths, rng).reshape(updates, paths)
    arrival = rng.integers(3, size=(paths, workers)) / 4
    since, now = np.zeros((paths, workers), dtype=np.int64), np.zeros(paths)
    heap = np.argsort(arrival, axis=1, kind="stable")
    slot = np.empty((paths, updates), dtype=np.int64)
    expected, due, read, busy = np.empty_like(slot), arrival.copy(), since.copy(), now.copy()
    for k in range(updates):
        first = np.empty(paths, dtype=np.int64)
        first_come(due, read, first)
        for path, i in enumerate(first.tolist()):
            number = drawn[k, path]
            if kind == "measured":
                seconds = times.samples[i][int(number * len(times.samples[i]))]
            else:
                seconds = times.mean[i] * number
            busy[path] = max(busy[path], due[path, i]) + service
            due[path, i], read[path, i] = busy[path] + seconds + dead, k + 1
        expected[:, k] = first
    for half in (slice(0, 25), slice(25, updates)):
        part = np.empty((paths, half.stop - half.start), dtype=np.int64)
        numbers = table.times, table.begin, table.size, drawn[half]
        serve(heap, arrival, since, now, *numbers, dead, service, half.start, part)
        slot[:, half] = part
    np.testing.assert_array_equal(slot, expected)
    np.testing.assert_array_equal(arrival, due)
    np.testing.assert_array_equal(now, busy)


def test_snapshots_at_ranks_by_age() -> None:
    rng, paths, workers, updates = np.random.default_rng(0), 30, 5, 40
    order = np.stack([rng.permutation(workers) for _ in range(paths)])
    rank = rng.integers(workers, size=(paths, updates))
    expected, lists = np.empty_like(rank), order.tolist()
    for path, mine in enumerate(lists):
        for k in range(updates):
            mine.insert(0, mine.pop(rank[path, k]))
            expected[path, k] = mine[0]
    slot = np.empty_like(rank)
    use_ranks(order, rank, slot)
    np.testing.assert_array_equal(slot, expected)
    np.testing.assert_array_equal(order, lists)


@pytest.mark.parametrize("dim", [1, 3])
def test_moments_of_one_update(dim: int) -> None:
    """x' = x - A s + k + xi, copied to a slot: compared with matrices over all slots."""
    runs, slots, rng = 50, 4, np.random.default_rng(dim)
    root = rng.standard_normal((runs, slots * dim, slots * dim))
    joint = root @ root.swapaxes(1, 2)
    mean, noise = rng.standard_normal((runs, slots, dim)), rng.standard_normal((runs, dim, dim))
    noise = noise @ noise.swapaxes(1, 2)
    pull, offset = rng.random(dim), rng.standard_normal(dim)
    read, write = rng.integers(1, slots, runs), rng.integers(1, slots, runs)
    blocks = (runs, slots, dim, slots, dim)
    cov = joint.reshape(blocks).swapaxes(2, 3).copy()
    new_mean, own = mean.copy(), noise.copy()
    read_update(new_mean, cov, read, write, pull, offset, own)
    for r in range(runs):
        step = np.eye(slots * dim).reshape(slots, dim, slots, dim)
        step[0, :, read[r]] -= np.diag(pull)
        step[write[r]] = step[0]
        step = step.reshape(slots * dim, slots * dim)
        pushed = np.zeros((slots, dim))
        pushed[[0, write[r]]] = offset
        expected = step @ joint[r] @ step.T
        hit = np.zeros(slots)
        hit[[0, write[r]]] = 1
        expected += np.kron(np.outer(hit, hit), noise[r])
        np.testing.assert_allclose(
            new_mean[r].ravel(), step @ mean[r].ravel() + pushed.ravel(), rtol=1e-12, atol=1e-12
        )
        got = cov[r].swapaxes(1, 2).reshape(slots * dim, -1)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-11)
        np.testing.assert_array_equal(own[r], cov[r, 0, 0])
