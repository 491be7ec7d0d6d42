"""Time to a common loss, compared with Hogwild in PyTorch (processes with shared parameters).

    .venv/bin/python -m pip install ".[torch]"
    .venv/bin/python -m scripts.bench_hogwild --workers 2 4 8 --repeats 5 --updates 20000

Both minimise softmax regression on the digits data, with the penalty, from zero, with the same
batch size and learning rate and one thread per process. In Hogwild (`scripts/torch_peers.py`),
every process applies `torch.optim.SGD` to the shared parameters, without locks and in float32; its
staleness is unknown. Ours is `cluster.run` in float64, with exact staleness, every gradient applied
exactly once, a trace, checkpoints (no write-ahead log) and losses evaluated during the run. Hogwild
saves its parameters every 100 updates, as often as we evaluate the loss; its losses are evaluated
afterwards.

The clock starts when every process is ready. The common loss is the mean over the last tenth of a
serial SGD run with the same step and half of the updates.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.problems.linear import Softmax, digits
from asgd.rundir.reader import read_run
from asgd.simulation.simulate import simulate
from cluster import run
from cluster.local_ray.session import ray_session
from scripts import torch_peers

BATCH, RATE, PENALTY = 16, 0.01, 1e-3
BETWEEN = 100  # updates between two points of a loss curve


def hogwild(workers: int, updates: int, seed: int, problem: Softmax) -> tuple[pd.DataFrame, float]:
    """Return the loss curve, columns seconds and loss, and updates/s."""
    module = torch.nn.Linear(64, 10)
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)
    images, labels = load_digits(return_X_y=True)
    data = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    task = torch_peers.Task(
        module, data, RATE, BATCH, updates, PENALTY, points=updates // BETWEEN, seed=seed
    )
    course = torch_peers.train("hogwild", task, workers)
    weights, bias = np.split(course.parameters.astype(float), [640], axis=1)
    points = np.concatenate([weights.reshape(-1, 10, 64), bias[:, :, None]], axis=2)
    points = np.concatenate([np.zeros((1, problem.dim)), points.reshape(-1, problem.dim)])
    seconds = np.concatenate([[0.0], course.seconds])
    return pd.DataFrame({"seconds": seconds, "loss": problem.loss(points)}), course.speed


def configure(workers: int, updates: int, seed: int) -> RunConfig:
    return make_config(
        {
            "problem": {"kind": "softmax"},
            "optimizer": {"learning_rate": RATE, "batch_size": BATCH},
            "cluster": {"workers": workers},
            "run": {
                "updates": updates,
                "eval_every": BETWEEN,
                "durability": "checkpoint",
                "seed": seed,
            },
        }
    )


def ours(workers: int, updates: int, seed: int) -> tuple[pd.DataFrame, float]:
    """Return the loss curve, columns seconds and loss, and updates/s."""
    with tempfile.TemporaryDirectory() as directory:
        result = read_run(run(configure(workers, updates, seed), Path(directory) / "run"))
        loss, end = result.loss, float(result.trace["applied_seconds"].iloc[-1])
    return loss[["seconds", "loss"]], updates / end


def common_loss(updates: int) -> float:
    with tempfile.TemporaryDirectory() as directory:
        result = read_run(simulate(configure(1, updates // 2, 0), Path(directory) / "run"))
        return float(result.loss["loss"].iloc[-len(result.loss) // 10 :].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=30_000)
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    problem = digits(PENALTY)
    target = common_loss(options.updates)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; loss {target:.4f}, medians")
    rows: list[dict[str, Any]] = []
    # Before the session, because the session ends every process started in it.
    resource_tracker.ensure_running()
    with ray_session():
        for workers in options.workers:
            for repeat in range(options.repeats):
                for system, (loss, rate) in (
                    ("Hogwild", hogwild(workers, options.updates, repeat, problem)),
                    ("asgd", ours(workers, options.updates, repeat)),
                ):
                    row = {"system": system, "workers": workers, "repeat": repeat}
                    seconds = torch_peers.seconds_to(target, loss["seconds"], loss["loss"])
                    if np.isnan(seconds):
                        raise RuntimeError(f"{system}: {target:.4f} not reached: more --updates")
                    rows.append({**row, "updates_per_second": rate, "seconds": seconds})
            print(summary(pd.DataFrame(rows), workers), flush=True)
            pd.DataFrame(rows).to_csv(options.out / "bench_hogwild.csv", index=False)


def summary(table: pd.DataFrame, workers: int) -> str:
    own = table[table["workers"] == workers].groupby("system")
    seconds, rate = own["seconds"].median(), own["updates_per_second"].median()
    return (
        f"{workers} workers: Hogwild {seconds['Hogwild']:.3f} s at {rate['Hogwild']:,.0f}/s, asgd "
        f" {seconds['asgd']:.3f} s at {rate['asgd']:,.0f}/s; "
        f"Hogwild's time / ours = {seconds['Hogwild'] / seconds['asgd']:.2f}"
    )


if __name__ == "__main__":
    main()
