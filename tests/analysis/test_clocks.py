"""Clocks of workers: their staleness has the law, and E x^2 is that of an event-driven server."""

import numpy as np
import pytest

from analysis.exact.given_reads import read_moments, turn_reads
from analysis.exact.linear_gradients import LinearGradients
from analysis.models.clocks import FAR, LEVELS, ClockTurns, pool_turns, worker_clocks
from analysis.models.turns import Turns, pool_hazards
from asgd.delays import ComputeTime
from asgd.problems.scalar import Quadratic
from asgd.simulation.order import simulate_staleness
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric
from asgd.staleness.law import StalenessLaw
from asgd.streams import stream

WORKERS = 8


class EventTurns:
    """An event-driven server by its definition: the first worker to finish has the turn."""

    def __init__(self, times: ComputeTime, paths: int, rng: np.random.Generator) -> None:
        self.workers, self.times, self.rng, self.row = len(times.mean), times, rng, np.arange(paths)
        relative = times.draw_relative(paths * self.workers, rng).reshape(paths, -1)
        self.due = times.mean * relative

    def next(self) -> np.ndarray:
        worker = self.due.argmin(axis=1)
        drawn = self.times.draw_relative(len(worker), self.rng)
        self.due[self.row, worker] += self.times.mean[worker] * drawn
        return worker


def compute_time(law: str, variation: float, slowest: float = 1.0) -> ComputeTime:
    return ComputeTime(law, np.array([slowest, *[1.0] * (WORKERS - 1)]), variation)


def measured_laws(times: ComputeTime, updates: int = 200_000) -> list[StalenessLaw]:
    order = simulate_staleness(times, updates, np.random.default_rng(7))
    late = slice(100 * WORKERS, None)
    tau, worker = order.staleness[late], order.worker[late]
    if np.ptp(times.mean) == 0:
        return [Empirical.from_sample(tau)] * WORKERS
    return [Empirical.from_sample(tau[worker == number]) for number in range(WORKERS)]


def squares(turns, eta: float, updates: int, paths: int) -> np.ndarray:
    """Return E x^2 given the turns, f = x^2, at updates 1, ..., shape (updates, paths)."""
    moments = read_moments(
        LinearGradients.of(Quadratic()),
        eta,
        turn_reads(turns, paths),
        batch_size=1,
        initial=np.ones(1),
        record=np.arange(1, updates + 1),
    )
    return np.array([mean[:, 0] ** 2 + cov[:, 0, 0] for mean, cov in moments])


CASES = [
    ("gamma", 0.1, 1.0, 0.09),
    ("gamma", 0.5, 1.0, 0.1),
    ("gamma", 0.5, 3.0, 0.1),
    ("lognormal", 1.0, 1.0, 0.16),
    ("lognormal", 2.0, 1.0, 0.2),
]


@pytest.mark.parametrize(("law", "variation", "slowest", "eta"), CASES)
def test_clocks_follow_an_event_driven_server(
    law: str, variation: float, slowest: float, eta: float
) -> None:
    """E x^2 within 2 %, from the first update on."""
    times = compute_time(law, variation, slowest)
    laws = measured_laws(times)
    rng, paths, updates = stream(3, f"{law}/{variation}"), 2_000, 200
    turns = pool_turns(laws, rng)
    exact = squares(EventTurns(times, paths, rng), eta, updates, paths)
    ours = squares(turns(paths, rng), eta, updates, paths)
    for window in (slice(0, 30), slice(30, 80), slice(80, 200)):
        one, other = (values[window].mean(axis=0) for values in (exact, ours))
        # paths are independent, updates are not
        error = np.hypot(one.std(), other.std()) / np.sqrt(paths)
        assert abs(other.mean() - one.mean()) < 0.02 * one.mean() + 4 * error


def test_turns_by_age_are_less_accurate_than_clocks() -> None:
    """Clocks are needed for wide laws, soon after the start."""
    times = compute_time("lognormal", 2.0)
    rng, paths = stream(3, "ages"), 4_000
    exact = squares(EventTurns(times, paths, rng), 0.175, 30, paths).mean(axis=0)
    hazards = pool_hazards(measured_laws(times), rng)
    by_age = squares(Turns(hazards, paths, rng), 0.175, 30, paths).mean(axis=0)
    error = np.hypot(exact.std(), by_age.std()) / np.sqrt(paths)
    assert by_age.mean() < 0.96 * exact.mean() - 2 * error


@pytest.mark.parametrize(("law", "variation"), [("gamma", 0.1), ("lognormal", 2.0)])
def test_staleness_of_the_clocks_has_the_law(law: str, variation: float) -> None:
    """The staleness is counted here independently, after the start-up."""
    (wanted, *_) = laws = measured_laws(compute_time(law, variation))
    clocks = worker_clocks(laws, np.random.default_rng(1))
    assert clocks.distance < FAR
    paths, rng = 500, np.random.default_rng(2)
    turns = ClockTurns(clocks.quantiles, paths, rng)
    read, path, tau = np.zeros((paths, WORKERS), dtype=int), np.arange(paths), []
    for k in range(1200):
        slot = turns.next()
        tau.append(k - read[path, slot])
        read[path, slot] = k + 1
    late = np.concatenate(tau[400:])
    k = np.arange(100)
    seen = np.searchsorted(np.sort(late), k, side="right") / len(late)
    assert np.abs(seen - wanted.cdf(k)).max() < FAR
    assert late.mean() == pytest.approx(WORKERS - 1, rel=0.03)


def test_times_between_rings_have_the_given_quantiles() -> None:
    """The quantiles are those of the exponential law."""
    quantiles = -np.log1p(-np.minimum(LEVELS, 1 - 1e-9))[None]
    turns = ClockTurns(quantiles, 20_000, np.random.default_rng(3))
    before = turns.due[:, 0].copy()
    turns.next()
    elapsed = turns.due[:, 0] - before
    for sample in (before, elapsed):
        assert abs(sample.mean() - 1) < 4 / np.sqrt(20_000)
        assert abs(np.mean(sample > 2) - np.exp(-2)) < 4 * np.sqrt(np.exp(-2) / 20_000)


def test_workers_of_constant_time_take_turns() -> None:
    turns = pool_turns([ConstantPlusGeometric(3)] * 4, np.random.default_rng(4))
    three = turns(3, np.random.default_rng(5))
    seen = np.array([three.next() for _ in range(12)])
    np.testing.assert_array_equal(seen, np.tile(np.arange(4), 3)[:, None].repeat(3, axis=1))


def test_laws_without_clocks_are_drawn_by_age_and_memoryless_ones_uniformly() -> None:
    pipeline, rng = ConstantPlusGeometric(5, 2 / 3), np.random.default_rng(6)
    assert worker_clocks([pipeline] * WORKERS, rng).distance > 2 * FAR
    assert isinstance(pool_turns([pipeline] * WORKERS, rng)(10, rng), Turns)
    uniform = pool_turns([Geometric(0.875)] * WORKERS, rng)(10, rng)
    assert isinstance(uniform, Turns)
    assert uniform.uniform
