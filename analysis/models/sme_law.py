"""The SME for any staleness law, (G1), with its closures (ours)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Unpack

import numpy as np

from analysis.models.blocks import BlockMaker, PathModel
from analysis.models.clocks import pool_turns
from analysis.models.descent import Descent, DescentBlock
from analysis.models.discrete import independent_lags
from analysis.models.ensemble import Ensemble, PathOptions, PerUpdate, run_ensembles
from analysis.models.history import History, HistoryMatrixNoise, HistorySnapshotNoise
from analysis.models.noise import MATRIX_DIM, SNAPSHOTS
from analysis.models.pool import Pool, PoolMoments, TurnMaker
from analysis.models.recorded_turns import RecordedTurns, ResampledTurns
from analysis.models.sme_asgd import SmeAsgd
from analysis.models.turns import workers_of
from asgd.arguments import count
from asgd.arrays import Array
from asgd.errors import InputError
from asgd.problems.base import Problem
from asgd.staleness.geometric import Geometric, GeometricMixture
from asgd.staleness.law import StalenessLaw, checked_law
from asgd.streams import Seed, as_seed, stream

PathClosure = Literal["iid", "sampling", "pool", "pool_moments"]


class SmeLaw(DescentBlock):
    """A block of paths of (G1): the last L gradients under the weights of the law.

    x' = x - eta g + eta Sigma^{1/2} z with g = sum_l w_l grad f(x_{k-l}); Sigma from matrices up
    to d = 4 and from signed sums of snapshots beyond. A recursion with one step per update: it
    approximates no equation, so it has no order.
    """

    def __init__(
        self,
        descent: Descent,
        weights: Array,
        lag_noise: bool,
        x: Array,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(descent, x, rng)
        problem = descent.problem
        gradient = problem.gradient(x).astype(x.dtype)
        self.gradients = History(weights, gradient)
        self.noise: HistoryMatrixNoise | HistorySnapshotNoise
        if problem.dim <= MATRIX_DIM:
            self.noise = HistoryMatrixNoise(problem, x, gradient, rng, weights, lag_noise)
        else:
            self.noise = HistorySnapshotNoise(problem, x, rng, weights, self.gradients, lag_noise)

    def step(self, k: int) -> None:
        """Advance one update."""
        g = self.gradients.average()
        kick = self.noise.draw(g, self.batch_size[k])
        kick -= g
        kick *= self.learning_rate[k]
        self.x += kick
        self.gradients.push(self.noise.absorb(self.x))


def sme_law(
    problem: Problem,
    learning_rate: PerUpdate,
    law: StalenessLaw | Sequence[StalenessLaw],
    updates: int,
    paths: int,
    seed: Seed,
    *,
    closure: PathClosure = "pool",
    workers: int | None = None,
    turns: RecordedTurns | None = None,
    batch_size: PerUpdate = 1,
    **options: Unpack[PathOptions],
) -> Ensemble:
    """Simulate the SME of a staleness law, (G1), (P1) or (P2).

    >>> law = asgd.Geometric(0.75)
    >>> analysis.sme_law(problem, 0.05, law, updates=100, paths=64, seed=0).loss_mean.shape
    (101,)

    Arguments that are not listed are those of `sme_asgd`.

    Parameters
    ----------
    law
        The staleness law, cut off where less than 1e-6 of its mass is left. "pool" also accepts
        one law per worker (for a straggler, say), and takes a `GeometricMixture` with one component
        per worker in this way.
    closure
        How the lags of different updates depend on each other:
        "pool": each snapshot is used exactly once, as on a real server; P snapshots per path, and
        workers that have the staleness law (`pool_turns`).
        "pool_moments": the same by (P1), for a geometric law and small d; O(1) memory.
        "iid": no dependence, Sigma = H - g g^T (An, Lu, Ying); overstates the noise.
        "sampling": no noise from the choice of the lag; understates it.
        "iid" and "sampling" take O(1) memory for a geometric law and L gradients otherwise.
    workers
        P, only for "pool"; it fixes the mean staleness at P - 1 for any law. Default: E tau + 1,
        rounded, or the number of laws.
    turns
        Recorded turns, only for "pool"; resampled instead of turns by the law, (P3).

    Raises
    ------
    InputError
        If an argument is invalid.
    """
    descent = Descent.of(problem, learning_rate, batch_size, updates)
    model = sme_law_paths(descent, law, seed, closure=closure, workers=workers, turns=turns)
    return run_ensembles([model], problem, updates, paths, seed, **options)[0]


def sme_law_paths(
    descent: Descent,
    law: StalenessLaw | Sequence[StalenessLaw],
    seed: Seed,
    *,
    closure: PathClosure = "pool",
    workers: int | None = None,
    turns: RecordedTurns | None = None,
) -> PathModel:
    """Return the model of `sme_law` to simulate with others; arguments and errors as there.

    Parameters
    ----------
    seed
        Seed of the simulations by which "pool" fits its clocks or hazards.
    """
    seed = as_seed(seed)
    routes: dict[str, Callable[[], tuple[BlockMaker, int]]] = {
        "pool": lambda: (
            _pool(descent, _laws_of_workers(law, workers), seed)
            if turns is None
            else _recorded_pool(descent, turns)
        ),
        "pool_moments": lambda: _pool_moments(descent, _one_law(law)),
        "iid": lambda: _independent(descent, _one_law(law), lag_noise=True),
        "sampling": lambda: _independent(descent, _one_law(law), lag_noise=False),
    }
    if closure not in routes:
        raise InputError(f"closure = {closure!r}: expected {', '.join(routes)}")
    block, copies = routes[closure]()
    return PathModel(block, f"sme_law/{closure}", copies)


def _one_law(law: StalenessLaw | Sequence[StalenessLaw]) -> StalenessLaw:
    if isinstance(law, Sequence):
        raise InputError(f"law = {len(law)} laws: expected one, or closure = 'pool'")
    return checked_law(law)


def _laws_of_workers(
    law: StalenessLaw | Sequence[StalenessLaw], workers: int | None
) -> Sequence[StalenessLaw]:
    # memoryless workers: worker i makes the share 1 - mu_i of the updates
    if (
        isinstance(law, GeometricMixture)
        and workers in (None, len(law.mus))
        and np.allclose(law.shares, 1 - np.array(law.mus), rtol=0, atol=1e-9)
    ):
        law = [Geometric(mu) for mu in law.mus]
    if workers is not None:
        workers = count(workers, "workers")
    if isinstance(law, Sequence):
        law = [checked_law(one) for one in law]
    else:
        law = checked_law(law)
        workers = workers_of(law) if workers is None else workers
        # a geometric law means P memoryless workers, whatever its mu
        one = Geometric(1 - 1 / max(workers, 1)) if isinstance(law, Geometric) else law
        law = [one] * workers
    if len(law) == 0 or workers not in (None, len(law)):
        raise InputError(f"workers = {workers}: expected at least 1, and one for each law")
    return law


def _pool(descent: Descent, laws: Sequence[StalenessLaw], seed: int) -> tuple[BlockMaker, int]:
    turns = pool_turns(laws, stream(seed, "sme_law/turns"))
    return partial(Pool, descent, turns), len(laws) + 4


def _recorded_pool(descent: Descent, recorded: RecordedTurns) -> tuple[BlockMaker, int]:
    turns: TurnMaker = partial(ResampledTurns, recorded)
    return partial(Pool, descent, turns), recorded.workers + 4


def _pool_moments(descent: Descent, law: StalenessLaw) -> tuple[BlockMaker, int]:
    if not isinstance(law, Geometric):
        raise InputError(f"law = {law}: expected a geometric law with closure = 'pool_moments'")
    return partial(PoolMoments, descent, law.mu), 4 + 4 * descent.problem.dim


def _independent(descent: Descent, law: StalenessLaw, lag_noise: bool) -> tuple[BlockMaker, int]:
    if lag_noise and not descent.problem.gives_noise:
        return independent_lags(descent, law)
    if isinstance(law, Geometric):
        return partial(SmeAsgd, descent, law.mu, lag_noise=lag_noise), 2 * SNAPSHOTS + 4
    weights = law.weights(law.support_length())
    copies = len(weights) * (1 + min(2 * descent.problem.dim, 2)) + 4
    return partial(SmeLaw, descent, weights, lag_noise), copies
