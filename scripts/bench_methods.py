#!/usr/bin/env python3
"""Which method for which cluster: virtual seconds to a target loss, as a table and a figure.

.venv/bin/python -m scripts.bench_methods [--quick] [--seeds 10] [--out methods] [--only NAME,...]

16 workers make gradients of softmax regression on the digits and of a noisy quadratic, whose times
follow one of four laws; a gradient of an ordinary worker takes 1 s on average. Each method runs on
the parameter server and the workers of real runs, `cluster.core`, with a virtual clock: nothing
waits, and messages take no time, so that local steps save none. Its learning rate is the best of a
grid of as many values for each method, by the geometric mean of the seconds on seeds of their own.
A rate is given up at 1.5 times the seconds of the best so far, and a run that does not get there in
2000 s counts as that. `*` marks a rate at an end of its grid. The table has medians over the seeds;
the claims of papers are checked by ratios with standard errors over the seeds.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import numpy as np
from matplotlib import pyplot as plt
from threadpoolctl import threadpool_limits

from asgd.arrays import Array
from asgd.config import RunConfig, make_config
from asgd.draws import WorkerDraws
from asgd.local_steps import Pushes
from asgd.problems.base import Indices, Problem, starting_point
from asgd.problems.make import make_problem
from asgd.streams import stream
from cluster.core.messages import Gradient, Snapshot
from cluster.core.server import ParameterServer, Replies

WORKERS, BATCH = 16, 16
LONGEST = 2000.0  # virtual seconds
FINE = 1.03  # between two times at which the loss is looked at
OCTAVES = 8  # from one end of a grid to the other
TUNING_SEEDS, FIRST_SEED = 2, 100
GIVEN_UP = 1.5  # times the seconds of the best rate so far
TICKS = (30, 100, 300, 1000)  # virtual seconds
LARGE = 1e3  # times the first loss: the run is given up
Tables = dict[str, dict[str, Any]]


class Quadratic(Problem):
    """f = x^T A x / 2 with curvatures from 1 to 1/100, and noise that does not depend on x."""

    dim, n_samples, additive_noise = 100, 1000, True

    def __init__(self, noise: float = 0.5) -> None:
        self.curvature = np.geomspace(0.01, 1.0, self.dim)
        draws = stream(0, "bench_methods").standard_normal((self.n_samples, self.dim))
        self.shifts = noise * (draws - draws.mean(axis=0))

    def initial_point(self, rng: np.random.Generator) -> Array:
        """Return ones."""
        return np.ones(self.dim)

    def loss(self, x: Array) -> Array:
        """Return f(x)."""
        return np.asarray((self.curvature * x * x).sum(axis=-1) / 2)

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        """Return the mean gradient over a batch."""
        exact: Array = self.curvature * x
        return exact if indices is None else exact + self.shifts[indices].mean(axis=-2)


@dataclass(frozen=True)
class Task:
    """A problem and the loss to reach."""

    name: str
    kind: str
    target: float


@dataclass(frozen=True)
class Method:
    """A method: its configuration for a learning rate, and the rates of its grid.

    Attributes
    ----------
    tables
        Returns the tables of the configuration for a rate.
    largest
        Of the grid, for curvature 1.
    """

    name: str
    tables: Callable[[float], Tables]
    largest: float = 1.0


def optimizer(**keys: Any) -> Callable[[float], Tables]:
    return lambda rate: {"optimizer": {"learning_rate": rate, **keys}}


def policy(**keys: Any) -> Callable[[float], Tables]:
    return lambda rate: {"optimizer": {"learning_rate": rate}, "cluster": keys}


def local(
    steps: int, server: dict[str, Any] | None = None, **keys: Any
) -> Callable[[float], Tables]:
    return lambda rate: {
        "optimizer": {"local_steps": steps, "local_learning_rate": rate, **(server or {})},
        "cluster": keys,
    }


ASYNC, CAPPED, SYNC = "asynchronous", "capped step", "synchronous"
METHODS = (
    Method(ASYNC, optimizer(), 2.0),
    Method("step / (1 + staleness)", optimizer(rule="staleness_aware"), 8.0),
    Method(
        CAPPED,
        lambda rate: {
            "optimizer": {"rule": "capped", "learning_rate": rate, "cap": WORKERS * rate}
        },
        4.0,
    ),
    Method("momentum 0.9", optimizer(rule="momentum", momentum=0.9), 0.4),
    Method("Adam", optimizer(rule="adam"), 0.0625),
    Method("staleness <= 32", policy(mode="bounded", max_staleness=2 * WORKERS), 2.0),
    Method(SYNC, policy(mode="sync"), 16.0),
    Method("8 local steps", local(8), 0.25),
    Method("8 local steps, synchronous", local(8, mode="sync"), 8.0),
)
TASKS = (
    Task("softmax, digits", "softmax", 0.3),
    Task("quadratic", "scripts.bench_methods:Quadratic", 0.05),
)
LAW = {"law": "gamma", "variation": 0.25}
TIMES: dict[str, dict[str, Any]] = {
    "equal": {**LAW, "mean": 1.0},
    "one 10 x slower": {**LAW, "mean": [1.0] * (WORKERS - 1) + [10.0]},
    "lognormal, variation 2": {"law": "lognormal", "variation": 2.0, "mean": 1.0},
    "half 4 x slower": {**LAW, "mean": [1.0, 4.0] * (WORKERS // 2)},
}
DATA: dict[str, Tables] = {"shared": {}}


@dataclass(frozen=True)
class Cell:
    """A problem, the data of its workers, and the law of their times."""

    task: Task
    data: str
    times: str

    def config(self, method: Method, rate: float, seed: int) -> RunConfig:
        own = method.tables(rate)
        return make_config(
            {
                "problem": {"kind": self.task.kind},
                **DATA[self.data],
                "optimizer": {"batch_size": BATCH, **own["optimizer"]},
                "cluster": {
                    "workers": WORKERS,
                    "compute_time": TIMES[self.times],
                    **own.get("cluster", {}),
                },
                "run": {
                    "seed": seed,
                    **dict.fromkeys(("updates", "eval_every", "checkpoint_every"), 10**9),
                },
            }
        )


class VirtualRun:
    """The server and the workers of a run, with a virtual clock.

    A worker computes at once what arrives at the server when its time has passed.
    """

    def __init__(self, config: RunConfig, problem: Problem) -> None:
        start = starting_point(problem, config.run.seed)
        self.server = ParameterServer(config, start, n_samples=problem.n_samples)
        self._draws = WorkerDraws(config, problem)
        self._pushes = Pushes(config, problem, self._draws)
        self._arrivals: list[tuple[float, int, Gradient]] = []
        self._number = count()
        for worker in range(config.cluster.workers):
            self._deliver(self.server.join(worker, 0.0), 0.0)

    def points(self, times: Iterator[float]) -> Iterator[tuple[float, Array]]:
        """Yield the parameters at each of some times; they are valid until the next."""
        for until in times:
            while self._arrivals and self._arrivals[0][0] <= until:
                now, _, gradient = heapq.heappop(self._arrivals)
                self._deliver(self.server.receive(gradient, now), now)
            self.server.drain()
            if not self._arrivals:  # the server has stopped
                return
            yield until, self.server.parameters

    def _deliver(self, replies: Replies, now: float) -> None:
        for worker, reply in replies:
            if not isinstance(reply, Snapshot):
                continue
            number = reply.sequence
            pushed = self._pushes.push(
                worker, number, reply.parameters, reply.batch_size, reply.position
            )
            seconds = self._draws.compute_seconds(worker, number)
            gradient = Gradient(
                worker, number, reply.version, reply.epoch, np.array(pushed), seconds
            )
            heapq.heappush(self._arrivals, (now + seconds, next(self._number), gradient))


def seconds_to_target(config: RunConfig, problem: Problem, target: float, longest: float) -> float:
    """Return the virtual seconds until the loss is at the target; inf if it is not by `longest`."""
    first = float(problem.loss(starting_point(problem, config.run.seed)))
    moments = iter(np.geomspace(1.0, longest, 2 + int(math.log(longest) / math.log(FINE))))
    with np.errstate(all="ignore"):
        for seconds, x in VirtualRun(config, problem).points(map(float, moments)):
            loss = float(problem.loss(x))
            if loss <= target:
                return seconds
            if not loss < LARGE * first:
                break
    return math.inf


@dataclass(frozen=True)
class Result:
    """The seconds of a method in a cell, one for each seed, and its learning rate."""

    method: str
    cell: Cell
    rate: float
    at_edge: bool
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def logs(self) -> Array:
        return np.log(np.minimum(self.seconds, LONGEST))


def measured(cell: Cell, method: Method, rates: int, seeds: int) -> Result:
    """Tune the learning rate of a method in a cell and run it."""
    problem = make_problem(cell.config(method, 1.0, 0))
    grid = [method.largest / 2 ** (OCTAVES * i / rates) for i in range(rates)]
    best, chosen = math.inf, 0
    for i in sorted(range(rates), key=lambda i: abs(i - rates // 2)):  # from the middle
        rate = grid[i]
        found = 0.0
        for seed in range(FIRST_SEED, FIRST_SEED + TUNING_SEEDS):
            config = cell.config(method, rate, seed)
            longest = min(LONGEST, GIVEN_UP * best)
            found += math.log(seconds_to_target(config, problem, cell.task.target, longest))
            if math.isinf(found):
                break
        if math.exp(found / TUNING_SEEDS) < best:
            best, chosen = math.exp(found / TUNING_SEEDS), i
    runs = (cell.config(method, grid[chosen], seed) for seed in range(seeds))
    seconds = [seconds_to_target(run, problem, cell.task.target, LONGEST) for run in runs]
    return Result(method.name, cell, grid[chosen], chosen in (0, rates - 1), tuple(seconds))


# --- output -------------------------------------------------------------------------------------


def shown(result: Result) -> str:
    number = f"{result.median:.3g}" if math.isfinite(result.median) else f"> {LONGEST:.0f}"
    return f"{number}{'*' if result.at_edge else ''}"


def table(results: list[Result], task: Task, data: str) -> str:
    """Return the medians of a problem as a table of Markdown."""
    here = [r for r in results if (r.cell.task, r.cell.data) == (task, data)]
    lines = [
        f"{task.name}, data {data}: virtual seconds to loss {task.target:g}",
        "",
        f"| method | {' | '.join(TIMES)} |",
        f"|---|{'---|' * len(TIMES)}",
    ]
    for method in dict.fromkeys(r.method for r in here):
        row = [
            shown(r) for times in TIMES for r in here if (r.method, r.cell.times) == (method, times)
        ]
        lines.append(f"| {method} | {' | '.join(row)} |")
    return "\n".join(lines)


def ratio(one: Result, other: Result) -> str:
    """Return the seconds of one over those of the other, with a standard error over the seeds."""
    logs = one.logs - other.logs if len(one.logs) == len(other.logs) else np.array([math.nan])
    mean, error = float(logs.mean()), float(logs.std(ddof=1) / math.sqrt(len(logs)))
    return f"{math.exp(mean):.3g} +- {math.exp(mean) * error:.2g}"


def claims(results: list[Result]) -> list[str]:
    """Return what the results say about the claims of the papers, a line each."""
    known = {(r.method, r.cell): r for r in results}
    lines = []
    for cell in dict.fromkeys(r.cell for r in results):
        label = f"{cell.task.name}, data {cell.data}"
        if cell.times == "one 10 x slower":
            equal = Cell(cell.task, cell.data, "equal")
            for name in (ASYNC, CAPPED, SYNC):
                if {(name, cell), (name, equal)} <= known.keys():
                    one = ratio(known[name, cell], known[name, equal])
                    lines.append(f"{label}: one slow worker costs {name} x {one}")
        best = min((r for r in results if r.cell == cell), key=lambda r: float(r.logs.mean()))
        if (SYNC, cell) in known:
            over = ratio(known[SYNC, cell], best)
            lines.append(f"{label}, {cell.times}: {SYNC} over the best ({best.method}): {over}")
    return lines


def figure(results: list[Result], path: Path) -> None:
    """Draw the medians, and the range over the seeds, of every method: a panel for each problem."""
    look = {"font.size": 17, "axes.spines.top": False, "axes.spines.right": False}
    marks = dict(zip(TIMES, ("o", "X", "^", "s"), strict=True))
    colours = dict(zip(TIMES, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True))
    panels = list(dict.fromkeys((r.cell.task, r.cell.data) for r in results))
    methods = list(dict.fromkeys(r.method for r in results))
    with plt.rc_context(look):
        height = 2.2 + 0.62 * len(methods)
        size = (4.5 + 5.2 * len(panels), height)
        drawn, axes = plt.subplots(
            1,
            len(panels),
            figsize=size,
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for ax, (task, data) in zip(axes[0], panels, strict=True):
            for i, times in enumerate(TIMES):
                here = {
                    r.method: np.exp(r.logs) for r in results if r.cell == Cell(task, data, times)
                }
                y = np.array([methods.index(name) for name in here]) + 0.17 * (i - 1.5)
                middle = np.array([np.median(seconds) for seconds in here.values()])
                ends = np.array([(np.min(s), np.max(s)) for s in here.values()])
                ax.hlines(y, ends[:, 0], ends[:, 1], color=colours[times], lw=2)
                ax.plot(middle, y, marks[times], ms=10, color=colours[times], label=times)
            for line in range(1, len(methods)):
                ax.axhline(line - 0.5, color="#dddddd", lw=1)
            ax.set(xscale="log", xlabel="virtual seconds", title=f"{task.name}, data {data}")
            ax.set_xticks(TICKS, [f"{tick:,}" for tick in TICKS], minor=False)
            ax.minorticks_off()
            ax.grid(axis="x", color="#cccccc", lw=0.8)
            ax.set_axisbelow(True)
        axes[0, 0].set_yticks(range(len(methods)), methods)
        axes[0, 0].invert_yaxis()
        handles, labels = axes[0, 0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        drawn.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 seeds, 4 rates")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rates", type=int, default=8, help="learning rates of each grid")
    parser.add_argument("--only", default="", help="methods by name, with commas")
    parser.add_argument("--out", type=Path, default=Path("methods"))
    options = parser.parse_args()
    seeds, rates = (3, 4) if options.quick else (options.seeds, options.rates)
    names = options.only.split(",") if options.only else [method.name for method in METHODS]
    cells = [Cell(task, data, times) for task in TASKS for data in DATA for times in TIMES]
    results, begun = [], time.process_time()
    with threadpool_limits(1, user_api="blas"):
        for cell in cells:
            for method in (one for one in METHODS if one.name in names):
                results.append(measured(cell, method, rates, seeds))
                spent = time.process_time() - begun
                rate = results[-1].rate
                place = f"{cell.task.name}, {cell.data}, {cell.times}"
                print(
                    f"{spent:6.0f} s  {place}: {method.name}, rate {rate:.3g}: "
                    f"{shown(results[-1])}",
                    flush=True,
                )
    for task in TASKS:
        for data in DATA:
            print(f"\n{table(results, task, data)}")
    print("\n" + "\n".join(claims(results)))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "methods.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("problem", "data", "times", "method", "rate", "seed", "seconds"))
        for r in results:
            place = r.cell.task.name, r.cell.data, r.cell.times
            rows.writerows((*place, r.method, r.rate, i, s) for i, s in enumerate(r.seconds))
    figure(results, options.out / "methods.png")
    print(
        f"\n{options.out}/methods.png and .csv; {time.process_time() - begun:.0f} processor seconds"
    )


if __name__ == "__main__":
    main()
