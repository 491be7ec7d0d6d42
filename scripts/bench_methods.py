#!/usr/bin/env python3
"""Which method for which cluster: virtual seconds to a loss, as tables and a figure.

.venv/bin/python -m scripts.bench_methods [--quick] [--processes N] [--out methods]
.venv/bin/python -m scripts.bench_methods --message 4 --only "asynchronous;8 local steps"
.venv/bin/python -m scripts.bench_methods --real     four of its cells on Ray, some minutes

16 workers make gradients of softmax regression and of a perceptron on the digits, from all samples
or from those of their own classes, and of a noisy quadratic. Their times follow one of four laws; a
gradient of an ordinary worker takes 1 s on average. Each method runs on the parameter server and
the workers of real runs, `cluster.core`, with a virtual clock: nothing waits. Messages take
`--message` seconds each way, 0 by default, so that local steps save nothing.

The learning rate of a method is the best of a grid, by the geometric mean of the seconds over
separate seeds; all grids have equally many values. A rate is abandoned after 1.5 times the seconds
of the best rate so far, or after 60 or 250 s if another rate reaches the loss by then; a run longer
than 1000 s counts as 1000 s. Tables show medians over the seeds, with `*` for a rate at an end of
its grid. The claims of papers are checked by ratios with standard errors over the seeds. Results in
OUT/methods.csv are shown, not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.problems.make import make_problem
from cluster.local_ray.session import ray_session
from scripts.methods_runs import real_seconds, virtual_seconds
from scripts.methods_shown import Place, Result, Store, compared, figure, table

WORKERS, BATCH = 16, 16
LOG = math.log(WORKERS)  # "up to logarithmic factors"
LONGEST = 1000.0  # virtual seconds
HORIZONS = (60.0, 250.0, LONGEST)  # tried in turn until a rate reaches the loss
OCTAVES = 8  # from one end of a grid to the other
TUNING_SEEDS, FIRST_SEED = 2, 100
GIVEN_UP = 1.5  # a rate is abandoned after so many times the seconds of the best so far
Tables = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """A method: its configuration for a learning rate, and the rates of its grid.

    Attributes
    ----------
    tables
        Returns the tables of the configuration for a rate.
    largest
        The largest rate of the grid, for curvature 1.
    """

    name: str
    tables: Callable[[float], Tables]
    largest: float = 2.0


def optimizer(**keys: Any) -> Callable[[float], Tables]:
    return lambda rate: {"optimizer": {"learning_rate": rate, **keys}}


def policy(**keys: Any) -> Callable[[float], Tables]:
    return lambda rate: {"optimizer": {"learning_rate": rate}, "cluster": keys}


def local(steps: int, **keys: Any) -> Callable[[float], Tables]:
    return lambda rate: {
        "optimizer": {"local_steps": steps, "local_learning_rate": rate},
        "cluster": keys,
    }


def capped(rate: float) -> Tables:
    return {"optimizer": {"rule": "capped", "learning_rate": rate, "cap": WORKERS * rate}}


ASYNC, CAPPED, SYNC = "asynchronous", "capped step", "synchronous"
RENNALA = "Rennala, K = 16"
RINGMASTERS = {several * WORKERS: f"Ringmaster, R = {several * WORKERS}" for several in (2, 8)}
FASTEST = {several: f"{several} fastest of 16" for several in (12, 8)}
METHODS = (
    Method(ASYNC, optimizer()),
    Method("step / (1 + staleness)", optimizer(rule="staleness_aware"), 8.0),
    Method(CAPPED, capped, 4.0),
    Method("momentum 0.9", optimizer(rule="momentum", momentum=0.9), 0.4),
    Method("Adam", optimizer(rule="adam"), 0.0625),
    Method("staleness <= 32", policy(mode="bounded", max_staleness=2 * WORKERS)),
    *(Method(name, policy(discard_above=most)) for most, name in RINGMASTERS.items()),
    Method("FedBuff, K = 8", policy(mode="buffered", gradients_per_update=8), 8.0),
    Method(RENNALA, policy(mode="buffered", gradients_per_update=WORKERS, discard_above=0), 16.0),
    Method(SYNC, policy(mode="sync"), 16.0),
    *(
        Method(name, policy(mode="sync", gradients_per_update=several), 16.0)
        for several, name in FASTEST.items()
    ),
    Method("8 local steps", local(8), 0.25),
    Method("8 local steps, synchronous", local(8, mode="sync"), 8.0),
)
BY_NAME = {method.name: method for method in METHODS}
# A problem and the loss to reach.
PROBLEMS: dict[str, tuple[str, float]] = {
    "softmax": ("softmax", 0.3),
    "perceptron": ("scripts.methods_problems:Perceptron", 0.5),
    "quadratic": ("scripts.methods_problems:Quadratic", 0.05),
}
LAW = {"law": "gamma", "variation": 0.25}
EQUAL, ONE_SLOW, WIDE = "equal", "one 10 x slower", "lognormal, variation 2"
TIMES: dict[str, dict[str, Any]] = {
    EQUAL: {**LAW, "mean": 1.0},
    ONE_SLOW: {**LAW, "mean": [1.0] * (WORKERS - 1) + [10.0]},
    WIDE: {"law": "lognormal", "variation": 2.0, "mean": 1.0},
    "half 4 x slower": {**LAW, "mean": [1.0, 4.0] * (WORKERS // 2)},
}
DATA: dict[str, Tables] = {"shared": {}, "by label": {"data": {"shards": "by_label"}}}
PANELS = [
    ("softmax", "shared"),
    ("softmax", "by label"),
    ("perceptron", "shared"),
    ("perceptron", "by label"),
    ("quadratic", "shared"),
]
REAL = [(ASYNC, ONE_SLOW), (SYNC, ONE_SLOW), (RINGMASTERS[2 * WORKERS], WIDE), (RENNALA, WIDE)]


def configure(place: Place, method: Method, rate: float, seed: int, **run: Any) -> RunConfig:
    """Return the configuration of a run; nothing is evaluated or saved unless `run` says so."""
    own = method.tables(rate)
    never = dict.fromkeys(("updates", "eval_every", "checkpoint_every"), 10**9)
    return make_config(
        {
            "problem": {"kind": PROBLEMS[place.problem][0]},
            **DATA[place.data],
            "optimizer": {"batch_size": BATCH, **own["optimizer"]},
            "cluster": {
                "workers": WORKERS,
                "compute_time": TIMES[place.times],
                **own.get("cluster", {}),
            },
            "run": {"seed": seed, **never, **run},
        }
    )


def measured(
    choice: tuple[Place, str], rates: int, seeds: int, message: float
) -> tuple[Result, float]:
    """Tune the learning rate of a method at a place and run it; also return processor seconds."""
    begun = time.process_time()
    place, method = choice[0], BY_NAME[choice[1]]
    problem = make_problem(configure(place, method, 1.0, 0))
    target = PROBLEMS[place.problem][1]

    def seconds(rate: float, seed: int, longest: float) -> float:
        config = configure(place, method, rate, seed)
        return virtual_seconds(config, problem, target, longest, message)

    grid = [method.largest / 2 ** (OCTAVES * i / rates) for i in range(rates)]
    best, chosen = math.inf, -1
    for horizon, i in product(HORIZONS, range(rates)):
        if i == 0 and chosen >= 0:
            break
        longest, found = min(horizon, GIVEN_UP * best), 0.0
        for seed in range(FIRST_SEED, FIRST_SEED + TUNING_SEEDS):
            found += math.log(seconds(grid[i], seed, longest))
            if math.isinf(found):
                break
        if math.exp(found / TUNING_SEEDS) < best:
            best, chosen = math.exp(found / TUNING_SEEDS), i
    if chosen < 0:  # no rate reaches the loss
        never = Result(place, method.name, math.nan, False, (math.inf,) * seeds, LONGEST)
        return never, time.process_time() - begun
    each = tuple(seconds(grid[chosen], seed, LONGEST) for seed in range(seeds))
    at_edge = chosen in (0, rates - 1)
    result = Result(place, method.name, grid[chosen], at_edge, each, LONGEST)
    return result, time.process_time() - begun


def measure(store: Store, choices: list[tuple[Place, str]], options: argparse.Namespace) -> None:
    """Measure the results that the store lacks."""
    missing = [choice for choice in choices if choice not in store.results]
    seeds, rates = (3, 4) if options.quick else (options.seeds, options.rates)
    work = partial(measured, rates=rates, seeds=seeds, message=options.message)
    with ProcessPoolExecutor(
        options.processes, get_context("spawn"), initializer=one_thread
    ) as pool:
        for result, spent in pool.map(work, missing):
            store.add(result)
            place = ", ".join((result.place.problem, result.place.data, result.place.times))
            told = f"{place}: {result.method}, rate {result.rate:.3g}: {result} s"
            print(f"{told} ({spent:.0f} processor seconds)", flush=True)


def one_thread() -> None:
    """Compute with one thread in this process."""
    threadpool_limits(1, user_api="blas")


def claims(store: Store) -> list[str]:
    """Compare the results with three claims; return one line for each comparison."""

    def line(what: str, one: tuple[Place, str], other: tuple[Place, str], limit: float) -> str:
        ratio = compared(store.results, one, other)
        return "" if ratio is None else f"- {what}: {ratio}: {ratio.at_most(limit)}"

    slow = WORKERS / (WORKERS - 1 + 0.1)  # times the gradients a second with one slow worker
    hurt, master, sync = (
        [
            f"One worker 10 times slower does not hurt the capped step (Mishchenko et al. 2022): "
            f"at most {slow:.2f}, for the gradients that it does not make:"
        ],
        ["Ringmaster is at least as fast (Tyurin and Richtarik 2025): at most 1:"],
        [f"Synchronous is near the best (arXiv 2602.03802): at most ln 16 = {LOG:.2f}:"],
    )
    for panel in PANELS:
        here = ", ".join(panel)
        equal, one_slow = Place(*panel, EQUAL), Place(*panel, ONE_SLOW)
        hurt += [
            line(f"{here}: {name}", (one_slow, name), (equal, name), slow)
            for name in (CAPPED, ASYNC, SYNC)
        ]
        for place in (Place(*panel, times) for times in TIMES):
            what, found = f"{here}, {place.times}", store.at(place)
            if place != equal:
                master += [
                    line(
                        f"{what}: {ringmaster} over {name}", (place, ringmaster), (place, name), 1.0
                    )
                    for ringmaster in RINGMASTERS.values()
                    for name in (ASYNC, RENNALA)
                ]
            if found:
                best = min(found, key=lambda r: float(r.logs.mean())).method
                sync += [
                    line(f"{what}: {name} over {best}", (place, name), (place, best), LOG)
                    for name in (SYNC, *FASTEST.values())
                    if name != best
                ]
    return [one for claim in (hurt, master, sync) for one in ("", *filter(None, claim))]


def scaled(config: RunConfig, second: float) -> RunConfig:
    """Return a configuration whose compute times have another unit."""
    data = json.loads(config.to_json())
    times = data["cluster"]["compute_time"]
    means = times["mean"] if isinstance(times["mean"], list) else [times["mean"]] * WORKERS
    return make_config(
        data
        | {
            "cluster": data["cluster"]
            | {"compute_time": times | {"mean": [second * mean for mean in means]}}
        }
    )


def on_ray(store: Store, seeds: int, second: float) -> list[str]:
    """Run four cells of softmax on Ray; `second` is the length of a virtual second there."""
    target = PROBLEMS["softmax"][1]
    lines = [
        f"softmax, shared: virtual seconds to loss {target:g} in virtual time and on Ray",
        "",
        "| method | times | virtual: median (range) | Ray |",
        "|---|---|---|---|",
    ]
    for name, times in REAL:
        place, method = Place("softmax", "shared", times), BY_NAME[name]
        known = store.results[place, name]
        ran = []
        for seed in range(seeds):
            config = configure(place, method, known.rate, seed, eval_every=1, updates=10**6)
            seconds = real_seconds(scaled(config, second), target, LONGEST * second)
            ran.append(seconds / second)
            print(f"{name}, {times}, seed {seed}: {ran[-1]:.3g} virtual seconds on Ray", flush=True)
        ends = f"({min(known.seconds):.3g} to {max(known.seconds):.3g})"
        shown = " ".join(f"{one:.3g}" for one in ran)
        lines.append(f"| {name} | {times} | {known} {ends} | {shown} |")
    return lines


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 seeds, 4 rates")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rates", type=int, default=8, help="learning rates of each grid")
    parser.add_argument("--only", default="", help="methods by name, with semicolons")
    parser.add_argument("--problem", choices=PROBLEMS)
    parser.add_argument("--data", choices=DATA)
    parser.add_argument("--message", type=float, default=0.0, help="virtual seconds, one way")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("methods"))
    parser.add_argument("--real", action="store_true", help="repeat four cells on Ray")
    parser.add_argument("--second", type=float, default=0.1, help="real seconds per virtual second")
    options = parser.parse_args()
    panels = [
        (problem, data)
        for problem, data in PANELS
        if options.problem in (None, problem) and options.data in (None, data)
    ]
    names = options.only.split(";") if options.only else list(BY_NAME)
    choices = [(Place(*panel, times), name) for panel, times, name in product(panels, TIMES, names)]
    if options.real:
        choices = [(Place("softmax", "shared", times), name) for name, times in REAL]
    store = Store(options.out / "methods.csv", LONGEST)
    measure(store, choices, options)
    if options.real:
        with ray_session():
            print("\n".join(["", *on_ray(store, 3, options.second)]))
        return
    results = {panel: store.of(*panel) for panel in PANELS}
    for panel, here in results.items():
        if here:
            print(f"\n{', '.join(panel)}: virtual seconds to loss {PROBLEMS[panel[0]][1]:g}\n")
            print(table(here, BY_NAME, list(TIMES)))
    print("\n".join(claims(store)))
    shown = [result for here in results.values() for result in here]
    figure(shown, list(BY_NAME), list(TIMES), options.out / "methods.png")
    print(f"\n{options.out}/methods.png and .csv")


if __name__ == "__main__":
    main()
