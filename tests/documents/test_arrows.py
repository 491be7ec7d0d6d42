"""The import arrows: asgd.__main__ -> {cluster, analysis} -> asgd, and the rooms inside each.

A room is a folder of a package, or a module beside the folders. A room on floor 1 imports no other
room of its package; every other room is one floor above the highest room that it imports.

`.venv/bin/python -m tests.documents.test_arrows` prints rooms, floors and arrows.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAY = {
    "cluster/actors.py",
    "cluster/fleet.py",
    "cluster/nodes.py",
    "cluster/transport.py",
    "cluster/local_ray/causes.py",
    "cluster/local_ray/vitals.py",
    "cluster/launch.py",
    "cluster/watch.py",
    "cluster/metrics.py",
    "cluster/local_ray/session.py",
    "cluster/local_ray/internals.py",
}
COMMAND_LINE = "asgd/__main__.py"
OPEN = "analysis/figures/__init__.py"  # `analysis.figures` is itself a public name
FILES = sorted(
    str(path.relative_to(ROOT))
    for package in ("asgd", "cluster", "analysis")
    for path in (ROOT / package).rglob("*.py")
)


def imports(file: str) -> set[str]:
    """Return the dotted names that a file imports, also inside functions."""
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


MOST_FLOORS = 7
# Rooms that must be on floor 1, and modules that a room must not import.
GROUND = {
    "asgd": {"arrays.py"},
    "analysis": {"models", "profile"},
    "cluster": {"core", "local_ray"},
}
CLOSED = {
    "cluster/core": ("cluster.sockets", "cluster.storage", "socket", "selectors", "mmap"),
    "analysis/figures": ("analysis.report", "analysis.planning", "scipy"),
}


def room(file: str) -> str:
    """Return the room of a file: its folder in the package, or the module itself."""
    return file.split("/")[1]


@cache
def uses(package: str) -> dict[str, set[str]]:
    """Return the files of its own package that each file imports, without the command line."""
    own = [file for file in FILES if file.startswith(f"{package}/") and file != COMMAND_LINE]
    own.remove(f"{package}/__init__.py")
    modules = {file.removesuffix(".py").replace("/", "."): file for file in own}
    modules |= {name.removesuffix(".__init__"): file for name, file in modules.items()}
    return {file: {modules[name] for name in imports(file) if name in modules} for file in own}


@cache
def plan(package: str) -> dict[str, set[str]]:
    """Return the rooms that each room of a package imports."""
    arrows: dict[str, set[str]] = defaultdict(set)
    for file, used in uses(package).items():
        arrows[room(file)] |= {room(other) for other in used} - {room(file)}
    return dict(arrows)


def floors(package: str) -> dict[str, int]:
    """Return the floor of each room of a package."""
    arrows, found = plan(package), dict[str, int]()

    def climb(one: str, below: tuple[str, ...]) -> int:
        assert one not in below, f"an import cycle: {' -> '.join((*below, one))}"
        if one not in found:
            found[one] = 1 + max((climb(other, (*below, one)) for other in arrows[one]), default=0)
        return found[one]

    for one in arrows:
        climb(one, ())
    return found


@pytest.mark.parametrize("package", ["asgd", "cluster", "analysis"])
def test_files_have_no_import_cycle(package: str) -> None:
    TopologicalSorter(uses(package)).prepare()


@pytest.mark.parametrize("package", ["asgd", "cluster", "analysis"])
def test_rooms_have_no_import_cycle_and_few_floors(package: str) -> None:
    found = floors(package)
    assert max(found.values()) <= MOST_FLOORS
    assert {name for name in GROUND.get(package, ()) if found[name] != 1} == set()


@pytest.mark.parametrize("place", CLOSED)
def test_rooms_do_not_import_what_is_closed_to_them(place: str) -> None:
    inside = [file for file in FILES if file.startswith(f"{place}/")]
    assert inside
    for file in inside:
        assert not [name for name in imports(file) if name.startswith(CLOSED[place])], file


def test_inner_packages_export_nothing() -> None:
    for file in FILES:
        if file.count("/") >= 2 and file.endswith("/__init__.py") and file != OPEN:
            assert not imports(file), file


@pytest.mark.parametrize("file", FILES)
def test_arrows(file: str) -> None:
    used, own = packages(file), file.split("/")[0]
    assert "ray" not in used or file in RAY
    assert "matplotlib" not in used or file.startswith("analysis/figures/")
    assert "numba" not in used or file == "asgd/compiled.py"
    assert "asgd.__main__" not in imports(file)
    if own == "asgd" and file != COMMAND_LINE:
        assert not used & {"cluster", "analysis"}
    if own == "cluster":
        assert "analysis" not in used
    if own == "analysis":
        assert not used & {"cluster", "ray"}


def test_only_one_module_touches_the_private_parts_of_ray() -> None:
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in FILES}
    users = {file for file, text in sources.items() if re.search(r"\bray\._|ray import _", text)}
    assert users == {"cluster/local_ray/internals.py"}


def test_only_two_modules_use_pyarrow() -> None:
    """Arrow's threads must not free memory of Python, see `asgd.rundir.tables`."""
    users = {file for file in FILES if "pyarrow" in packages(file)}
    assert users == {"asgd/rundir/tables.py", "asgd/records/foreign.py"}
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in FILES}
    assert not [
        file for file, text in sources.items() if "read_parquet" in text or "to_parquet" in text
    ]


def test_only_three_modules_of_asgd_use_pandas() -> None:
    users = {file for file in FILES if "pandas" in packages(file) and file.startswith("asgd/")}
    own = {"asgd/rundir/reader.py", "asgd/records/reader.py"}
    assert users == {*own, "asgd/records/importing.py"}  # imports from a DataFrame


@pytest.mark.parametrize(
    "package", ["asgd", "cluster", "analysis", "asgd.config.make", "cluster.core.server"]
)
def test_imports_are_light(package: str) -> None:
    code = f"import sys, {package}; print(*sys.modules)"
    listing = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(listing.stdout.split())
    assert not loaded & {"ray", "matplotlib", "sklearn", "numba"}


if __name__ == "__main__":
    for name in ("asgd", "cluster", "analysis"):
        levels = floors(name)
        print(f"{name}: {len(levels)} rooms on {max(levels.values())} floors")
        for one in sorted(levels, key=lambda each: (-levels[each], each)):
            print(f"  {levels[one]}  {one:<18} -> {' '.join(sorted(plan(name)[one]))}")
