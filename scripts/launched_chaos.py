"""Faults that end a launcher or damage what is on disk: the second half of `bench_chaos.py`.

Each run is `asgd run` in its own process, with its own Ray, on its own small disk. Once its workers
have joined, faults are injected in random order at random times. If a fault ends the run, the disk
is repaired and the run resumed, until it finishes or reports why it cannot.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from asgd.errors import AsgdError
from asgd.rundir.reader import read_run
from tests.support.processes import DEFAULT_SIGNALS, LAUNCHER, PARTS, listeners, parts, processes_in

ROOT = Path(__file__).resolve().parents[1]

KILLED = (*PARTS, LAUNCHER)
DAMAGED = {"trace": "trace/part-*.parquet", "loss": "loss.parquet/part-*.parquet"}
DISK = ("read_only", "full_disk")  # they need private mounts
CONFIG = """
problem.kind = "softmax"
optimizer.learning_rate = 0.3
cluster = {workers = 2, transport = "tcp", compute_time = {law = "exponential", mean = 0.02}}
run = {updates = 500, checkpoint_every = 100}
"""
DISK_BYTES = 64_000_000
PATIENCE = 150.0  # seconds for a run to end in any way
MOST_ATTEMPTS = 8
SECONDS_TO_CLEAR = 15.0  # for the guard to clean up


def own_mounts() -> bool:
    """Whether this process may create private mounts."""
    done = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    return os.geteuid() == 0 and done.returncode == 0


def plan(random: np.random.Generator, faults: int, mounts: bool) -> list[str]:
    """Draw the faults of a run."""
    kinds = [*KILLED, *DAMAGED, "flood", *(DISK if mounts else ())]
    return [str(kind) for kind in random.choice(kinds, faults)]


class Launched:
    """One run; its files, home and temporary files are below `directory`."""

    def __init__(self, directory: Path, random: np.random.Generator, mounts: bool) -> None:
        self.disk, self._tmp = directory / "disk", directory / "t"
        self.out = self.disk / "run"
        self._config = directory / "c.toml"
        self._random = random
        self._mounts = mounts
        self._read_only = False
        self._unwritable = False  # a run that ends then cannot record its reason
        self.damaged: list[Path] = []
        self.wrong: list[str] = []
        self.ends: list[str] = []
        self.disk.mkdir()
        self._tmp.mkdir()
        self._config.write_text(CONFIG)
        if mounts:
            options = f"size={DISK_BYTES}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.disk], check=True)

    def close(self) -> None:
        self.mend()
        if self._mounts:
            subprocess.run(["umount", self.disk], check=True)

    def start(self) -> subprocess.Popen[str]:
        """Start or resume the run."""
        go_on = (self.out / "config.json").exists()
        what = ["--resume", self.out] if go_on else [self._config, "--out", self.out]
        return subprocess.Popen(
            [*DEFAULT_SIGNALS, sys.executable, "-m", "asgd", "run", *what],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(self._tmp), "HOME": str(self._tmp)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def joined(self) -> int:
        """Return the number of `worker_joined` events."""
        with contextlib.suppress(OSError):
            return (self.out / "events.jsonl").read_bytes().count(b'"worker_joined"')
        return 0

    def inject(self, kind: str, launcher: int) -> bool:
        """Inject a fault; return whether its target existed."""
        if kind in KILLED:
            pid = next(iter(parts(launcher, kind)), None)
            if pid is None:
                return False
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)
            return True
        faults: dict[str, Callable[[], bool]] = {
            "read_only": self._make_read_only,
            "full_disk": self._fill,
            "flood": lambda: self._flood(launcher),
            "trace": lambda: self._flip("trace"),
            "loss": lambda: self._flip("loss"),
        }
        return faults[kind]()

    def _make_read_only(self) -> bool:
        if self._read_only:
            return False
        self._read_only = self._unwritable = True
        subprocess.run(["mount", "--bind", self.out, self.out], check=True)
        # The kernel refuses while the run has a file of this mount open for writing.
        while subprocess.run(["mount", "-o", "remount,ro,bind", self.out], check=False).returncode:
            subprocess.run(["umount", "--lazy", self.out], check=True)
            subprocess.run(["mount", "--bind", self.out, self.out], check=True)
        return True

    def _fill(self) -> bool:
        self._unwritable = True
        with (self.disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        return True

    def _flood(self, launcher: int) -> bool:
        servers = parts(launcher, "server")
        strangers = []
        for _, port in listeners(set(servers)):
            for _ in range(150):
                with contextlib.suppress(OSError):
                    stranger = socket.create_connection(("127.0.0.1", port), 1.0)
                    stranger.sendall(self._random.bytes(64))
                    strangers.append(stranger)
        for stranger in strangers:
            stranger.close()
        return bool(strangers)

    def _flip(self, table: str) -> bool:
        parts = sorted(self.out.glob(DAMAGED[table]))
        if not parts:
            return False
        part = parts[int(self._random.integers(len(parts)))]
        place = int(self._random.integers(part.stat().st_size))
        bit = 1 << int(self._random.integers(8))
        try:
            with part.open("r+b", buffering=0) as file:  # in place: the disk may be full
                file.seek(place)
                byte = file.read(1)[0] ^ bit
                file.seek(place)
                file.write(bytes([byte]))
        except OSError:  # an earlier fault made it read-only
            return False
        self.damaged.append(part)
        return True

    def mend(self) -> None:
        """Repair the disk."""
        if self._read_only:
            subprocess.run(["umount", self.out], check=True)
        (self.disk / "filler").unlink(missing_ok=True)
        self._read_only = self._unwritable = False

    def judge(self, status: int, errors: str) -> None:
        """Record how a process ended, and the faults."""
        deadline = time.monotonic() + SECONDS_TO_CLEAR
        while (processes_in(self._tmp) or any(self._tmp.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.wrong += [f"process {pid} is left" for pid in processes_in(self._tmp)]
        self.wrong += [f"{file} is left" for file in self._tmp.iterdir()]
        shutil.rmtree(self._tmp)
        self._tmp.mkdir()
        last = (errors.splitlines() or ["nothing said"])[-1]
        self.ends.append("finished" if status == 0 else last.removeprefix("asgd: "))
        if status == 0:
            return
        if not last.startswith("asgd: ") or "Traceback" in errors:
            self.wrong.append(f"status {status}, standard error {errors[-1000:]!r}")
        try:
            run = read_run(self.out)
            state, reason = run.state, run.failure
        except AsgdError as error:
            self.wrong.append(f"cannot be read: {error}")
            return
        said = (state, f"asgd: {reason}") == ("failed", last)
        if status != 2 and not said and not self._unwritable:
            self.wrong.append(f"{state}, {reason!r}, but said {last!r}")


def chaos(run: Launched, kinds: list[str]) -> list[str]:
    """Inject faults into a run, resuming it, until it ends; return those that hit a target."""
    left, hit = list(kinds), []
    for _ in range(MOST_ATTEMPTS):
        before, process = run.joined(), run.start()
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            if left and run.joined() >= before + 2:
                time.sleep(float(run._random.uniform(0.0, 2.0)))
                if process.poll() is None and run.inject(left[0], process.pid):
                    hit.append(left[0])
                left.pop(0)
            time.sleep(0.05)
        if process.poll() is None:
            run.wrong.append(f"no end within {PATIENCE:.0f} s")
            process.kill()
        _, errors = process.communicate()
        run.judge(process.returncode, errors)
        run.mend()
        # It cannot be resumed, or ended for the same reason as before without a new fault.
        if process.returncode in (0, 2) or (not left and run.ends[-1] in run.ends[:-1]):
            break
    return hit
