#!/usr/bin/env python3
"""A long run, and whether anything in its processes grows with it.

.venv/bin/python scripts/bench_soak.py [--updates 200000] [--workers 8] [--out figures]

A small problem (least squares on the diabetes data, d = 11) with the log and checkpoints, until so
many updates are made. Four times a second, of the processes of server, recorder, driver and
workers, and of an actor that does nothing: resident memory, of that the private part (heap) and
the shared part, and open files.
Printed is the growth over the last four fifths of the run: the slope of a line through the means
of ten equally long pieces, with its 95 % interval, in units of the whole stretch. Exit status 1
where heap grows by more than 5 MB for 100 000 updates, with certainty, or open files or shared
memory grow at all. Drawn into bench_soak.png, every sample in bench_soak.csv.
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

from asgd.config import make_config
from asgd.progress import Progress
from asgd.trace import read_run
from cluster import run
from cluster.session import ray_session

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.processes import actor_processes  # noqa: E402

ACTORS = {
    "ServerActor": "server",
    "RecorderActor": "recorder",
    "WorkerActor": "worker",
    "Idle": "idle",
}
COLUMNS = ("process", "seconds", "updates", "rss", "heap", "shared", "files")
SECONDS = 0.25
PIECES = 10
WARM_UP = 0.2  # of the updates: caches fill, buffers reach their size
MOST_HEAP = 5.0  # MB for 100 000 updates


def processes() -> dict[str, int]:
    """Return our processes by what they are: this one, and the actors below it."""
    found = {"driver": os.getpid()}
    for actor, name in ACTORS.items():
        for number, pid in enumerate(sorted(actor_processes(actor))):
            found[f"{name} {number}" if name == "worker" else name] = pid
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
    """An actor that does nothing: what grows here is Ray's."""

    def ready(self) -> None:
        pass


class Sampler:
    """Samples every process while the block runs, into a file: here it would grow."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        self._file.write(",".join(COLUMNS) + "\n")
        self._updates = 0
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
                continue
            for name, pid in processes().items():
                with contextlib.suppress(OSError):  # gone meanwhile
                    row = (time.monotonic() - start, self._updates, *sample(pid).values())
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


def judge(samples: pd.DataFrame, updates: int) -> bool:
    """Print how each process grows; return whether none does."""
    flat = True
    late = samples[samples["updates"] >= WARM_UP * updates]
    for name, rows in late.groupby("process", sort=False):
        if len(rows) < 2 * PIECES:
            continue
        at = rows["updates"].to_numpy(float)
        line = f"{name:10}"
        for column, unit in (("rss", "MB"), ("heap", "MB"), ("shared", "MB"), ("files", "")):
            values = rows[column].to_numpy()
            slope, low, high = growth(at, values)
            line += f"  {column} {values[-1]:6.1f} {unit} {slope:+.2f} [{low:+.2f}, {high:+.2f}]"
            most = MOST_HEAP * (at[-1] - at[0]) / 1e5 if column in ("rss", "heap") else 0.5
            flat &= low <= most
        print(line, flush=True)
    return flat


def draw(samples: pd.DataFrame, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    kinds = ("driver", *ACTORS.values())
    colours = dict(zip(kinds, plt.get_cmap("tab10").colors[: len(kinds)], strict=True))
    for name, rows in samples.groupby("process"):
        kind, _, number = name.partition(" ")
        label = f"_{name}" if number not in ("", "0") else {"worker": "workers"}.get(kind, kind)
        for one, column in zip(axes, ("rss", "files"), strict=True):
            at = rows["updates"] / 1000
            one.plot(at, rows[column], label=label, linewidth=1, color=colours[kind])
    axes[0].set(xlabel="thousand updates", ylabel="resident memory, MB", ylim=(0, None))
    axes[1].set(xlabel="thousand updates", ylabel="open files", ylim=(0, None))
    axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)
    if options.updates < 50_000:
        parser.error(f"--updates {options.updates}: at least 50000, to see a slope")
    options.out.mkdir(parents=True, exist_ok=True)
    config = make_config(
        {
            "problem": {"kind": "least_squares"},
            "optimizer": {"learning_rate": 0.01},
            "cluster": {"workers": options.workers},
            "run": {"updates": options.updates},
        }
    )
    memory_before = {path.name for path in Path("/dev/shm").iterdir()}
    with tempfile.TemporaryDirectory() as directory:
        with ray_session(), Sampler(options.out / "bench_soak.csv") as sampler:
            idle = ray.remote(Idle).options(num_cpus=0).remote()
            ray.get(idle.ready.remote())
            result = read_run(run(config, Path(directory) / "run", progress=sampler.watch))
        seconds = result.trace["applied_seconds"].iloc[-1]
    samples = pd.read_csv(options.out / "bench_soak.csv")
    draw(samples, options.out / "bench_soak.png")
    print(
        f"{options.updates} updates, {options.workers} workers, {seconds:.0f} s; last value, growth"
    )
    flat = judge(samples, options.updates)
    left = {path.name for path in Path("/dev/shm").iterdir()} - memory_before
    print(f"left in /dev/shm: {', '.join(sorted(left)) or 'nothing'}; flat: {flat}")
    return int(not flat)


if __name__ == "__main__":
    sys.exit(main())
