"""On a terminal each command says that it imports the problem, and makes the problem once."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from asgd.console.live import IMPORTING

# A problem whose import waits until the gate, a named pipe, is written. It counts its instances.
SLOW = """
import os
import numpy as np

open(os.environ["GATE"]).close()

class Line:
    dim, n_samples = 1, 4

    def __init__(self):
        with open(os.environ["MADE"], "a") as made:
            made.write("once\\n")

    def initial_point(self, rng):
        return np.ones(1)

    def loss(self, x):
        return float(x @ x) / 2

    def gradient(self, x, indices):
        return x
"""
CONFIG = """
problem.kind = "slow_line:Line"
optimizer = {rule = "momentum", learning_rate = 0.05}
run = {updates = 400, eval_every = 100}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "slow_line.py").write_text(SLOW)
    (tmp_path / "run.toml").write_text(CONFIG)
    os.mkfifo(tmp_path / "gate")
    return tmp_path


def times_made(place: Path, *arguments: str) -> int:
    """Run a command on a terminal and return how often it made the problem.

    The gate opens once the command has said that it imports.
    """
    master, slave = pty.openpty()
    made = place / "made"
    made.write_text("")
    environment = {"GATE": str(place / "gate"), "MADE": str(made), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "asgd", *arguments],
        cwd=place,
        env=os.environ | environment | {"PYTHONPATH": str(place)},
        stdout=subprocess.DEVNULL,
        stderr=slave,
    )
    os.close(slave)
    try:
        read_until(master, IMPORTING.encode())
        (place / "gate").write_text("")
        read_until(master, None)
        assert process.wait() == 0
    finally:
        process.kill()
        os.close(master)
    return len(made.read_text().splitlines())


def read_until(terminal: int, part: bytes | None) -> None:
    """Read a terminal until it has shown a part; with None, until its end."""
    shown = b""
    while part is None or part not in shown:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the other end is closed
            assert part is None, shown[-2000:].decode()
            return


@pytest.mark.slow
def test_each_command_says_that_it_imports_and_makes_the_problem_once(place: Path) -> None:
    made = {
        name: times_made(place, name, *arguments)
        for name, *arguments in (
            ("simulate", "run.toml", "--out", "run"),
            ("predict", "run", "--paths", "4"),
            ("report", "run"),
            ("plan", "run.toml", "--workers", "2", "--learning-rate", "0.05"),
        )
    }
    assert made == dict.fromkeys(made, 1)
