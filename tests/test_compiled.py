"""Compiled loops: their statistics, and that they work where nothing can be kept on disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis.compiled import compiled, moments

ROOT = Path(__file__).parents[1]
# A short simulation that says how often a loop came from the disk, and its result.
SIMULATION = """
import warnings; warnings.simplefilter("error")
import sys, analysis.compiled as loops
from analysis.sme import sme_asgd
from asgd.problems.scalar import Quadratic
assert loops.__file__.startswith(sys.argv[1]), loops.__file__
final = sme_asgd(Quadratic(), 0.1, 0.5, 3, 10, 0).final
hits = sum(sum(f.stats.cache_hits.values()) for f in (loops.kick, loops.relax, loops.moments))
print(hits, final.tobytes().hex())
"""


def simulate(directory: Path, home: Path) -> tuple[int, str]:
    """Run the simulation with the packages of a directory; nothing may be printed as an error."""
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
    return int(hits), final


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
    first, expected = simulate(installation, tmp_path)
    assert simulate(installation, tmp_path) == (6, expected)
    assert first == 0
    # a torn file: as after a crash in the middle of writing
    torn = list((installation / "analysis" / "__pycache__").glob("compiled.kick-*.nbi"))
    assert len(torn) == 1
    torn[0].write_bytes(torn[0].read_bytes()[:10])
    assert simulate(installation, tmp_path) == (4, expected)


def test_a_read_only_installation_keeps_loops_in_the_cache_of_the_user(
    installation: Path, tmp_path: Path
) -> None:
    # a file where the directory would be stops root too
    (installation / "analysis" / "__pycache__").write_text("")
    first, expected = simulate(installation, tmp_path)
    assert (first, simulate(installation, tmp_path)) == (0, (6, expected))
    assert list((tmp_path / ".cache" / "numba").rglob("compiled.kick-*.nbc"))


def test_nowhere_to_keep_loops(installation: Path) -> None:
    (installation / "analysis" / "__pycache__").write_text("")
    hits, expected = simulate(installation, Path("/dev/null"))
    assert hits == 0
    (installation / "analysis" / "__pycache__").unlink()
    assert simulate(installation, Path("/dev/null")) == (0, expected)


def test_an_error_of_a_loop_is_told() -> None:
    with pytest.raises(Exception, match="no_such_name"):

        @compiled("{0}[::1]")
        def broken(x: object) -> object:
            return no_such_name  # type: ignore[name-defined] # noqa: F821


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("size", [1, 7, 10_001])
def test_moments(dtype: type, size: int) -> None:
    """In float64 whatever the precision of the numbers, also where the mean is large."""
    values = (1e3 + np.random.default_rng(size).standard_normal(size)).astype(dtype)
    exact = values.astype(np.longdouble)
    mean, squares, variance = moments(values)
    np.testing.assert_allclose(mean, float(exact.mean()), rtol=1e-14)
    np.testing.assert_allclose(squares, float((exact**2).mean()), rtol=1e-14)
    np.testing.assert_allclose(variance, float(exact.var()), rtol=1e-9)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [0, 8, 99])
def test_moments_of_a_diverged_path(value: float, place: int) -> None:
    values = np.ones(100)
    values[place] = value
    mean, squares, variance = moments(values)
    np.testing.assert_equal(mean, value)
    np.testing.assert_equal(squares, abs(value))
    assert np.isnan(variance)
