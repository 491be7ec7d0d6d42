"""The tutorial has the structure of a notebook, and runs as a script."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from asgd.rundir.reader import read_run
from tests.support.invariants import check_trace

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "scripts" / "tutorial.py"


def test_the_tutorial_opens_as_a_notebook() -> None:
    before, *parts = re.split(r"^# %%", TUTORIAL.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert before == ""
    kinds = []
    for part in parts:
        kind, _, body = part.partition("\n")
        kinds.append(kind)
        if kind == " [markdown]":
            assert all(line == "" or line.startswith("#") for line in body.splitlines())
        else:
            assert kind == ""
            assert ast.parse(body).body
    assert 5 < kinds.count("") < 20
    assert kinds.count(" [markdown]") > 5


@pytest.mark.slow
@pytest.mark.ray
def test_the_tutorial_runs_to_its_report(tmp_path: Path) -> None:
    # Without its cache, Matplotlib prints that it builds a cache of fonts.
    cache = {"MPLCONFIGDIR": matplotlib.get_cachedir()}
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(TUTORIAL)],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), **cache},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    folder = tmp_path / "tutorial"
    real, simulated = (read_run(path) for path in sorted((folder / "runs").iterdir()))
    assert (real.config.cluster.workers, simulated.config.cluster.workers) == (4, 8)
    check_trace(real)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "robust:Huber" in page
    assert ended.stdout.endswith(f"{folder / 'report.html'}\n")
