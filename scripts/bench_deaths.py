#!/usr/bin/env python3
"""Kills each process of a run, at various times, and checks how the run ends.

.venv/bin/python scripts/bench_deaths.py [--seconds 0.5 1 2 ...] [--victims raylet gcs_server ...]

Each run is an `asgd run` in its own process: two workers, one dimension, with the log. It starts in
about three seconds and lasts about four more. At one of the `--seconds` after the start, one of the
`--victims` gets kill -9: Ray's gcs_server, its raylet, an agent of the raylet, the server, the
recorder, a worker, the guard or the launcher. If the process does not exist yet, the kill waits for
it.

A run must finish, with every update recorded once and every gradient accounted for. Or it must end
with exit status 1, one line on standard error after Ray's own messages, and the same reason in its
last event, `failed`. If the launcher was killed, its guard must have reported the failure. Nothing
may be left: no processes, temporary files or shared memory. Exit status 1 if any of this fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from asgd.errors import AsgdError
from asgd.rundir.reader import read_run
from tests.support.invariants import check_gradients
from tests.support.processes import DEFAULT_SIGNALS, LAUNCHER, PARTS, parts, processes_in

ROOT = Path(__file__).resolve().parents[1]

VICTIMS = (*PARTS, LAUNCHER)
SECONDS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
UPDATES = 800
PATIENCE = 90.0  # seconds for a run to end in any way
CONFIG = f"""
problem.kind = "quadratic"
optimizer.learning_rate = 0.05
cluster = {{workers = 2, compute_time = {{law = "exponential", mean = 0.01}}}}
run = {{updates = {UPDATES}, checkpoint_every = 200}}
"""


@dataclass(frozen=True)
class Death:
    """The outcome of a run with one killed process.

    Attributes
    ----------
    killed
        Seconds after the start; None if the run ended first.
    seconds
        Total duration of the run.
    end
        How the run ended, in words.
    wrong
        The faults, in words.
    """

    killed: float | None
    seconds: float
    end: str
    wrong: list[str]


def kill(launcher: int, victim: str, deadline: float) -> bool:
    """Kill a process of a run once it exists; return whether it was killed."""
    while time.monotonic() < deadline:
        if found := parts(launcher, victim):
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[0], signal.SIGKILL)
                return True
        with contextlib.suppress(ChildProcessError):
            if os.waitid(os.P_PID, launcher, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
        time.sleep(0.01)
    return False


def die(directory: Path, victim: str, after: float) -> Death:
    """Start a run, kill one of its processes, and check what remains."""
    config, out, tmp = directory / "c.toml", directory / "run", directory / "t"
    tmp.mkdir()
    config.write_text(CONFIG)
    shm = set(os.listdir("/dev/shm"))
    start = time.monotonic()
    launcher = subprocess.Popen(
        [*DEFAULT_SIGNALS, sys.executable, "-m", "asgd", "run", config, "--out", out],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp), "HOME": str(tmp)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(after)
    killed = kill(launcher.pid, victim, start + PATIENCE)
    at = time.monotonic() - start
    try:
        _, errors = launcher.communicate(timeout=PATIENCE)
        wrong = []
    except subprocess.TimeoutExpired:
        launcher.kill()
        _, errors = launcher.communicate()
        wrong = [f"no end within {PATIENCE:.0f} s"]
    seconds = time.monotonic() - start
    deadline = time.monotonic() + 15.0  # for the guard to clean up
    while (processes_in(tmp) or any(tmp.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    wrong += [f"process {pid} is left" for pid in processes_in(tmp)]
    wrong += [f"{file} is left" for file in [*tmp.iterdir()]]
    # Other Ray sessions may have files here too; the names of ours contain "asgd".
    wrong += [
        f"/dev/shm/{file} is left" for file in set(os.listdir("/dev/shm")) - shm if "asgd" in file
    ]
    end, found = judge(out, launcher.returncode, errors, victim)
    return Death(at if killed else None, seconds, end, wrong + found)


def judge(out: Path, status: int, errors: str, victim: str) -> tuple[str, list[str]]:
    """Return how a run ended, and the faults."""
    wrong = []
    try:
        run = read_run(out)
    except AsgdError as error:
        # The launcher was killed before the directory existed.
        return f"no run (status {status}): {error}", [] if victim == "launcher" else [errors]
    reason = run.events[-1].get("reason") if run.events else None
    if status == 0:
        if run.state != "finished" or len(run.trace) != UPDATES or errors:
            wrong.append(f"status 0, but {run.state}, {len(run.trace)} updates, {errors!r}")
        with contextlib.suppress(StopIteration):
            check_gradients(run)
    elif victim != "launcher" and (status, errors.splitlines()[-1:]) != (1, [f"asgd: {reason}"]):
        wrong.append(f"status {status}, reason {reason!r}, standard error {errors[-2000:]!r}")
    elif run.state != "failed" or not reason:
        wrong.append(f"the run is {run.state}, reason {reason!r}")
    return f"{run.state}, {reason or 'no reason'}", wrong


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, nargs="+", default=SECONDS)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=VICTIMS)
    options = parser.parse_args(arguments)
    wrong = 0
    for victim in options.victims:
        for after in options.seconds:
            directory = Path(tempfile.mkdtemp(prefix="a-", dir="/tmp"))
            try:
                death = die(directory, victim, after)
            finally:
                shutil.rmtree(directory, ignore_errors=True)
            wrong += bool(death.wrong)
            killed = "never" if death.killed is None else f"at {death.killed:.1f} s"
            print(f"{victim} killed {killed}: {death.end} ({death.seconds:.1f} s)", flush=True)
            for words in death.wrong:
                print(f"  wrong: {words}", flush=True)
    print(f"{len(options.victims) * len(options.seconds)} runs, {wrong} of them wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
