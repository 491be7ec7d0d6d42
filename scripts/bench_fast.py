#!/usr/bin/env python3
"""Measures the errors of `asgd predict --method fast`, and when it refuses to predict.

.venv/bin/python -m scripts.bench_fast [--problems softmax "tanh network" quartic]

Eight workers with exponential or lognormal compute times. One row per learning rate, as a share of
the mean-square limit: the largest relative error of the mean loss over a run against paths of (P2)
with its standard error, the error at the end, and from which update on the fast mode refuses.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import cast

import numpy as np

from analysis.exact.limits import stability_limits
from analysis.prediction.model import LAW, simulate
from analysis.prediction.setting import RunSetting, Setting
from analysis.profile.queueing import ServerTimes, server_staleness
from asgd.config.make import make_config
from asgd.problems.base import starting_point
from asgd.problems.make import make_problem
from scripts.bench_limits import compute_times
from scripts.bench_plan import PROBLEMS, curvature

WORKERS = 8
SHARES = (0.1, 0.2, 0.3, 0.5, 0.65, 0.8)
# Paths and updates of each problem.
SIZES = {"softmax": (128, 200), "tanh network": (400, 200), "quartic": (2000, 600)}


def row(setting: Setting, paths: int) -> str:
    """Return the errors of the fast mode, and the update from which on it refuses."""
    curve = LAW.fast(cast(RunSetting, setting), 0)
    refused = "" if curve.unstable_from is None else f"from update {curve.unstable_from}"
    (drawn,) = simulate([LAW.path_model(setting, 1)], setting, paths, 1)
    off = ((curve.mean - drawn.loss_mean) / drawn.loss_mean)[1:]
    error_of_mean = (drawn.loss_std / np.sqrt(paths) / np.abs(drawn.loss_mean))[1:]
    if not np.isfinite(off).any():
        return f"{'':8} {'':5} {'':6} {'':8}  {refused}"
    worst = int(np.nanargmax(np.abs(off)))
    end = f"{100 * off[-1]:+8.1f}" if not refused else f"{'':8}"
    return (
        f"{100 * off[worst]:+8.1f} {100 * error_of_mean[worst]:5.1f} "
        f"{setting.record[1:][worst]:6} {end}  {refused}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    asked = parser.parse_args()
    print(f"{'problem':14} {'times':12} {'share':>5}", end=" ")
    print(f"{'worst %':>8} {'+-':>5} {'update':>6} {'end %':>8}  refused")
    for name in asked.problems:
        table, batch, _, _ = PROBLEMS[name]
        problem, (paths, updates) = make_problem(make_config({"problem": table})), SIZES[name]
        record = np.unique(np.geomspace(8, updates, 12).astype(np.int64))
        for times in ("exponential", "lognormal 1"):
            server = compute_times(times, WORKERS)
            limit = stability_limits(server).mean_square
            assert limit is not None
            setting = Setting(
                problem=problem,
                learning_rate=0.0,
                batch_size=batch,
                initial=starting_point(problem, 0),
                record=np.concatenate([[0], record]),
                law=server_staleness(ServerTimes(server), 200_000),
                closure="pool",
                workers=WORKERS,
            )
            for share in asked.shares:
                rate = share * limit.value / curvature(name)
                errors = row(replace(setting, learning_rate=rate), paths)
                print(f"{name:14} {times:12} {share:5g} {errors}", flush=True)


if __name__ == "__main__":
    main()
