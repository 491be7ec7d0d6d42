"""A new model is one file and one entry in one list."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from asgd.config.make import make_config
from asgd.simulation.simulate import simulate

ROOT = Path(__file__).parents[2]
FILE = """
from analysis.models.sme_sgd import native_sgd_paths
from analysis.prediction.kinds.base import Model


class Naive(Model):
    name, label, has_fast = "naive", "SGD once more", False

    def is_default(self, setting):
        return True

    def path_model(self, setting, seed):
        return native_sgd_paths(setting.descent)
"""
IMPORT = "from analysis.prediction.kinds.naive import Naive\n"
ENTRY = "        Replay(),\n"


def test_a_new_model_is_one_file_and_one_entry(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "analysis", tree / "analysis")
    room = tree / "analysis" / "prediction"
    (room / "kinds" / "naive.py").write_text(FILE, encoding="utf-8")
    text = (room / "model.py").read_text(encoding="utf-8")
    assert text.count(ENTRY) == 1
    text = text.replace(ENTRY, f"{ENTRY}        Naive(),\n")
    text = text.replace("import annotations\n", f"import annotations\n{IMPORT}", 1)
    (room / "model.py").write_text(text, encoding="utf-8")
    quick = {"problem": {"kind": "quadratic"}, "run": {"updates": 300, "eval_every": 10}}
    out = simulate(make_config({**quick, "optimizer": {"learning_rate": 0.05}}), tmp_path / "run")

    def command(*words: str) -> str:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tree), str(ROOT)))}
        asgd = [sys.executable, "-m", "asgd", *words]
        done = subprocess.run(asgd, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    predicted = json.loads(command("predict", str(out), "--json", "--paths", "4"))
    assert set(predicted["models"]) == {"sme_sgd", "sme_asgd", "sme_law", "replay", "naive"}
    page = Path(command("report", str(out)).strip()).read_text(encoding="utf-8")
    assert 'value="naive"' in page
    assert "SGD once more" in page
