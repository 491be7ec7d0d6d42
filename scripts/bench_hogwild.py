#!/usr/bin/env python3
"""Time to a common loss, compared with Hogwild in PyTorch (processes with shared parameters).

python scripts/bench_hogwild.py [--workers 2 4 8] [--repeats 5] [--updates 30000] [--out figures]

Needs the extra `hogwild` (PyTorch). Both minimise softmax regression on the digits data, with the
penalty, from zero, with the same batch size and learning rate and one thread per process. In
Hogwild, every process draws a batch, calls `backward` and applies `torch.optim.SGD` to the shared
parameters, without locks and in float32; its staleness is unknown. Ours is `cluster.run` in
float64, with exact staleness, every gradient applied exactly once, a trace, checkpoints (no
write-ahead log) and losses evaluated during the run. Hogwild's parameters are copied at intervals
and their loss is evaluated afterwards.

The clock starts when every process is ready. The common loss is the mean over the last tenth of a
serial SGD run with the same step and half of the updates.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.problems.linear import Softmax, digits
from asgd.rundir.reader import read_run
from asgd.simulation.simulate import simulate
from cluster import run
from cluster.local_ray.session import ray_session

BATCH, RATE, PENALTY = 16, 0.01, 1e-3
SAMPLE_SECONDS = 0.002  # between two copies of Hogwild's parameters


def hogwild_worker(shared: Any, clock: Any, ready: Any, updates: int, seed: int) -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    features, labels = digits_tensors()
    model = torch.nn.Linear(64, 10)
    model.weight, model.bias = (torch.nn.Parameter(tensor) for tensor in shared)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=PENALTY)
    ready.wait()
    clock[0] = time.perf_counter()
    for _ in range(updates):
        batch = torch.randint(len(features), (BATCH,))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(features[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    clock[1] = time.perf_counter()


def digits_tensors() -> tuple[Any, Any]:
    import torch
    from sklearn.datasets import load_digits

    features, labels = load_digits(return_X_y=True)
    return torch.tensor(features / 16.0, dtype=torch.float32), torch.tensor(labels)


def hogwild(workers: int, updates: int, seed: int, problem: Softmax) -> tuple[pd.DataFrame, float]:
    """Return the loss curve, columns seconds and loss, and updates/s."""
    import torch
    from torch import multiprocessing as mp

    shared = [torch.zeros(10, 64).share_memory_(), torch.zeros(10).share_memory_()]
    clocks = torch.zeros(workers, 2, dtype=torch.float64).share_memory_()  # start, end
    context = mp.get_context("spawn")
    ready = context.Barrier(workers + 1)
    share = updates // workers
    processes = [
        context.Process(
            target=hogwild_worker,
            args=(shared, clocks[worker], ready, share, seed * 1000 + worker),
        )
        for worker in range(workers)
    ]
    for process in processes:
        process.start()
    ready.wait()
    seconds, points = [], []
    running = [process.sentinel for process in processes]
    while running:
        seconds.append(time.perf_counter())
        points.append(torch.cat([shared[0], shared[1][:, None]], dim=1).flatten().numpy())
        gone = connection.wait(running, SAMPLE_SECONDS)
        running = [sentinel for sentinel in running if sentinel not in gone]
    if any(process.exitcode for process in processes):
        raise RuntimeError("a process of Hogwild failed")
    start, end = float(clocks[:, 0].min()), float(clocks[:, 1].max())
    loss = problem.loss(np.array(points, dtype=float))
    curve = pd.DataFrame({"seconds": np.array(seconds) - start, "loss": loss})
    return curve, workers * share / (end - start)


def configure(workers: int, updates: int, seed: int) -> RunConfig:
    return make_config(
        {
            "problem": {"kind": "softmax"},
            "optimizer": {"learning_rate": RATE, "batch_size": BATCH},
            "cluster": {"workers": workers},
            "run": {
                "updates": updates,
                "eval_every": 100,
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


def seconds_to(loss: pd.DataFrame, target: float) -> float:
    """Return the time at which a loss curve first reaches the target."""
    below = loss["loss"].to_numpy() <= target
    if not below.any():
        raise RuntimeError(f"the loss {target:.4f} was not reached: more --updates")
    return float(loss["seconds"].iloc[int(np.argmax(below))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
                    seconds = seconds_to(loss, target)
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
