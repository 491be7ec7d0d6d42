#!/usr/bin/env python3
"""Checks whether memory or open files of the processes grow during a long run.

.venv/bin/python scripts/bench_soak.py [--seconds 90] [--workers 8] [--out figures]

Trains a small problem (least squares on the diabetes data, d = 10) with the log and checkpoints,
and interrupts it after `--seconds`. Samples four times a second, for the server, the recorder, the
driver, the workers and an actor that does nothing: resident memory, its private part (heap), its
shared part, and open files.

Prints the growth after the first 20 s, in which Ray opens files and caches fill: the slope of a
line through the means of ten equal pieces, with its 95 % interval, times the length of the
measurement. Exit status 1 if, beyond that interval, memory grows by more than 5 MB, or open files
or shared memory by more than 0.5. The idle actor counts too: if it grows, Ray has not settled.
Draws bench_soak.png and writes every sample to bench_soak.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import ray
from scipy import stats

from asgd.config.make import make_config
from asgd.progress import Progress
from asgd.rundir.reader import read_run
from cluster import run
from cluster.local_ray.session import ray_session
from tests.support.processes import actor_processes, parts

ROOT = Path(__file__).resolve().parents[1]

ACTORS = ("server", "recorder", "worker")
COLUMNS = ("process", "seconds", "updates", "rss", "heap", "shared", "files")
SECONDS = 0.25
PIECES = 10
WARM_UP = 20.0  # seconds
SHORTEST = 20.0  # seconds after it
NEVER = 10**9
# Largest accepted lower end of the interval: MB, and files.
MOST = {"rss": 5.0, "heap": 5.0, "shared": 0.5, "files": 0.5}


class Enough(Exception):
    """The run has lasted for the requested time."""


def processes() -> dict[str, int]:
    """Return our processes by role: this one, and the actors below it."""
    found = {"driver": os.getpid()}
    for name in ACTORS:
        for number, pid in enumerate(parts(os.getpid(), name)):
            found[f"{name} {number}" if name == "worker" else name] = pid
    for pid in actor_processes("Idle"):
        found["idle"] = pid
    return found


def sample(pid: int) -> dict[str, float]:
    """Return memory in MB and the number of open files of a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    megabytes = {
        name: float(status[key].split()[0]) / 1024
        for name, key in (("rss", "VmRSS"), ("heap", "RssAnon"), ("shared", "RssShmem"))
    }
    return {**megabytes, "files": float(len(list(Path(f"/proc/{pid}/fd").iterdir())))}


class Idle:
    """An actor that does nothing; its growth is due to Ray."""

    def ready(self) -> None:
        pass


class Sampler:
    """Samples every process during the block, into a file, so that this process does not grow."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        self._file.write(",".join(COLUMNS) + "\n")
        self._updates = 0
        self.seconds = 0.0  # since the first update
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._file.close()

    def watch(self, progress: Progress) -> None:
        self._updates = progress.update

    def _sample(self) -> None:
        start = time.monotonic()
        while not self._over.wait(SECONDS):
            if not self._updates:
                start = time.monotonic()
                continue
            for name, pid in processes().items():
                with contextlib.suppress(OSError, KeyError):  # gone meanwhile
                    self.seconds = time.monotonic() - start
                    row = (self.seconds, self._updates, *sample(pid).values())
                    self._file.write(",".join([name, *(f"{value:.6g}" for value in row)]) + "\n")


def growth(updates: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """Return the growth from the first to the last of the updates, and its 95 % interval."""
    pieces = [np.mean(piece) for piece in np.array_split(values, PIECES)]
    at = [np.mean(piece) for piece in np.array_split(updates, PIECES)]
    centred, span = np.array(at) - np.mean(at), updates[-1] - updates[0]
    slope = centred @ pieces / (centred @ centred)
    rest = pieces - np.mean(pieces) - slope * centred
    error = np.sqrt(rest @ rest / (PIECES - 2) / (centred @ centred))
    half = stats.t.ppf(0.975, PIECES - 2) * error
    return span * slope, span * (slope - half), span * (slope + half)


def judge(samples: pd.DataFrame) -> bool:
    """Print the growth of each process; return whether none grows."""
    flat = True
    late = samples[samples["seconds"] >= WARM_UP]
    for name, rows in late.groupby("process", sort=False):
        if len(rows) < 2 * PIECES:
            print(f"{name:10}  seen too briefly to judge", flush=True)
            continue
        at = rows["updates"].to_numpy(float)
        line = f"{name:10}"
        for column, most in MOST.items():
            values = rows[column].to_numpy()
            slope, low, high = growth(at, values)
            unit = "" if column == "files" else "MB"
            line += f"  {column} {values[-1]:6.1f} {unit} {slope:+.2f} [{low:+.2f}, {high:+.2f}]"
            flat &= low <= most
        print(line, flush=True)
    return flat


def draw(samples: pd.DataFrame, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    kinds = ("driver", *ACTORS, "idle")
    colours = dict(zip(kinds, plt.get_cmap("tab10").colors[: len(kinds)], strict=True))
    for name, rows in samples.groupby("process"):
        kind, _, number = name.partition(" ")
        label = f"_{name}" if number not in ("", "0") else {"worker": "workers"}.get(kind, kind)
        for one, column in zip(axes, ("rss", "files"), strict=True):
            one.plot(rows["seconds"], rows[column], label=label, linewidth=1, color=colours[kind])
    for one, label in zip(axes, ("resident memory, MB", "open files"), strict=True):
        one.set(xlabel="seconds", ylabel=label, xlim=(0, None), ylim=(0, None))
        one.axvspan(0, WARM_UP, color="0.93", linewidth=0)
    axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)
    if options.seconds < WARM_UP + SHORTEST:
        parser.error(f"--seconds {options.seconds:g}: at least {WARM_UP + SHORTEST:g}")
    options.out.mkdir(parents=True, exist_ok=True)
    config = make_config(
        {
            "problem": {"kind": "least_squares"},
            "optimizer": {"learning_rate": 0.01},
            "cluster": {"workers": options.workers},
            "run": {"updates": NEVER},
        }
    )
    memory_before = {path.name for path in Path("/dev/shm").iterdir()}
    with tempfile.TemporaryDirectory() as directory:
        with ray_session(), Sampler(options.out / "bench_soak.csv") as sampler:
            idle = ray.remote(Idle).options(num_cpus=0).remote()
            ray.get(idle.ready.remote())

            def watch(progress: Progress) -> None:
                sampler.watch(progress)
                if sampler.seconds > options.seconds:
                    raise Enough

            with contextlib.suppress(Enough):
                run(config, Path(directory) / "run", progress=watch)
        trace = read_run(Path(directory) / "run").trace
    samples = pd.read_csv(options.out / "bench_soak.csv")
    draw(samples, options.out / "bench_soak.png")
    print(
        f"{len(trace)} updates, {options.workers} workers, "
        f"{trace['applied_seconds'].iloc[-1]:.0f} s; last value, growth"
    )
    flat = judge(samples)
    left = {path.name for path in Path("/dev/shm").iterdir()} - memory_before
    print(f"left in /dev/shm: {', '.join(sorted(left)) or 'nothing'}; flat: {flat}")
    return int(not flat)


if __name__ == "__main__":
    sys.exit(main())
