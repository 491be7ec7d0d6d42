"""Detects whether the problem has changed since a run began.

A run directory does not contain the code and data of a plug-in, which may change later. So each run
writes the size, loss and gradient norm of its problem at x_0 as the event `problem`. Commands that
resume or predict the run compare these values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from asgd.errors import InputError, ProblemChangedError
from asgd.problems.base import ROUNDING, Problem, starting_point
from asgd.rundir.reader import Run
from asgd.rundir.writer import RunWriter

# Relative; above single-precision differences between machines, below the effect of other data.
_TOLERANCE = 1e-5
_NAMES = {
    "dim": "dim",
    "n_samples": "n_samples",
    "loss": "f(x_0)",
    "gradient_norm": "|grad f(x_0)|",
}


@dataclass(frozen=True)
class ProblemRecord:
    """The size of a problem, and its values at x_0.

    Attributes
    ----------
    dim, n_samples
        Number of parameters and of samples.
    dtype
        Precision of the parameters, "float64" or "float32".
    loss, gradient_norm
        f(x_0) and the Euclidean norm of grad f(x_0); None if not finite. The loss of a classifier
        at zero does not depend on the data, but the gradient does.
    """

    dim: int
    n_samples: int
    dtype: str
    loss: float | None
    gradient_norm: float | None

    @classmethod
    def of(cls, problem: Problem, seed: int) -> ProblemRecord:
        """Evaluate a problem at x_0.

        Raises
        ------
        InputError
            The user's code raises.
        """
        try:
            with np.errstate(all="ignore"):
                x = starting_point(problem, seed)
                loss = float(problem.loss(x))
                gradient_norm = float(np.linalg.norm(problem.gradient(x)))
        except InputError:
            raise
        except Exception as error:  # a plug-in may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise InputError(f"the problem raised at the initial point: {reason}") from error
        size = problem.dim, problem.n_samples, problem.dtype.name
        return cls(*size, _finite(loss), _finite(gradient_norm))

    def note(self, writer: RunWriter) -> None:
        """Write the event `problem`."""
        writer.event("problem", **asdict(self))


def problem_changes(run: Run, problem: Problem) -> str:
    """Describe how a problem differs from the record of a run, "" if it does not.

    Raises
    ------
    InputError
        The user's code raises.
    """
    before = _recorded(run)
    if not before:
        return ""
    return _changes(before, asdict(ProblemRecord.of(problem, run.config.run.seed)))


def check_problem(run: Run, problem: Problem, task: str, *, force: bool = False) -> None:
    """Refuse to use a run whose problem has changed.

    Parameters
    ----------
    task
        The command's task, for the event.
    force
        Continue despite a change, and write the event `problem_changed`.

    Raises
    ------
    ProblemChangedError
        The problem has changed.
    """
    changes = problem_changes(run, problem)
    if not changes:
        return
    if not force:
        raise ProblemChangedError(
            f"{run.path}: the problem has changed since the run began: {changes}; "
            "--force continues anyway"
        )
    event = {"task": task, "changes": changes}
    if not any(event.items() <= known.items() for known in run.events):
        RunWriter(run.path).event("problem_changed", **event)


def _recorded(run: Run) -> dict[str, Any]:
    """Return the record of the problem, empty if the run ended before it was written."""
    for event in run.events:
        if event.get("event") == "problem":
            return {name: event.get(name) for name in (*_NAMES, "dtype")}
    return {}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the differences with both values; unknown numbers are skipped."""
    scale = abs(now["loss"] or 0.0)
    known = [key for key in _NAMES if _is_number(before.get(key)) and _is_number(now[key])]
    found = [
        f"{_NAMES[key]} is {now[key]:.8g}, was {before[key]:.8g}"
        for key in known
        if not math.isclose(before[key], now[key], rel_tol=_TOLERANCE, abs_tol=1e-9 * scale)
    ]
    dtype = before.get("dtype") or "float64"  # version 0.1.0 did not record it
    if dtype in [one.name for one in ROUNDING if one.name != now["dtype"]]:
        found.append(f"dtype is {now['dtype']}, was {dtype}")
    return ", ".join(found)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
