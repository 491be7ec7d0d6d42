"""A wheel built from the tree works outside of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


def output(*words: object, cwd: Path) -> str:
    """Return what a command prints that runs without the environment of this process."""
    env = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "MPLBACKEND": "agg"}
    ended = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_a_wheel_works_outside_the_tree(tmp_path: Path) -> None:
    wheel = tmp_path / output(sys.executable, "-c", BUILD, tmp_path, cwd=ROOT).strip()
    venv = tmp_path / "venv"
    python, asgd = venv / "bin" / "python", venv / "bin" / "asgd"
    output(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    output(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The libraries of this process are used, but not their .pth files, and so not the tree.
    libraries = [path for path in sys.path if Path(path).name == "site-packages"]
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text("\n".join(libraries), encoding="utf-8")
    where = (
        "import asgd, cluster, analysis as a; print(asgd.__file__, cluster.__file__, a.__file__)"
    )
    assert output(python, "-c", where, cwd=tmp_path).count(str(site)) == 3

    def run(*words: str) -> str:
        return output(asgd, *words, cwd=tmp_path)

    assert "report" in run("--help")
    assert run("init", "run.toml") == "run.toml\n"
    quick = ["--set", "problem.kind=quadratic", "--set", "run.updates=200"]
    quick += ["--set", "optimizer.learning_rate=0.05"]
    assert run("simulate", "run.toml", *quick, "--out", "sim") == "sim\n"
    page = tmp_path / run("report", "sim", "--paths", "2").strip()
    text = page.read_text(encoding="utf-8")
    assert "SME with the measured law" in text
    assert "<style>" in text
    assert "<script>" in text
