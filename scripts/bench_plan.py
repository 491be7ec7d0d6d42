"""Checks plans against runs: python -m scripts.bench_plan [--quick] [--where real] [--csv FILE].

Each case is a problem with compute times, workers and a learning rate, from far below the limit to
1.5 times it. `analysis.plan` gets only the configuration: no staleness law, no recorded turns. The
case then runs with other seeds than the plan's, many times in virtual time, and in part on real
worker processes. Prints one row per case: what the plan says, how many runs diverge or swing, and
the predicted and observed updates to the plan's target, with the standard error of the observed
ones. Prints the aims at the end, and every miss with its reason.

A run swings if its loss rises above the initial loss by more than it was expected to fall below it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from analysis.exact.limits import stability_limits
from analysis.planning.pace import ConfiguredPace
from analysis.planning.plan import plan
from analysis.planning.row import PlanRow, updates_to
from analysis.prediction.run_stability import leading_curvatures
from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.errors import RunFailedError
from asgd.problems.base import Array, Indices, Problem, starting_point
from asgd.problems.make import make_problem
from asgd.rundir.reader import read_run
from asgd.simulation.simulate import simulate
from asgd.streams import stream

FEW = 0.05  # share of the runs that may diverge
CLOSE, HEAVY_CLOSE = 0.10, 0.25  # aimed at, of the updates to the target
FALSE_ALARMS = 0.10  # aimed at, of the choices called unstable
FRESH_SEED = 1000  # the plan has the seed 0

TIMES: dict[str, dict[str, Any]] = {
    "exponential": {"law": "exponential"},
    "one 4 times slower": {"law": "exponential"},
    "lognormal 1": {"law": "lognormal", "variation": 1.0},
    "lognormal 2": {"law": "lognormal", "variation": 2.0},
    "gamma .3": {"law": "gamma", "variation": 0.3},
    "constant": {"law": "constant"},
}
MEAN = 0.02  # seconds of a computation


class PhaseRetrieval(Problem):
    """f = mean of ((a_i . x)^2 - y_i)^2 / 8, y_i = (a_i . z)^2, a_i normal, |z| = 1.

    Two minima, a saddle of negative curvature between them, gradients like x^3.
    """

    def __init__(self, dim: int = 5, samples: int = 100) -> None:
        rng = stream(0, "phase retrieval")
        self.dim, self.n_samples = dim, samples
        self._rows = rng.standard_normal((samples, dim))
        truth = rng.standard_normal(dim)
        self._squares = (self._rows @ (truth / np.linalg.norm(truth))) ** 2
        self._start = rng.standard_normal(dim) / (2.0 * np.sqrt(dim))

    def initial_point(self, rng: np.random.Generator) -> Array:
        """Return x_0, of length about one half and the same for every seed."""
        return self._start

    def loss(self, x: Array) -> Array:
        """Return f(x), shape (...)."""
        error = (x @ self._rows.T) ** 2 - self._squares
        return np.asarray((error**2).mean(axis=-1) / 8.0)

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        """Return the mean gradient over a mini-batch, or grad f(x), shape (..., d)."""
        if indices is None:
            indices = np.arange(self.n_samples)
        rows = self._rows[indices]
        product = (rows @ x[..., None])[..., 0]
        weight = (product**2 - self._squares[indices]) * product / (2.0 * indices.shape[-1])
        return np.asarray((weight[..., None, :] @ rows)[..., 0, :])


class TanhNetwork(Problem):
    """Regression with v . tanh(W u): f = mean of squared errors / 2, on targets of a teacher."""

    def __init__(self, inputs: int = 4, hidden: int = 6, samples: int = 200) -> None:
        rng = stream(0, "tanh network")
        self._inputs, self._hidden = inputs, hidden
        self.dim, self.n_samples = hidden * (inputs + 1), samples
        self._data = rng.standard_normal((samples, inputs))
        teacher = rng.standard_normal(self.dim)
        self._targets = self._respond(teacher, self._data)[0]
        self._targets += 0.1 * rng.standard_normal(samples)
        self._start = 0.5 * rng.standard_normal(self.dim)

    def initial_point(self, rng: np.random.Generator) -> Array:
        """Return x_0, the same for every seed."""
        return self._start

    def loss(self, x: Array) -> Array:
        """Return f(x), shape (...)."""
        outputs, _, _ = self._respond(x, self._data)
        return np.asarray(((outputs - self._targets) ** 2).mean(axis=-1) / 2.0)

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        """Return the mean gradient over a mini-batch, or grad f(x), shape (..., d)."""
        if indices is None:
            indices = np.arange(self.n_samples)
        data = self._data[indices]
        outputs, active, outer = self._respond(x, data)
        error = (outputs - self._targets[indices]) / indices.shape[-1]
        to_outer = (error[..., None, :] @ active)[..., 0, :]
        back = error[..., None] * outer[..., None, :] * (1.0 - active**2)
        to_inner = back.swapaxes(-1, -2) @ data
        flat = to_inner.reshape(*to_inner.shape[:-2], -1)
        return np.concatenate([flat, to_outer], axis=-1)

    def _respond(self, x: Array, data: Array) -> tuple[Array, Array, Array]:
        """Return outputs (..., b), hidden activities (..., b, h) and outer weights (..., h)."""
        split = self._hidden * self._inputs
        inner = x[..., :split].reshape(*x.shape[:-1], self._hidden, self._inputs)
        outer = x[..., split:]
        active = np.tanh(data @ inner.swapaxes(-1, -2))
        return (active @ outer[..., :, None])[..., 0], active, outer


# Table, batch size, updates, and updates between two evaluations of the loss.
PROBLEMS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "softmax": ({"kind": "softmax"}, 64, 300, 5),
    "logistic": ({"kind": "logistic"}, 16, 600, 4),
    "least squares": ({"kind": "least_squares"}, 32, 600, 4),
    "quartic": ({"kind": "quartic", "initial": 1.5, "noise": 0.5}, 4, 600, 1),
    "double well": ({"kind": "double_well"}, 16, 600, 1),
    "phase retrieval": ({"kind": "scripts.bench_plan:PhaseRetrieval"}, 20, 600, 1),
    "tanh network": ({"kind": "scripts.bench_plan:TanhNetwork"}, 20, 600, 1),
    "convolution": ({"kind": "scripts.jax_networks:convolutional"}, 32, 600, 10),
    "perceptron": (
        {"kind": "scripts.methods_problems:Perceptron", "options": {"start": 0}},
        *(32, 600, 10),
    ),
}
LONG = ("softmax", "logistic", "least squares", "convolution", "perceptron")  # runs take long
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.5)  # of the almost-sure limit
WORKERS = (4, 8, 16)
REAL = 7  # one of so many choices also runs on real workers


@dataclass(frozen=True)
class Case:
    """One choice; its rate is `share` of the almost-sure limit for the largest `curvature`."""

    problem: str
    times: str
    workers: int
    share: float
    real: bool = False

    def config(self) -> RunConfig:
        """Return the configuration, the only input of the plan."""
        table, batch, updates, every = PROBLEMS[self.problem]
        mean: float | list[float] = MEAN
        if self.times == "one 4 times slower":
            mean = [MEAN] * (self.workers - 1) + [4 * MEAN]
        data = {
            "problem": table,
            "optimizer": {"batch_size": batch, "learning_rate": self._learning_rate(mean)},
            "cluster": {
                "workers": self.workers,
                "compute_time": {**TIMES[self.times], "mean": mean},
            },
            "run": {"updates": updates, "eval_every": every},
        }
        return make_config(data)

    def _learning_rate(self, mean: float | list[float]) -> float:
        cluster = {"workers": self.workers, "compute_time": {**TIMES[self.times], "mean": mean}}
        pace = ConfiguredPace(make_config({"cluster": cluster}))(self.workers, 1)
        assert pace.server is not None
        limit = stability_limits(pace.server).almost_sure.value / curvature(self.problem)
        return float(f"{self.share * limit:.3g}")

    @property
    def more(self) -> int:
        """Factor by which problems with cheap runs of large scatter get more runs."""
        return 1 if self.problem in LONG else 4

    def __str__(self) -> str:
        return f"{self.problem}, {self.times}, P = {self.workers}, {self.share:g}"


@cache
def curvature(name: str) -> float:
    """Return the largest curvature at the start or where gradient descent from there ends."""
    problem = make_problem(make_config({"problem": PROBLEMS[name][0]}))
    x = starting_point(problem, 0)
    first = float(leading_curvatures(problem, x)[0])
    rate = 0.3 / max(first, 1.0)
    for _ in range(500):
        x = x - rate * problem.gradient(x)
    return max(first, float(leading_curvatures(problem, x)[0]))


def cases() -> Iterator[Case]:
    """Yield every problem with all compute times, shares and workers in turn."""
    for i, problem in enumerate(PROBLEMS):
        for j, times in enumerate(TIMES):
            number = i * len(TIMES) + j
            share = SHARES[(i + j) % len(SHARES)]
            real = number % REAL == REAL - 1
            yield Case(problem, times, WORKERS[(i + 2 * j) % len(WORKERS)], share, real)


QUICK = (
    Case("double well", "lognormal 1", 4, 0.25),
    Case("quartic", "one 4 times slower", 8, 1.5),
    Case("phase retrieval", "exponential", 8, 0.5),
    Case("logistic", "gamma .3", 4, 0.25),
    Case("tanh network", "constant", 8, 0.5, real=True),
)


@dataclass(frozen=True)
class Observed:
    """Losses of runs of one choice at their evaluations, nan once a run has diverged."""

    update: np.ndarray
    loss: Array

    @property
    def diverged(self) -> np.ndarray:
        """Which runs diverged, shape (runs,)."""
        return np.isnan(self.loss[-1])

    def lost(self, way: float) -> np.ndarray:
        """Return which runs diverged or rose above their start by more than `way`."""
        with np.errstate(invalid="ignore"):
            swings = (self.loss > self.loss[0] + way).any(axis=0)
        return self.diverged | swings

    def updates_to(self, target: float, heavy: bool) -> float:
        """Return when the median, or the mean of runs that did not diverge, reaches the target."""
        kept = np.where(np.isnan(self.loss), np.inf, self.loss)
        curve = np.median(kept, axis=1) if heavy else kept[:, ~self.diverged].mean(axis=1)
        found = updates_to(self.update, curve, target)
        return np.nan if found is None else float(found)

    def scatter(self, target: float, heavy: bool, draws: int = 200) -> float:
        """Return the standard error of `updates_to`, by resampling runs."""
        rng, runs = stream(0, "bootstrap"), self.loss.shape[1]
        picks = [rng.integers(runs, size=runs) for _ in range(draws)]
        some = [Observed(self.update, self.loss[:, pick]) for pick in picks]
        values = [one.updates_to(target, heavy) for one in some if not one.diverged.all()]
        return float(np.nanstd(values)) if np.isfinite(values).any() else np.nan


def observe(
    config: RunConfig, runs: int, directory: Path, run_one: Callable[..., object]
) -> Observed:
    """Run a configuration with fresh seeds; a failed run counts as diverged."""
    every, updates = config.run.eval_every, config.run.updates
    update = np.unique(np.append(np.arange(0, updates + 1, every), updates))
    loss = np.full((len(update), runs), np.nan)
    for number in range(runs):
        settings = msgspec.structs.replace(config.run, seed=FRESH_SEED + number)
        path = directory / str(number)
        try:
            run_one(msgspec.structs.replace(config, run=settings), path)
        except RunFailedError:
            continue
        found = read_run(path).loss
        loss[:, number] = np.interp(update, found["update"], found["loss"])
    if np.isnan(loss[0]).all():
        loss[0] = 0.0
    loss[0] = np.nanmin(loss[0])  # all begin at one point
    return Observed(update, loss)


def measure(
    case: Case, runs: int, directory: Path, run_one: Callable[..., object], where: str
) -> dict[str, Any]:
    """Plan one choice, run it, and return its row of the table."""
    config = case.config()
    started = time.perf_counter()
    rate, batch = config.optimizer.learning_rate, config.optimizer.batch_size
    found = plan(config, workers=[case.workers], learning_rates=[rate], batch_sizes=[batch])
    seconds = time.perf_counter() - started
    row, observed = found.rows[0], observe(config, runs, directory, run_one)
    first = float(row.paths.loss[0, 0])
    way = first - min(first, float(np.min(row.median)))
    lost = float(observed.lost(way).mean())
    if not row.stable or observed.diverged.all():
        predicted, seen, error = row.updates_to_target, np.nan, np.nan
    else:
        predicted = row.updates_to_target
        seen = observed.updates_to(found.target, row.heavy_tailed)
        error = observed.scatter(found.target, row.heavy_tailed)
    result = {
        "choice": str(case),
        "where": where,
        "runs": runs,
        "learning rate": rate,
        "of limit": f"{100 * row.of_limit:.0f} %",
        "plan": row.remark or "stable",
        "best": found.best is not None,
        "diverged": int(observed.diverged.sum()),
        "diverged or swung": round(lost * runs),
        "predicted updates": "" if predicted is None else predicted,
        "observed updates": "" if np.isnan(seen) else int(seen),
        "+-": "" if np.isnan(error) else round(error, 1),
        "plan seconds": round(seconds, 1),
    }
    return result | judge(row, observed, predicted, seen, error, lost)


def judge(
    row: PlanRow, observed: Observed, predicted: int | None, seen: float, error: float, lost: float
) -> dict[str, str]:
    """Return which aim was missed, and the likeliest reason."""
    diverged = float(observed.diverged.mean())
    if not row.stable:
        missed = "false alarm" if lost <= FEW else ""
        return {"missed": missed, "reason": missed and "the plan's swings or limit"}
    if diverged > FEW:
        return {"missed": "diverges", "reason": f"{100 * diverged:.0f} % of runs"}
    if predicted is None or np.isnan(seen):
        missed = "" if (predicted is None) == bool(np.isnan(seen)) else "target"
        return {"missed": missed, "reason": missed and "only one of the two gets there"}
    aim = HEAVY_CLOSE if row.heavy_tailed else CLOSE
    off = abs(predicted - seen)
    if off <= aim * seen:
        return {"missed": "", "reason": ""}
    reason = "scatter of the runs" if off < 2 * error else "the prediction"
    if off <= 2:
        reason = "a few updates"
    return {"missed": "updates", "reason": reason}


def summary(table: pd.DataFrame) -> list[str]:
    """Return one line for each aim, with the share of choices that met it."""
    unstable = table["plan"].str.startswith("unstable")
    stable = table[~unstable]
    heavy = stable["plan"].str.contains("heavy|at the end")
    wild = stable["missed"] == "diverges"
    false = int((table.loc[unstable, "missed"] == "false alarm").sum())
    both = stable[(stable["predicted updates"] != "") & (stable["observed updates"] != "")]
    error = both["predicted updates"].astype(float) / both["observed updates"].astype(float) - 1
    lines = [
        f"{len(table)} choices, {int(unstable.sum())} called unstable.",
        f"Called stable, more than {100 * FEW:.0f} % of runs diverge: {int(wild[~heavy].sum())} of "
        f"{int((~heavy).sum())} (aim: none); with a heavy tail: {int(wild[heavy].sum())} of "
        f"{int(heavy.sum())}.",
        f"Called unstable and fine: {false} of {int(unstable.sum())} (aim: under "
        f"{100 * FALSE_ALARMS:.0f} %).",
    ]
    tail = heavy[both.index]
    parts = ("", error[~tail], CLOSE), (" (heavy tail)", error[tail], HEAVY_CLOSE)
    for name, part, aim in parts:
        if len(part):
            lines.append(
                f"Updates to target{name}: {int((part.abs() <= aim).sum())} of {len(part)} within "
                f"{100 * aim:.0f} %, median error {100 * part.abs().median():.1f} %, largest "
                f"{100 * part.abs().max():.0f} %."
            )
    missed = int((table["missed"] != "").sum())
    return [*lines, f"Missed in {missed} rows, each with its reason in the table."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="five choices")
    parser.add_argument(
        "--runs",
        type=int,
        help="simulated runs of a choice (default 12, four times as many where they are cheap)",
    )
    parser.add_argument("--real-runs", type=int, default=4, help="real runs of a choice")
    parser.add_argument(
        "--where",
        choices=("both", "simulated", "real"),
        default="both",
        help="choices run in virtual time, some of them on worker processes, or both",
    )
    parser.add_argument("--problems", help="only these, such as perceptron,convolution")
    parser.add_argument("--only", help="only names with this, such as 'lognormal 1, P = 16'")
    parser.add_argument("--csv", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    runs = arguments.runs or 12
    chosen = QUICK if arguments.quick else tuple(cases())
    if arguments.problems:
        chosen = tuple(case for case in chosen if case.problem in arguments.problems.split(","))
    if arguments.only:
        chosen = tuple(case for case in chosen if arguments.only in str(case))
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        if arguments.csv:
            pd.DataFrame(rows).to_csv(arguments.csv, index=False)
        if len(rows) == 1:
            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)

    with tempfile.TemporaryDirectory() as directory:
        for number, case in enumerate(chosen if arguments.where != "real" else ()):
            place = Path(directory) / str(number)
            add(measure(case, case.more * runs, place, simulate, "simulated"))
        if arguments.where != "simulated" and any(case.real for case in chosen):
            os.environ["PYTHONPATH"] = os.getcwd()  # where workers find this file
            from cluster.launch import run
            from cluster.local_ray.session import ray_session

            with ray_session():
                for number, case in enumerate(chosen):
                    if case.real:
                        place = Path(directory) / f"real-{number}"
                        add(measure(case, arguments.real_runs, place, run, "real"))
    print()
    for line in summary(pd.DataFrame(rows)):
        print(line)
    print(f"{time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
