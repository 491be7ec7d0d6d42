"""Recorded turns: the start-up is replayed exactly, and resampling keeps law and dependence."""

from collections.abc import Callable

import numpy as np
import pytest

from analysis.models.recorded_turns import RecordedTurns, ResampledTurns, has_spells
from analysis.models.sme_law import sme_law
from asgd.delays import ComputeTime
from asgd.problems.scalar import Quadratic
from asgd.simulation.order import simulate_staleness
from asgd.staleness.empirical import Empirical
from asgd.streams import stream
from tests.analysis.test_turns import server


def staleness(slots: np.ndarray, workers: int) -> np.ndarray:
    """Return tau of each update, shape (updates, paths), from the slots used."""
    read = np.zeros((workers, slots.shape[1]), dtype=int)
    path, tau = np.arange(slots.shape[1]), np.empty_like(slots)
    for k, slot in enumerate(slots):
        tau[k] = k - read[slot, path]
        read[slot, path] = k + 1
    return tau


def resampled(recorded: RecordedTurns, paths: int, updates: int, seed: int = 0) -> np.ndarray:
    turns = ResampledTurns(recorded, paths, stream(seed, "turns"))
    return staleness(np.stack([turns.next() for _ in range(updates)]), recorded.workers)


def test_every_path_begins_like_one_of_the_runs() -> None:
    rng = np.random.default_rng(1)
    runs = [rng.integers(5, size=200) for _ in range(3)]
    own = [staleness(run[:, None], 5)[:, 0] for run in runs]
    recorded = RecordedTurns.of(runs)
    tau = resampled(recorded, 30, 200)
    pairs = list(zip(own, recorded.start_up, strict=True))
    begun = [[np.array_equal(path[:start], one[:start]) for one, start in pairs] for path in tau.T]
    assert np.sum(begun, axis=0).tolist() == [10, 10, 10]


def test_resampling_keeps_a_fixed_order() -> None:
    recorded = RecordedTurns.of([np.arange(120) % 6])
    assert all(np.all(rank == 5) for rank in recorded.ranks)
    tau = resampled(recorded, 4, 120)
    assert np.array_equal(tau, np.broadcast_to(np.minimum(np.arange(120), 5)[:, None], tau.shape))


def test_resampled_turns_keep_the_law_and_its_dependence() -> None:
    """The run has spells of fixed and of random order; mean, variance and spells are kept."""
    rng, workers, updates = np.random.default_rng(2), 4, 2000
    spells = [
        np.arange(100) % workers if number % 2 else rng.integers(workers, size=100)
        for number in range(updates // 100)
    ]
    run = np.concatenate(spells)
    own = staleness(run[:, None], workers)[100:, 0]
    tau = resampled(RecordedTurns.of([run]), 200, updates)[100:]
    assert abs(tau.mean() - (workers - 1)) < 0.05
    blocks = tau.var(axis=0)
    assert abs(blocks.mean() - own.var()) < 4 * blocks.std() / np.sqrt(10)
    steady = np.convolve(own == workers - 1, np.ones(20), "valid") == 20
    resteady = [np.mean(np.convolve(t == workers - 1, np.ones(20), "valid") == 20) for t in tau.T]
    # About every other window of 20 updates contains the end of a block, which may cut a spell.
    assert 0.4 * steady.mean() < np.mean(resteady) < 1.2 * steady.mean()
    assert steady.mean() > 0.2


def test_every_repeat_is_resampled() -> None:
    rng = np.random.default_rng(3)
    runs = [np.arange(400) % 4, rng.integers(4, size=400)]
    variance = resampled(RecordedTurns.of(runs), 400, 40).var(axis=0)
    # Until its first jump a path is like its run.
    assert 0.3 < np.mean(variance < 1.5) < 0.7


def test_spells_are_distinguished_from_turns_by_age() -> None:
    """One record in fixed and one in random order have spells; two of one gamma law have none."""
    rng, workers = np.random.default_rng(4), 4
    times = ComputeTime("gamma", np.ones(workers), 0.5)
    uneven = [np.arange(400) % workers, rng.integers(workers, size=400)]
    aged = [simulate_staleness(times, 400, rng).worker for _ in range(2)]
    found = []
    for turns in (uneven, aged):
        tau = [staleness(one[:, None], workers)[:, 0] for one in turns]
        law = Empirical.from_sample(np.concatenate([one[50:] for one in tau]))
        found.append(has_spells(tau, RecordedTurns.of(turns), law, stream(5, "spells")))
    assert found == [True, False]


def times_in_spells(paths: int, rng: np.random.Generator) -> Callable[..., np.ndarray]:
    """Return a function that draws compute times of 4 workers.

    They are nearly constant for 100 updates, then memoryless for 100 updates, and so on.
    """
    updates = rng.integers(200, size=paths)

    def draw(worker: np.ndarray | None, size: int) -> np.ndarray:
        if worker is None:
            return rng.gamma(100.0, 0.01, (size, 4))
        updates[:] += 1
        shape = np.where(updates // 100 % 2, 1.0, 400.0)
        return rng.gamma(shape, 1.0 / shape)

    return draw


def test_recorded_turns_follow_an_event_driven_server_with_spells() -> None:
    """At 0.85 of the limit of a fixed order, hazards of the same law understate E x^2."""
    rng, eta, updates, records, paths = np.random.default_rng(5), 0.19, 300, 1500, 4000
    _, who, tau = server(eta, times_in_spells(records, rng), updates, records, rng)
    exact, _, _ = server(eta, times_in_spells(paths, rng), updates, paths, rng)
    law, recorded = Empirical.from_sample(tau[50:].ravel()), RecordedTurns.of(list(who.T))
    resampled, by_hazard = (
        sme_law(
            Quadratic(), eta, law, updates, paths, 3, workers=4, turns=turns, quantile_levels=()
        ).second_moment[1:, 0]
        for turns in (recorded, None)
    )
    for window in (slice(30, 100), slice(100, 300)):
        # paths are independent, updates are not; the error is of both samples and of the records
        observed = exact[window].mean(axis=0)
        error = observed.std() * np.sqrt(2 / paths + 1 / records)
        assert resampled[window].mean() == pytest.approx(observed.mean(), abs=4 * error)
        assert by_hazard[window].mean() < observed.mean() - 4 * error
