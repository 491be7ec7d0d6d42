"""The exceptions a user can meet; the command line turns each into one line and an exit status."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class AsgdError(Exception):
    """Base of every error this project raises on purpose."""


class InputError(AsgdError, ValueError):
    """The input cannot be used: the message names the key, the value and what would be accepted."""


class ProblemChangedError(InputError):
    """The problem is not the one that the run began with."""


class RunFailedError(AsgdError, RuntimeError):
    """The run ended before its last update; what it wrote so far is readable.

    Attributes
    ----------
    run
        Its directory, where that is known.
    """

    run: Path | None = None


class DivergedError(RunFailedError):
    """The loss left every bound: the learning rate is too large for the staleness."""


class UnreliableEstimateError(AsgdError):
    """Too little data for the estimate asked for.

    Attributes
    ----------
    estimate
        The estimate that is refused, for whoever wants to look at it all the same.
    """

    def __init__(self, message: str, estimate: Any) -> None:
        super().__init__(message)
        self.estimate = estimate
