"""Networks in PyTorch: updates/s against the ideal, time to a loss against PyTorch's own tools.

    .venv/bin/python -m pip install ".[torch]"
    .venv/bin/python -m scripts.bench_networks
    .venv/bin/python -m scripts.bench_networks --models small,conv --parts speed --repeats 3

Part "speed" measures in turn, for each network: serial training in one thread, which gives the time
of a bare gradient; a real run of two workers with as many updates; and, with two processes and the
same batch size, separate training, Hogwild and DistributedDataParallel over gloo. It prints the
run's updates/s over the ideal (two cores that compute bare gradients only) and over the separate
training, and the times of the run, Hogwild and DistributedDataParallel to a common loss, that of
the serial training after half of the updates. Our losses are evaluated during the run, theirs
afterwards. Part "prediction": time of the four models with 16 paths, over the serial training.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import asgd
import cluster
from analysis.study import Study
from cluster.local_ray.session import ray_session
from scripts import torch_peers
from scripts.torch_peers import seconds_to

BATCH, WORKERS, PATHS = 32, 2, 16
KIND = "scripts.bench_networks:make"
RATE = 0.1
UPDATES = {"small": 6000, "middle": 3000, "large": 1000, "conv": 1600}  # a run takes seconds
LOSSES = 20  # evaluated during a run


def perceptron(*widths: int) -> nn.Module:
    sizes = [64, *widths, 10]
    layers: list[nn.Module] = []
    for i, (into, out) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(into, out), *([nn.Tanh()] if i < len(widths) else [])]
    return nn.Sequential(*layers)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


MODELS = {
    "small": lambda: perceptron(32),
    "middle": lambda: perceptron(256, 256),
    "large": lambda: perceptron(512, 512, 512),
    "conv": convolutional,
}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:1500] / 16, dtype=torch.float32), torch.tensor(labels[:1500])


def make(model: str) -> asgd.TorchProblem:
    """Return one of the networks on the digits data."""
    data = digits()
    torch.manual_seed(0)
    return asgd.TorchProblem(MODELS[model], nn.functional.cross_entropy, data)


def serial(problem: asgd.TorchProblem, updates: int) -> tuple[float, float]:
    """Return the seconds of a plain training loop in one thread, and its loss half-way."""
    rng = np.random.default_rng(0)
    x = problem.initial_point(rng)
    problem.gradient(x, rng.integers(problem.n_samples, size=BATCH))
    seconds = 0.0
    for half in range(2):
        started = time.perf_counter()
        for _ in range(updates // 2):
            x -= RATE * problem.gradient(x, rng.integers(problem.n_samples, size=BATCH))
        seconds += time.perf_counter() - started
        if half == 0:
            middle = float(problem.loss(x))
    return seconds, middle


def train(model: str, updates: int, path: Path) -> asgd.Run:
    """Return a run of two workers."""
    config = asgd.make_config(
        {
            "problem": {"kind": KIND, "options": {"model": model}},
            "optimizer": {"learning_rate": RATE, "batch_size": BATCH},
            "cluster": {"workers": WORKERS},
            "run": {"updates": updates, "eval_every": updates // LOSSES},
        }
    )
    return asgd.read_run(cluster.run(config, path))


def speed(model: str, updates: int, directory: Path) -> dict[str, float]:
    """Return updates/s and times to a common loss, measured in turn."""
    torch.set_num_threads(1)
    problem = make(model)
    bare, target = serial(problem, updates)
    run = train(model, updates, directory)
    applied = run.trace["applied_seconds"].to_numpy()
    middle = applied[updates // 5 : updates * 9 // 10]
    ours = (middle.size - 1) / np.ptp(middle)
    row = {
        "gradient_ms": 1e3 * bare / updates,
        "updates_per_s": ours,
        "of_ideal": ours * bare / updates / WORKERS,
    }
    reached = {"asgd": seconds_to(target, run.loss["seconds"], run.loss["loss"])}
    for method in torch_peers.METHODS:
        module = make(model).module.requires_grad_()
        module.zero_grad(set_to_none=True)
        for parameter in module.parameters():  # they are views of one vector
            parameter.data = parameter.data.clone()
        task = torch_peers.Task(module, digits(), RATE, BATCH, updates)
        course = torch_peers.train(method, task, WORKERS)
        if method == "alone":
            row["of_two_alone"] = ours / course.speed
            continue
        row[f"{method}_updates_per_s"] = course.speed
        losses = problem.loss(course.parameters)
        start = float(problem.loss(problem.initial_point(np.random.default_rng(0))))
        reached[method] = seconds_to(target, [0, *course.seconds], [start, *losses])
        row[f"{method}_time_over_ours"] = reached[method] / reached["asgd"]
    return {**row, **{f"{name}_s": value for name, value in reached.items()}}


def prediction(model: str, updates: int, directory: Path) -> dict[str, float]:
    """Return the seconds of a prediction beside those of a serial training."""
    torch.set_num_threads(1)
    problem = make(model)
    busy = time.process_time()
    alone, _ = serial(problem, updates)
    alone_busy = time.process_time() - busy  # the better measure on a busy machine
    run = train(model, updates, directory)
    torch.set_num_threads(WORKERS)
    study = Study.open(run.path)
    started, busy = time.perf_counter(), time.process_time()
    _, score = study.predict(paths=PATHS)
    predicted, worked = time.perf_counter() - started, time.process_time() - busy
    return {
        "parameters": problem.dim,
        "serial_s": alone,
        "prediction_s": predicted,
        "prediction_over_serial": predicted / alone,
        "in_processor_time": worked / alone_busy,
        "best_error": min(one.relative_error for one in score.models.values()),
    }


PARTS = {"speed": speed, "prediction": prediction}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="some of " + ", ".join(MODELS))
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--updates", type=int, help="default: 600 to predict, else by model")
    parser.add_argument("--repeats", type=int, default=1, help="of part speed; shows medians")
    options = parser.parse_args()
    for name, known in (("models", MODELS), ("parts", PARTS)):
        if unknown := set(getattr(options, name).split(",")) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))}: expected of {', '.join(known)}")
    with tempfile.TemporaryDirectory(prefix="asgd-networks-") as directory, ray_session():
        for model in options.models.split(","):
            for part in options.parts.split(","):
                updates = options.updates or (UPDATES[model] if part == "speed" else 600)
                rows = [
                    PARTS[part](model, updates, Path(directory) / f"{model}-{part}-{repeat}")
                    for repeat in range(options.repeats if part == "speed" else 1)
                ]
                shown = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
                text = "  ".join(f"{key} {value:.3g}" for key, value in shown.items())
                print(f"{model} {part}, load {os.getloadavg()[0]:.0f}: {text}", flush=True)


if __name__ == "__main__":
    main()
