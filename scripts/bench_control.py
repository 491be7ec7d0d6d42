"""Compares batch schedules of equal budget, and our optimiser with SciPy.

python scripts/bench_control.py

First table: the final loss above its minimum, under the integer schedule of `minimise_final_loss`,
(B4) and the uniform schedule, over a lower bound for every schedule of that budget. Second table:
the real-valued optimum by our fixed point and by SciPy: L-BFGS-B on log b >= 0 with the same
adjoint gradients, and brentq on the price of a gradient until the budget is met. (SLSQP takes the
budget as a constraint, but its cost grows with the cube of the number of updates.)
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # matrices of ten rows: threads only wait

import time
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq, minimize

from analysis.exact.batch_schedule import (
    FinalLoss,
    minimise_final_loss,
    minimise_real,
    optimal_batch_schedule,
    uniform_schedule,
)
from analysis.exact.linear_gradients import LinearGradients
from asgd.config.tables import ProblemConfig
from asgd.problems.base import Array, Problem
from asgd.problems.make import make_problem
from asgd.problems.scalar import Quadratic


class Setting(NamedTuple):
    """A problem, its step size and staleness, and how many updates and gradients there are."""

    problem: Problem
    learning_rate: float
    mu: float
    updates: int
    budget: int


SETTINGS = {
    "f = x^2, real eigenvalues": Setting(Quadratic(), 0.01, 0.8, 400, 2000),
    "f = x^2, no staleness": Setting(Quadratic(), 0.02, 0.0, 200, 1000),
    "f = x^2, complex": Setting(Quadratic(), 0.05, 0.9, 200, 1000),
    "f = x^2, complex, slow": Setting(Quadratic(), 0.01, 0.95, 300, 1500),
    "f = 5 x^2, complex, steep": Setting(Quadratic(10.0, 3.0), 0.05, 0.8, 100, 500),
    "f = x^2, complex, few gradients": Setting(Quadratic(), 0.1, 0.875, 100, 130),
    "diabetes, least squares": Setting(
        make_problem(ProblemConfig(kind="least_squares")), 0.05, 0.75, 200, 2000
    ),
}


class Counted:
    """A final loss that counts the evaluations of its gradient."""

    def __init__(self, final_loss: FinalLoss) -> None:
        self.final_loss, self.calls = final_loss, 0

    def value(self, batch: Array) -> float:
        return self.final_loss.value(batch)

    def value_and_weights(self, batch: Array) -> tuple[float, Array]:
        self.calls += 1
        return self.final_loss.value_and_weights(batch)


def by_scipy(final_loss: Counted, updates: int, budget: int) -> Array:
    """Minimise log E f over log b >= 0, with the price per gradient that meets the budget."""
    batch = np.full(updates, budget / updates)
    value, weights = final_loss.value_and_weights(batch)
    log_batch = np.log(batch)

    def excess(log_price: float) -> float:
        nonlocal log_batch
        price = np.exp(log_price)

        def lagrangian(beta: Array) -> tuple[float, Array]:
            b = np.exp(beta)
            loss, weights = final_loss.value_and_weights(b)
            return np.log(loss) + price * b.sum(), price * b - weights / (b * loss)

        log_batch = minimize(
            lagrangian,
            log_batch,
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None)] * updates,
            options={"maxiter": 500, "ftol": 1e-14, "gtol": 1e-8},
        ).x
        return float(np.exp(log_batch).sum() - budget)

    low = high = float(np.log((weights / (batch * value)).sum() / budget))
    while excess(low) < 0:
        low -= 1
    while excess(high) > 0:
        high += 1
    brentq(excess, low, high, xtol=1e-6)
    more = np.exp(log_batch) - 1
    return 1 + more * (budget - updates) / more.sum()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(f"{'final loss over its lower bound':34s} {'optimum':>10s} {'(B4)':>8s} {'uniform':>8s}")
    for name, (problem, eta, mu, updates, budget) in SETTINGS.items():
        final_loss = FinalLoss(problem, eta, mu)
        plan = minimise_final_loss(final_loss, updates, budget)
        modes = LinearGradients.of(problem).modes()
        closed = optimal_batch_schedule(*modes, eta, mu, updates, budget=budget)
        losses = [plan.final_loss, final_loss.value(closed)]
        losses.append(final_loss.value(uniform_schedule(updates, budget)))
        ratios = [loss / plan.lower_bound for loss in losses]
        print(f"{name:34s} {ratios[0]:10.4f} {ratios[1]:8.3f} {ratios[2]:8.3f}")
    print(f"\n{'real-valued optimum':34s} {'over bound':>10s} {'gradients':>10s} {'cpu ms':>8s}")
    for name, (problem, eta, mu, updates, budget) in SETTINGS.items():
        for optimiser in ("ours", "scipy"):
            final_loss = Counted(FinalLoss(problem, eta, mu))
            bound = minimise_real(final_loss.final_loss, updates, budget)[1]
            start = time.process_time()
            if optimiser == "ours":
                batch = minimise_real(final_loss, updates, budget)[0]
            else:
                batch = by_scipy(final_loss, updates, budget)
            seconds = time.process_time() - start
            over = final_loss.value(batch) / bound - 1
            print(
                f"{name + ', ' + optimiser:34s} {over:10.1e} {final_loss.calls:10d} "
                f"{1e3 * seconds:8.1f}"
            )


if __name__ == "__main__":
    main()
