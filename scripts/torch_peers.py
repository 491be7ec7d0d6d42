"""Training with PyTorch's own tools, for comparisons: Hogwild, DistributedDataParallel, or alone.

`scripts.bench_hogwild` and `scripts.bench_networks` compare with it. Every process has one thread,
draws its own batches, and makes its share of `updates` steps of plain SGD. "hogwild" shares the
parameters without locks (`torch.multiprocessing`); "ddp" averages the gradients of a step over
gloo, so a step counts as one update of each process; "alone" shares nothing, so its speed is that
of the cores. The first process saves its parameters at intervals; the losses are computed
afterwards.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed, multiprocessing, nn

METHODS = ("alone", "hogwild", "ddp")


@dataclass(frozen=True)
class Task:
    """The task of every process.

    Attributes
    ----------
    module
        The network at its start; shared between the processes by Hogwild.
    data
        Inputs and labels.
    rate, batch, updates
        Learning rate, batch size of a process, and updates of all processes together.
    weight_decay
        Factor of |x|^2 / 2.
    points
        Number of times that the first process saves its parameters.
    seed
        Seed of the batches.
    """

    module: nn.Module
    data: tuple[torch.Tensor, torch.Tensor]
    rate: float
    batch: int
    updates: int
    weight_decay: float = 0.0
    points: int = 40
    seed: int = 0


@dataclass(frozen=True)
class Course:
    """Updates per second, and the parameters of the first process at times > 0, in seconds."""

    speed: float
    seconds: npt.NDArray[np.float64]
    parameters: npt.NDArray[np.float32]


def train(method: str, task: Task, processes: int = 2) -> Course:
    """Train by one of the methods in new processes; the clock starts when all are ready."""
    if method == "hogwild":
        task.module.share_memory()
    dim = sum(p.numel() for p in task.module.parameters())
    noted = torch.zeros(task.points, dim).share_memory_()
    times = torch.zeros(processes, task.points, dtype=torch.float64).share_memory_()
    with tempfile.TemporaryDirectory(prefix="asgd-peers-") as directory:
        multiprocessing.spawn(
            _work, (method, task, processes, noted, times, f"{directory}/store"), processes
        )
    share = task.updates // processes // task.points * task.points
    # The points are those of the first process; the slowest process sets the speed.
    speed = processes * share / float(times[:, -1].max())
    return Course(speed, times[0].numpy(), noted.numpy())


def seconds_to(target: float, seconds: npt.ArrayLike, losses: npt.ArrayLike) -> float:
    """Return when a curve first falls to a loss, by interpolation; nan if it does not."""
    seconds, losses = np.asarray(seconds), np.asarray(losses)
    if not (losses <= target).any():
        return float("nan")
    end = int(np.argmax(losses <= target))
    start = max(0, end - 1)
    return float(np.interp(-target, -losses[[start, end]], seconds[[start, end]]))


def _work(
    rank: int,
    method: str,
    task: Task,
    processes: int,
    noted: torch.Tensor,
    times: torch.Tensor,
    store: str,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1000 * task.seed + rank)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=processes)
    module: Any = nn.parallel.DistributedDataParallel(task.module) if method == "ddp" else None
    step = _step(module or task.module, task)
    # The warm-up has learning rate zero, because Hogwild shares the parameters.
    for _ in range(5):
        step(0.0)
    distributed.barrier()
    started, between = time.perf_counter(), task.updates // processes // task.points
    for point in range(task.points):
        for _ in range(between):
            step(task.rate)
        times[rank, point] = time.perf_counter() - started
        if rank == 0:
            noted[point] = nn.utils.parameters_to_vector(task.module.parameters()).detach()
    distributed.barrier()
    distributed.destroy_process_group()


def _step(module: nn.Module, task: Task) -> Callable[[float], None]:
    optimizer = torch.optim.SGD(module.parameters(), lr=task.rate, weight_decay=task.weight_decay)
    inputs, labels = task.data

    def step(rate: float) -> None:
        chosen = torch.randint(len(labels), (task.batch,))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()

    return step
