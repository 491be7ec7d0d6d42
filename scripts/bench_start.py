"""Measures the seconds to the first update of a run, compared with a bare Ray and an import.

    .venv/bin/python -m pip install ".[torch]"
    .venv/bin/python -m scripts.bench_start
    .venv/bin/python -m scripts.bench_start --repeats 5

Each measurement is a new process, and the four take turns: `import torch`; a bare Ray whose actors,
as many as a run has, all answer; a run of a NumPy problem; a run of a network in PyTorch. The time
of a run is from the start of its process to its first update. Prints medians, and the extra time of
a PyTorch run over bare Ray, in units of the time to import torch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORKERS = 2
ACTORS = WORKERS + 2  # the server and the recorder
KINDS = {"numpy": "softmax", "torch": "scripts.bench_start:network"}


def network() -> Any:
    """Return a perceptron on random images; needs nothing but torch."""
    import numpy as np
    from torch import nn

    import asgd

    rng = np.random.default_rng(0)
    data = rng.standard_normal((1500, 64)), rng.integers(10, size=1500)
    module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    return asgd.TorchProblem(lambda: module, nn.functional.cross_entropy, data)


def import_torch() -> float:
    """Import torch and return the time afterwards."""
    import torch  # noqa: F401

    return time.time()


def bare_ray() -> float:
    """Start Ray with actors that do nothing; return the time at which all have answered."""
    import ray

    class Idle:
        def answer(self) -> None:
            pass

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    actors: list[Any] = [ray.remote(num_cpus=0)(Idle).remote() for _ in range(ACTORS)]
    ray.get([actor.answer.remote() for actor in actors])
    answered = time.time()
    ray.shutdown()
    return answered


def first_update(kind: str) -> float:
    """Run a few updates; return the time of the first one."""
    import asgd
    import cluster

    config = asgd.make_config(
        {
            "problem": {"kind": kind},
            "optimizer": {"learning_rate": 0.01, "batch_size": 32},
            "cluster": {"workers": WORKERS},
            "run": {"updates": 200, "eval_every": 100},
        }
    )
    with tempfile.TemporaryDirectory(prefix="asgd-start-") as directory:
        run = asgd.read_run(cluster.run(config, Path(directory) / "run"))
        joined = max(event["time"] for event in run.events if event["event"] == "worker_joined")
        return float(joined + run.trace["applied_seconds"].iloc[0])


MEASURES = {
    "import": import_torch,
    "ray": bare_ray,
    **{name: lambda kind=kind: first_update(kind) for name, kind in KINDS.items()},
}


def seconds(name: str) -> float:
    """Return the seconds from the start of a process to the end of its measurement."""
    started = time.time()
    command = [sys.executable, "-m", "scripts.bench_start", "--only", name]
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(shown.split()[-1]) - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=MEASURES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(repr(MEASURES[options.only]()))
        return
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for _ in range(options.repeats):
        for name, values in found.items():
            values.append(seconds(name))
        print("  ".join(f"{name} {values[-1]:.1f} s" for name, values in found.items()), flush=True)
    median = {name: statistics.median(values) for name, values in found.items()}
    beyond = (median["torch"] - median["ray"]) / median["import"]
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, medians of {options.repeats}: "
        f"import of torch {median['import']:.1f} s, bare Ray with {ACTORS} actors "
        f"{median['ray']:.1f} s; first update of a NumPy run {median['numpy']:.1f} s, of a torch "
        f"run {median['torch']:.1f} s: bare Ray plus {beyond:.1f} imports"
    )


if __name__ == "__main__":
    main()
