import numpy as np
import pytest

from analysis.models.sme_law import sme_law
from analysis.models.turns import Turns, pool_hazards
from asgd.problems.scalar import Quadratic
from asgd.staleness.counts import NegativeBinomial, Poisson
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric, GeometricMixture
from asgd.streams import stream

LENGTH = 80


def ages_at_use(hazard, steps=400, paths=1_000, start_up=100):
    """Return slot and age of every use after the start-up, both of shape (uses,)."""
    turns = Turns(hazard, paths, stream(1, "ages"))
    slots, ages = [], []
    for step in range(steps):
        before = turns.ages.copy()
        slot = turns.next()
        if step >= start_up:
            slots.append(slot)
            ages.append(before[np.arange(paths), slot])
    return np.concatenate(slots), np.concatenate(ages)


def distance(ages, law):
    """Return the total variation distance between a sample and a law."""
    counts = np.bincount(np.minimum(ages, LENGTH - 1), minlength=LENGTH) / len(ages)
    law = np.append(law.pmf(np.arange(LENGTH - 1)), law.tail(LENGTH - 1))
    return np.abs(counts - law).sum() / 2


def test_every_snapshot_is_used_once():
    """Ages stay distinct, so their mean at use is P - 1 for any hazards."""
    workers = 5
    for hazard in (np.full((workers, 1), 0.2), np.tile(Poisson(4.0).hazard(40), (workers, 1))):
        turns = Turns(hazard, 50, stream(0, "distinct"))
        for _ in range(60):
            turns.next()
        ages = np.sort(turns.ages, axis=1)
        assert np.all(np.diff(ages, axis=1) > 0)
        assert np.all(ages[:, 0] == 0)
        assert ages_at_use(hazard)[1].mean() == pytest.approx(workers - 1, abs=0.02)


@pytest.mark.parametrize(
    "law",
    [Poisson(7.0), NegativeBinomial(3.0, 0.7), NegativeBinomial(0.5, 14 / 15)],
    ids=["poisson", "under-dispersed", "over-dispersed"],
)
def test_ages_have_the_law(law):
    assert law.mean() == pytest.approx(7)
    hazard = pool_hazards([law] * 8, stream(0, "hazards"))
    assert distance(ages_at_use(hazard)[1], law) < 0.008


def test_correction_of_a_narrow_law():
    """Uncorrected hazards give too wide a law, as each counts relative to the others."""
    law = NegativeBinomial(60.0, 7 / 67)
    plain = np.tile(law.hazard(law.support_length()), (8, 1))
    corrected = pool_hazards([law] * 8, stream(0, "hazards"))
    before, after = (ages_at_use(hazard)[1] for hazard in (plain, corrected))
    assert before.var() > 1.04 * law.var()
    assert after.var() == pytest.approx(law.var(), rel=0.01)
    assert distance(after, law) < distance(before, law) / 2
    np.testing.assert_array_equal(corrected, np.tile(corrected[0], (8, 1)))


def test_start_of_a_run():
    """All workers start together at the usual rate, so the snapshots of x_0 are used first."""
    law = NegativeBinomial(60.0, 7 / 67)
    hazard = np.tile(law.hazard(30), (8, 1))
    turns = Turns(hazard, 500, stream(0, "start"))
    assert 8 * law.hazard(30)[turns.ages[0, 0]] >= 1 > 8 * law.hazard(30)[turns.ages[0, 0] - 1]
    first = np.array([turns.next() for _ in range(8)])
    of_start = np.mean([len(set(slots)) for slots in first.T])
    assert of_start > 6.8
    memoryless = Turns(np.full((8, 1), 1 / 8), 500, stream(0, "start"))
    first = np.array([memoryless.next() for _ in range(8)])
    expected = 8 * (1 - (7 / 8) ** 8)
    assert np.mean([len(set(slots)) for slots in first.T]) == pytest.approx(expected, rel=0.03)


def test_each_worker_has_its_own_law():
    laws = [NegativeBinomial(4.0, 0.8)] + [
        NegativeBinomial(4.0, mean / (4 + mean)) for mean in [1 / ((1 - 1 / 17) / 3) - 1] * 3
    ]
    assert sum(1 / (1 + law.mean()) for law in laws) == pytest.approx(1)
    slots, ages = ages_at_use(pool_hazards(laws, stream(0, "hazards")))
    for worker, law in enumerate(laws):
        own = ages[slots == worker]
        assert len(own) / len(ages) == pytest.approx(1 / (1 + law.mean()), rel=0.03)
        assert distance(own, law) < 0.03


def test_memoryless_workers_need_no_correction():
    hazard = pool_hazards([Geometric(0.8)] * 5, stream(0, "hazards"))
    np.testing.assert_allclose(hazard, np.full((5, 1), 0.2))
    assert distance(ages_at_use(hazard)[1], Geometric(0.8)) < 0.005
    rates = np.array([0.1, 0.2, 0.7])
    hazard = pool_hazards([Geometric(1 - rate) for rate in rates], stream(0, "hazards"))
    np.testing.assert_allclose(hazard[:, 0], rates)
    slots, ages = ages_at_use(hazard)
    for worker, rate in enumerate(rates):
        assert distance(ages[slots == worker], Geometric(1 - rate)) < 0.02


def test_constant_staleness_is_a_queue():
    hazard = pool_hazards([ConstantPlusGeometric(3, 0.0)] * 4, stream(0, "hazards"))
    turns = Turns(hazard, 3, stream(0, "queue"))
    seen = np.array([turns.next() for _ in range(12)])
    np.testing.assert_array_equal(seen[4:], seen[:-4])
    assert {tuple(sorted(four)) for four in seen[:4].T} == {(0, 1, 2, 3)}


def server(eta, compute_times, updates, paths, rng):
    """Run servers whose workers compute for random times; return x^2, workers and staleness.

    All have shape (updates, paths). f = x^2 with gradient noise N(0, 4). `compute_times(worker,
    size)` draws the times; worker None asks for one time of each worker.
    """
    finish = compute_times(None, paths)
    x, row = np.ones(paths), np.arange(paths)
    snapshot = np.ones(finish.shape)
    read = np.zeros(finish.shape, dtype=np.int64)
    squares, who, staleness = [], [], []
    for k in range(updates):
        worker = finish.argmin(axis=1)
        x = x - eta * (2 * snapshot[row, worker] + 2 * rng.standard_normal(paths))
        who.append(worker)
        staleness.append(k - read[row, worker])
        snapshot[row, worker], read[row, worker] = x, k + 1
        finish[row, worker] += compute_times(worker, paths)
        squares.append(x * x)
    return np.array(squares), np.array(who), np.array(staleness)


def compute_times(variation, slow, rng, workers=8):
    speed = np.ones(workers)
    speed[0] = slow
    shape = 1 / variation**2

    def draw(worker, size):
        if worker is None:
            return rng.gamma(shape, speed / shape, (size, workers))
        return rng.gamma(shape, speed[worker] / shape)

    return draw


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variation", "slow", "eta", "allowed"),
    [
        # steps up to 0.7 of the largest stable one, and any step for memoryless workers
        (1.0, 1.0, 0.1, 0.02),
        (1.0, 1.0, 0.25, 0.02),
        (0.5, 1.0, 0.046, 0.02),
        (0.5, 1.0, 0.108, 0.02),
        (0.2, 1.0, 0.078, 0.02),
        (0.1, 1.0, 0.074, 0.03),
        (0.5, 3.0, 0.053, 0.02),
        (0.5, 3.0, 0.124, 0.02),
        (1.0, 5.0, 0.1, 0.02),
        (1.0, 5.0, 0.25, 0.03),
        # 0.9 of the largest stable step
        (0.5, 1.0, 0.139, 0.06),
        (0.2, 1.0, 0.1, 0.03),
        (0.1, 1.0, 0.095, 0.08),
        (0.5, 3.0, 0.16, 0.1),
    ],
)
def test_pool_follows_an_event_driven_server(variation, slow, eta, allowed):
    """(P2) with each worker's measured law, E x^2 over updates 30 to 60 and 100 to 300."""
    rng = stream(9, f"server/{variation}/{slow}")
    draw = compute_times(variation, slow, rng)
    _, who, staleness = server(0.01, draw, 500, 1_000, rng)
    late = slice(150, None)
    laws = [Empirical.from_sample(staleness[late][who[late] == worker]) for worker in range(8)]
    updates, paths = 300, 8_000
    exact, _, _ = server(eta, draw, updates, paths, rng)
    pool = sme_law(Quadratic(), eta, laws, updates, paths, 3, quantile_levels=())
    for window in (slice(30, 60), slice(100, 300)):
        # paths are independent, updates are not; both samples have the same error
        observed = exact[window].mean(axis=0)
        error = np.sqrt(2 / paths) * observed.std() / observed.mean()
        relative = pool.second_moment[1:, 0][window].mean() / observed.mean() - 1
        assert abs(relative) < allowed + 4 * error


def test_mixture_of_memoryless_workers():
    """Compare with a server of unequal rates, for which an exchangeable pool would be wrong."""
    rates = np.array([0.05, 0.25, 0.3, 0.4])
    law = GeometricMixture(tuple(1 - rates), tuple(rates))
    rng = stream(2, "unequal")

    def draw(worker, size):
        if worker is None:
            return rng.exponential(1 / rates, (size, 4))
        return rng.exponential(1 / rates[worker])

    updates, paths, eta = 40, 20_000, 0.2
    exact, _, _ = server(eta, draw, updates, paths, rng)
    x = sme_law(Quadratic(), eta, law, updates, paths, 3, quantile_levels=()).final
    error = np.hypot(exact[-1].std(), np.std(x * x)) / np.sqrt(paths)
    assert abs(np.mean(x * x) - exact[-1].mean()) < 4 * error
