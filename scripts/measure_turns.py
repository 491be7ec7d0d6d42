"""Measures how well modelled turns predict a server: python scripts/measure_turns.py [pool] [real].

pool: E x^2 of (P2), by clocks and by hazards of age, and of (P3) from one and from eight recorded
runs, against an event-driven server in virtual time. E x^2 is exact given the turns, so only the
turns are random. real: the staleness of real runs without added compute time: its variance in each
repeat, and its distance from a queue with the workers' measured cycles, beside that of simulated
runs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from analysis.exact.given_reads import read_moments, turn_reads
from analysis.exact.linear_gradients import LinearGradients
from analysis.models.clocks import pool_turns
from analysis.models.pool import PoolTurns, TurnMaker
from analysis.models.recorded_turns import RecordedTurns, ResampledTurns
from analysis.models.turns import Turns, pool_hazards
from analysis.profile.queueing import check_queue
from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.delays import ComputeTime
from asgd.problems.scalar import Quadratic
from asgd.rundir.repeats import read_runs, run_repeats
from asgd.simulation.order import simulate_staleness
from asgd.simulation.simulate import simulate
from asgd.staleness.empirical import Empirical
from asgd.streams import stream

WORKERS, UPDATES, RUNS = 8, 400, 6_000
RECORDED = 200_000  # updates from which a law is measured
RECORDS = 6  # sets of recorded runs whose errors are averaged
WINDOWS = (slice(0, 100), slice(100, UPDATES))


@dataclass(frozen=True)
class Case:
    """Compute times of mean one, the first worker's of mean `slowest`, and eta times curvature."""

    law: str
    variation: float
    step: float
    slowest: float = 1.0

    @property
    def times(self) -> ComputeTime:
        return ComputeTime(self.law, np.array([self.slowest, *[1.0] * 7]), self.variation)

    def __str__(self) -> str:
        slow = f", one worker {self.slowest:g} times slower" if self.slowest > 1 else ""
        return f"{self.law} {self.variation:g}{slow}"


# Three quarters of the mean-square limit (`analysis.stability_limits`).
CASES = (
    Case("gamma", 0.1, 0.16),
    Case("gamma", 0.35, 0.19),
    Case("gamma", 0.5, 0.22),
    Case("exponential", 1.0, 0.42),
    Case("lognormal", 1.0, 0.35),
    Case("lognormal", 2.0, 0.5),
    Case("exponential", 1.0, 0.44, slowest=4.0),
)


class EventTurns:
    """An event-driven server: the worker whose compute time is over first has the turn."""

    def __init__(self, times: ComputeTime, paths: int, rng: np.random.Generator) -> None:
        self.workers, self.times, self.rng, self.row = len(times.mean), times, rng, np.arange(paths)
        relative = times.draw_relative(paths * self.workers, rng).reshape(paths, -1)
        self.due = times.mean * relative

    def next(self) -> npt.NDArray[np.int64]:
        worker: npt.NDArray[np.int64] = self.due.argmin(axis=1)
        drawn = self.times.draw_relative(len(worker), self.rng)
        self.due[self.row, worker] += self.times.mean[worker] * drawn
        return worker


def squares(turns: PoolTurns, step: float, runs: int) -> npt.NDArray[np.float64]:
    """Return E x^2 given the turns of each run, f = x^2, shape (updates, runs)."""
    moments = read_moments(
        LinearGradients.of(Quadratic()),
        step / Quadratic().curvature,
        turn_reads(turns, runs),
        batch_size=1,
        initial=np.ones(1),
        record=np.arange(1, UPDATES + 1),
    )
    return np.array([mean[:, 0] ** 2 + cov[:, 0, 0] for mean, cov in moments])


def pool_table() -> None:
    print(
        f"E x^2 of f = x^2, P = {WORKERS}, {UPDATES} updates, {RUNS} runs each: mean over updates "
        f"of the difference to the server, in % of its mean there, signed; then its standard error."
        f"\nFirst {WINDOWS[0].stop} updates / the rest; (P3): mean size over {RECORDS} sets of runs"
    )
    print("| compute times | eta a | clocks | hazards | +- | (P3), 8 runs | (P3), 1 run |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        print(f"| {case} | {case.step} | " + " | ".join(pool_row(case)) + " |", flush=True)


def pool_row(case: Case) -> list[str]:
    rng = stream(0, f"turns/{case}")
    order = simulate_staleness(case.times, RECORDED, rng)
    late = slice(100 * WORKERS, None)
    tau, worker = order.staleness[late], order.worker[late]
    if case.slowest > 1:
        laws = [Empirical.from_sample(tau[worker == number]) for number in range(WORKERS)]
    else:
        laws = [Empirical.from_sample(tau)] * WORKERS
    exact = squares(EventTurns(case.times, 2 * RUNS, rng), case.step, 2 * RUNS)
    makers: tuple[TurnMaker, ...] = (
        pool_turns(laws, rng),
        partial(Turns, pool_hazards(laws, rng)),
    )
    found = [squares(turns(RUNS, rng), case.step, RUNS) for turns in makers]
    cells = [pair([off(one, exact, window) for window in WINDOWS], "+") for one in found]
    cells.append(pair([standard_error(found[0], exact, window) for window in WINDOWS]))
    for records in (8, 1):
        sizes = [recorded_error(case, records, exact, rng) for _ in range(RECORDS)]
        cells.append(pair(np.abs(sizes).mean(axis=0).tolist()))
    return cells


def off(one: npt.NDArray[np.float64], exact: npt.NDArray[np.float64], window: slice) -> float:
    """Return the relative error of the mean over a window, in %."""
    return 100 * float(one[window].mean() / exact[window].mean() - 1)


def standard_error(
    one: npt.NDArray[np.float64], exact: npt.NDArray[np.float64], window: slice
) -> float:
    """Return the standard error of `off`; runs are independent, updates are not."""
    own, other = (v[window].mean(axis=0) for v in (one, exact))
    spread = np.hypot(own.std() / np.sqrt(own.size), other.std() / np.sqrt(other.size))
    return 100 * float(spread / other.mean())


def recorded_error(
    case: Case, records: int, exact: npt.NDArray[np.float64], rng: np.random.Generator
) -> list[float]:
    """Return the error of (P3) from so many recorded runs in each window, in %."""
    runs = [simulate_staleness(case.times, UPDATES, rng).worker for _ in range(records)]
    turns = ResampledTurns(RecordedTurns.of(runs), RUNS // 6, rng)
    ours = squares(turns, case.step, RUNS // 6)
    return [off(ours, exact, window) for window in WINDOWS]


def pair(values: list[float], sign: str = "") -> str:
    return " / ".join(f"{value:{sign}.1f}" for value in values)


REAL = (
    ("softmax", 8, 0.3, 128, 200),
    ("softmax", 4, 0.3, 128, 400),
    ("least_squares", 8, 0.05, 64, 400),
    ("logistic", 8, 0.05, 32, 400),
)


def real_config(
    problem: str, workers: int, rate: float, batch: int, updates: int, repeats: int, law: str
) -> RunConfig:
    return make_config(
        {
            "problem": {"kind": problem},
            "optimizer": {"learning_rate": rate, "batch_size": batch},
            "cluster": {"workers": workers, "compute_time": {"law": law, "mean": 0.01}},
            "run": {"updates": updates, "eval_every": updates, "repeats": repeats},
        }
    )


def real_table(repeats: int) -> None:
    from cluster.launch import run
    from cluster.local_ray.session import ray_session

    print("| runs | P | variance of the staleness, by repeat | distance of the queue | by chance |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        with ray_session():
            for number, setting in enumerate(REAL):
                config = real_config(*setting, repeats, "none")
                name = f"{setting[0]}, real, no delay"
                print_real(name, config, Path(directory) / f"real-{number}", run)
        for number, setting in enumerate(REAL[1:3]):
            config = real_config(*setting, repeats, "exponential")
            name = f"{setting[0]}, simulated, exponential"
            print_real(name, config, Path(directory) / f"simulated-{number}", simulate)


def print_real(
    name: str, config: RunConfig, directory: Path, run_one: Callable[..., object]
) -> None:
    runs = read_runs(run_repeats(config, directory, run_one))
    late = 4 * config.cluster.workers
    variances = [one.trace["staleness"].to_numpy()[late:].var() for one in runs]
    checks = [check_queue(one) for one in runs]
    distance = sorted(check.distance for check in checks)
    print(
        f"| {name} | {config.cluster.workers} | {', '.join(f'{v:.1f}' for v in sorted(variances))} "
        f"| {distance[0]:.2f} to {distance[-1]:.2f} | {max(c.chance for c in checks):.2f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="pool, real; both by default")
    parser.add_argument("--repeats", type=int, default=8, help="repeats of each run in part real")
    arguments = parser.parse_args()
    chosen = arguments.parts or ("pool", "real")
    if unknown := set(chosen) - {"pool", "real"}:
        parser.error(f"{', '.join(unknown)}: expected pool or real")
    if "pool" in chosen:
        pool_table()
    if "real" in chosen:
        real_table(arguments.repeats)


if __name__ == "__main__":
    main()
