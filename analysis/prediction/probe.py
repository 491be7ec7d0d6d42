"""A probe of a run: its stability from curvatures at two of its points, without any path (ours).

It costs a tenth of the gradients of the run; a prediction costs as much as many runs. Its products
with the Hessian use m drawn samples: as many as the tenth allows, but at least 32, so a probe of a
short run costs more. On average, the largest eigenvalue of the samples' mean Hessian is above that
of the Hessian, because it is convex in the matrix; the curvature along its eigenvector on m other
samples is below, because no direction has more than the largest. A probe reports these two ends of
the curvature and takes the limits from the larger one.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from analysis.prediction.lanczos import largest_eigenvalues
from analysis.prediction.run_stability import DENSE_DIM, StabilityAnswer, at_curvatures
from analysis.prediction.setting import RunSetting
from asgd.arrays import Array
from asgd.errors import InputError
from asgd.problems.base import Indices, Problem, starting_point
from asgd.rundir.files import replace_file
from asgd.rundir.reader import Run
from asgd.seals import sealed_object
from asgd.stored_json import read_sealed
from asgd.streams import stream

SHARE = 0.1  # of the gradients of a run
# The cost of a product with the Hessian of one sample, in gradients of one sample; and the usual
# number of products at a point: eleven by the Lanczos iterations, one on other samples.
_PRODUCT, _PRODUCTS = 2.5, 12
_FEWEST = 32  # samples; with fewer, the ends are too far apart
_TOLERANCE = 1e-2  # relative, of the eigenvalue
_FILE = "probe.json"


@dataclass(frozen=True)
class Curvature:
    """The leading curvature at a point of a run.

    Attributes
    ----------
    update
        Updates that led to the point.
    low, high
        The ends of the estimate; equal if all samples were used.
    products
        Products with the Hessian that it took.
    """

    update: int
    low: float
    high: float
    products: int


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of a probe.

    Attributes
    ----------
    sentence
        The answer as text.
    stability
        As for a prediction, from the high ends of the curvatures.
    curvature
        At x_0 and at the newest saved state, if there is one.
    samples, of_samples
        Number of samples of each product, and of the problem.
    share
        Cost over that of the gradients of the run.
    """

    sentence: str
    stability: StabilityAnswer
    curvature: list[Curvature]
    samples: int
    of_samples: int
    share: float

    def save(self, directory: Path) -> None:
        """Write `probe.json` into a run directory."""
        replace_file(directory / _FILE, sealed_object(msgspec.to_builtins(self)))


def read_probe(directory: Path) -> Probe | None:
    """Read the probe stored in the directory of a run; None if there is none.

    Raises
    ------
    InputError
        It cannot be read.
    """
    if not (directory / _FILE).is_file():
        return None
    try:
        return read_sealed(directory / _FILE, Probe)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{directory}: no readable probe ({reason}); `asgd predict --method probe`"
        ) from None


def probe(run: Run, setting: RunSetting) -> Probe:
    """Return the stability of a run by the curvatures at x_0 and at its newest saved state.

    Raises
    ------
    UnreliableEstimateError
        The Lanczos iterations did not converge.
    """
    points = {0: starting_point(setting.problem, run.config.run.seed)}
    with suppress(InputError):  # none is saved
        points[run.parameters_update] = run.parameters
    problem = setting.problem
    gradients = int(run.trace["batch_size"].sum())  # of one sample
    samples = affordable_samples(problem, gradients, len(points))
    rng = stream(run.config.run.seed, "probe")
    curvature = [
        leading_curvature(problem, x, samples, rng, update) for update, x in points.items()
    ]
    stability = at_curvatures(setting, [np.array([one.high]) for one in curvature])
    limited = math.isfinite(stability.limit)
    products = sum(one.products for one in curvature)
    share = _PRODUCT * products * samples / gradients
    return Probe(
        sentence=f"{stability.sentence} "
        f"{_how(curvature, samples, problem.n_samples, share, limited)}",
        stability=stability.answer(),
        curvature=curvature,
        samples=samples,
        of_samples=problem.n_samples,
        share=share,
    )


def affordable_samples(problem: Problem, gradients: int, points: int, share: float = SHARE) -> int:
    """Return the samples of each product for a share of a run: 32 at least, all at most.

    Parameters
    ----------
    gradients
        Gradients of one sample in the whole run.
    points
        Number of points to probe.
    share
        Share of these gradients to spend.
    """
    products = points * _products(problem.dim)
    return min(max(int(share * gradients / (_PRODUCT * products)), _FEWEST), problem.n_samples)


def _products(dim: int) -> int:
    return _PRODUCTS if dim > DENSE_DIM else dim + 1


def leading_curvature(
    problem: Problem, x: Array, samples: int, rng: np.random.Generator, update: int = 0
) -> Curvature:
    """Return the leading curvature at x, shape (d,), from products with the Hessian.

    Parameters
    ----------
    samples
        Samples of each product, drawn with replacement; from n on, all of them once.
    update
        Updates that led to x.

    Raises
    ------
    UnreliableEstimateError
        The Lanczos iterations did not converge.
    """
    every = samples >= problem.n_samples
    drawn: Indices = np.arange(problem.n_samples)
    if not every:
        drawn = rng.integers(problem.n_samples, size=samples)
    products = 0

    def product(v: Array, batch: Indices = drawn) -> Array:
        nonlocal products
        products += 1
        return problem.hessian_vector_of_batch(x, v, batch)

    # One thread, as for the curvatures of a prediction.
    with problem.in_one_thread(), threadpool_limits(1, user_api="blas"):
        high, vector = _largest(product, problem.dim, rng)
        low = high
        if not every:
            others = rng.integers(problem.n_samples, size=samples)
            low = float(np.dot(vector, product(vector, others)))
    return Curvature(update, low, high, products)


def _largest(product: Any, dim: int, rng: np.random.Generator) -> tuple[float, Array]:
    """Return the largest eigenvalue of a symmetric operator and its eigenvector."""
    if dim <= DENSE_DIM:
        rows = np.stack([product(unit) for unit in np.eye(dim)])
        values, vectors = np.linalg.eigh((rows + rows.T) / 2)
        return float(values[-1]), vectors[:, -1]
    values, vector = largest_eigenvalues(product, rng.standard_normal(dim), 1, _TOLERANCE)
    return float(values[0]), vector


def _how(
    curvature: list[Curvature], samples: int, of_samples: int, share: float, limited: bool
) -> str:
    """Return the sentences on samples, cost and limitations of a probe."""
    exact = samples >= of_samples
    found = ", ".join(
        f"{one.high:.3g} after update {one.update:,}"
        if exact
        else f"{max(min(one.low, one.high), 0.0):.3g} to {one.high:.3g} after update {one.update:,}"
        for one in curvature
    )
    of = "all samples" if exact else f"{samples:,} of {of_samples:,} samples"
    more = "; the limits are those of the larger" if limited and not exact else ""
    return (
        f"Probed, not predicted: leading curvature {found}, on {of}{more}; {100 * share:.2g} % of "
        "the gradients of the run. It knows only these points, neither the loss nor whether the "
        "run gets there; `asgd predict` simulates it."
    )
