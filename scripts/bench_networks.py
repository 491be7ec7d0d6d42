"""Networks in PyTorch: updates/s against the ideal of the cores, and predictions against training.

    .venv/bin/python -m pip install ".[torch]"
    .venv/bin/python -m scripts.bench_networks
    .venv/bin/python -m scripts.bench_networks --models small,conv --updates 300

For each network, in one go: a serial training in one thread, which gives the time of a bare
gradient; a real run of two workers with as many updates, and its updates/s over those that two
cores could make of bare gradients; and the four models of a prediction with 16 paths, over the
serial training.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import asgd
import cluster
from analysis.study import Study

BATCH, WORKERS, PATHS = 32, 2, 16
KIND = "scripts.bench_networks:make"


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


def make(model: str) -> asgd.TorchProblem:
    """Return one of the networks on the digits data."""
    images, labels = load_digits(return_X_y=True)
    data = (images[:1500] / 16, labels[:1500])
    return asgd.TorchProblem(MODELS[model], nn.functional.cross_entropy, data)


def serial_seconds(problem: asgd.TorchProblem, updates: int, rate: float) -> float:
    """Return the seconds of a plain training loop in one thread."""
    rng = np.random.default_rng(0)
    x = problem.initial_point(rng).astype(np.float32)
    problem.gradient(x, rng.integers(problem.n_samples, size=BATCH))
    started = time.perf_counter()
    for _ in range(updates):
        x -= rate * problem.gradient(x, rng.integers(problem.n_samples, size=BATCH))
    return time.perf_counter() - started


def measure(model: str, updates: int, directory: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    problem, rate = make(model), 0.1
    serial = serial_seconds(problem, updates, rate)
    config = asgd.make_config(
        {
            "problem": {"kind": KIND, "options": {"model": model}},
            "optimizer": {"learning_rate": rate, "batch_size": BATCH},
            "cluster": {"workers": WORKERS},
            "run": {"updates": updates, "eval_every": updates // 10},
        }
    )
    run = asgd.read_run(cluster.run(config, directory / model))
    seconds = run.trace["applied_seconds"].to_numpy()
    middle = slice(updates // 4, 3 * updates // 4)
    speed = np.diff(seconds[middle]).size / np.ptp(seconds[middle])
    torch.set_num_threads(WORKERS)
    study = Study.open(run.path)
    started = time.perf_counter()
    _, score = study.predict(paths=PATHS)
    predicted = time.perf_counter() - started
    return {
        "model": model,
        "parameters": problem.dim,
        "gradient_ms": 1e3 * serial / updates,
        "updates_per_s": speed,
        "of_ideal": speed * serial / updates / WORKERS,
        "serial_s": serial,
        "prediction_s": predicted,
        "prediction_over_serial": predicted / serial,
        "best_error": min(one.relative_error for one in score.models.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument("--updates", type=int, default=600)
    options = parser.parse_args()
    chosen = options.models.split(",")
    if unknown := set(chosen) - set(MODELS):
        parser.error(f"--models: {', '.join(sorted(unknown))}: expected of {', '.join(MODELS)}")
    with tempfile.TemporaryDirectory(prefix="asgd-networks-") as directory:
        for model in chosen:
            row = measure(model, options.updates, Path(directory))
            print("  ".join(f"{k} {v:.3g}" if k != "model" else v for k, v in row.items()))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
