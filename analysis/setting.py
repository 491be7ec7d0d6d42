"""What a model is given of a run: everything but its observed losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from analysis.fit import StalenessFit
from analysis.sme_law import Closure
from asgd.problems import make_problem
from asgd.problems.base import Array, Problem
from asgd.staleness import Geometric, StalenessLaw, staleness_of
from asgd.streams import stream
from asgd.trace import Run


@dataclass(frozen=True)
class Setting:
    """What a model is given.

    Attributes
    ----------
    problem, learning_rate, batch_size, initial
        As in the run; initial is x_0, shape (d,).
    record
        Updates to predict at, ascending, shape (m,).
    staleness
        Measured tau_0, tau_1, ... of the run.
    mu
        Parameter of the geometric fit.
    law
        The staleness law to predict with.
    closure
        How the staleness of one update depends on that of the others; "pool" for a server.
    workers
        P.
    """

    problem: Problem
    learning_rate: float
    batch_size: int
    initial: Array
    record: npt.NDArray[np.int64]
    staleness: npt.NDArray[np.int64]
    mu: float
    law: StalenessLaw
    closure: Closure
    workers: int

    @classmethod
    def of(cls, run: Run, fit: StalenessFit) -> Setting:
        """Read the setting off a run."""
        config, trace, problem = run.config, run.trace, make_problem(run.config)
        return cls(
            problem=problem,
            learning_rate=config.optimizer.learning_rate,
            batch_size=config.optimizer.batch_size,
            initial=problem.initial_point(stream(config.run.seed, "initial")),
            record=run.loss["update"].to_numpy(),
            staleness=staleness_of(trace["update"].to_numpy(), trace["read_version"].to_numpy()),
            mu=fit.mu,
            law=fit.recommended,
            closure=closure_of(run),
            workers=config.cluster.workers,
        )

    @property
    def updates(self) -> int:
        """The last update to predict."""
        return int(self.record[-1])

    @property
    def pool_law(self) -> StalenessLaw:
        """The law under the pool closure: a geometric one has mu = 1 - 1/P there."""
        return Geometric(1 - 1 / self.workers) if isinstance(self.law, Geometric) else self.law


def closure_of(run: Run) -> Closure:
    """Return "pool" if the run used each snapshot once, as a server does, else "iid".

    Every worker reads version 0; any later version then belongs to one worker. Independent
    draws of staleness read some versions twice and others never.
    """
    read_version = run.trace["read_version"]
    return "iid" if read_version[read_version > 0].duplicated().any() else "pool"


def as_runs(run: Run | Sequence[Run]) -> list[Run]:
    """Return one run or the repeats of one as a list."""
    return [run] if isinstance(run, Run) else list(run)
