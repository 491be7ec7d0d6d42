"""The import arrows: asgd.__main__ -> {cluster, analysis} -> asgd, and who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RAY = {
    "cluster/actors.py",
    "cluster/fleet.py",
    "cluster/nodes.py",
    "cluster/transport.py",
    "cluster/local_ray/causes.py",
    "cluster/local_ray/vitals.py",
    "cluster/launch.py",
    "cluster/metrics.py",
    "cluster/local_ray/session.py",
}
DOOR = "asgd/__main__.py"
FILES = sorted(
    str(path.relative_to(ROOT))
    for package in ("asgd", "cluster", "analysis")
    for path in (ROOT / package).rglob("*.py")
)


def imports(file: str) -> set[str]:
    """Return the dotted names a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def packages(file: str) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


@pytest.mark.parametrize("file", FILES)
def test_arrows(file: str) -> None:
    used, own = packages(file), file.split("/")[0]
    assert "ray" not in used or file in RAY
    assert "matplotlib" not in used or file.startswith("analysis/figures/")
    assert "numba" not in used or file == "analysis/models/compiled.py"
    assert "asgd.__main__" not in imports(file)
    if own == "asgd" and file != DOOR:
        assert not used & {"cluster", "analysis"}
    if own == "cluster":
        assert "analysis" not in used
    if own == "analysis":
        assert not used & {"cluster", "ray"}


def test_only_one_module_knows_how_tables_are_held() -> None:
    """What Arrow's threads read must not be memory of Python, see there."""
    users = {file for file in FILES if "pyarrow" in packages(file)}
    assert users == {"asgd/rundir/tables.py"}
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in FILES}
    assert not [
        file for file, text in sources.items() if "read_parquet" in text or "to_parquet" in text
    ]


def test_only_the_trace_makes_frames_in_the_model() -> None:
    users = {file for file in FILES if "pandas" in packages(file)}
    assert {file for file in users if file.startswith("asgd/")} == {"asgd/rundir/reader.py"}


@pytest.mark.parametrize(
    "package", ["asgd", "cluster", "analysis", "asgd.config", "cluster.core.server"]
)
def test_imports_are_light(package: str) -> None:
    code = f"import sys, {package}; print(*sys.modules)"
    listing = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(listing.stdout.split())
    assert not loaded & {"ray", "matplotlib", "sklearn", "numba"}
