"""What a model is given of a run: everything but its observed losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from analysis.experiment import as_runs
from analysis.fit import StalenessFit
from analysis.recorded_turns import RecordedTurns
from analysis.sme_law import Closure
from asgd.errors import InputError
from asgd.problems import make_problem
from asgd.problems.base import Array, Problem
from asgd.schedules import learning_rate_schedule
from asgd.staleness import Geometric, StalenessLaw, staleness_of
from asgd.streams import stream
from asgd.trace import Run


@dataclass(frozen=True)
class Setting:
    """What a model is given.

    Attributes
    ----------
    problem, initial
        As in the run; initial is x_0, shape (d,).
    learning_rate, batch_size
        A number, or under a schedule one for each update, shape (updates,).
    record
        Updates to predict at, ascending, shape (m,).
    staleness
        Measured tau_0, tau_1, ... of each run.
    mu
        Parameter of the geometric fit.
    law
        The staleness law to predict with.
    closure
        How the staleness of one update depends on that of the others; "pool" for a server.
    workers
        P.
    turns
        The measured turns of the workers; None if the geometric law holds, whose turns are known,
        or snapshots were not used once each.
    """

    problem: Problem
    learning_rate: float | npt.NDArray[np.float64]
    batch_size: int | npt.NDArray[np.int64]
    initial: Array
    record: npt.NDArray[np.int64]
    staleness: tuple[npt.NDArray[np.int64], ...]
    mu: float
    law: StalenessLaw
    closure: Closure
    workers: int
    turns: RecordedTurns | None = None

    @classmethod
    def of(cls, runs: Run | Sequence[Run], fit: StalenessFit) -> Setting:
        """Read the setting off a run or its repeats; of what is no staleness, off the first.

        Raises
        ------
        InputError
            The run did not follow (A1): another update rule, clipped gradients, or a server that
            waits.
        """
        runs = as_runs(runs)
        run, updates = runs[0], int(runs[0].loss["update"].iloc[-1])
        config, trace, optimizer = run.config, run.trace, run.config.optimizer
        for key, value, accepted in (
            ("optimizer.rule", optimizer.rule, "sgd"),
            ("optimizer.clip_norm", optimizer.clip_norm, None),
            ("cluster.mode", config.cluster.mode, "async"),
        ):
            if value != accepted:
                only = "none" if accepted is None else repr(accepted)
                raise InputError(f"{key} = {value!r}: predictions are made for {only} alone")
        problem = make_problem(config)
        learning_rate, batch_size = optimizer.learning_rate, optimizer.batch_size
        varying = learning_rate_schedule(optimizer).array(len(trace))
        closure, turns = closure_of(run), None
        if closure == "pool" and not isinstance(fit.recommended, Geometric):
            turns = RecordedTurns.of([one.trace["worker"].to_numpy() for one in runs])
        return cls(
            problem=problem,
            learning_rate=varying if optimizer.learning_rate_schedule.at else learning_rate,
            batch_size=trace["batch_size"].to_numpy().astype(np.int64)
            if optimizer.batch_schedule.at
            else batch_size,
            initial=problem.initial_point(stream(config.run.seed, "initial")),
            record=run.loss["update"].to_numpy(),
            staleness=tuple(
                staleness_of(one.trace["update"].to_numpy(), one.trace["read_version"].to_numpy())
                for one in runs
                if len(one.trace) >= updates
            ),
            mu=fit.mu,
            law=fit.recommended,
            closure=closure,
            workers=config.cluster.workers,
            turns=turns,
        )

    @property
    def steady(self) -> bool:
        """Whether learning rate and batch size are the same at every update."""
        return np.ndim(self.learning_rate) == 0 and np.ndim(self.batch_size) == 0

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

    Every worker reads version 0; any later version then belongs to one worker, but for the few
    that a worker read which joined late or again. Independent draws of staleness read at least a
    quarter of the versions twice or more.
    """
    read_version = run.trace["read_version"]
    twice = int(read_version[read_version > 0].duplicated().sum())
    return "iid" if twice > max(run.config.cluster.workers, len(read_version) // 20) else "pool"
