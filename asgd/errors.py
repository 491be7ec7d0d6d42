"""The public exceptions, and parts of their messages.

The command line prints one line for each and sets the exit status.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class AsgdError(Exception):
    """Base class of all errors of this project."""


class InputError(AsgdError, ValueError):
    """Invalid input; the message names the key, the value and the accepted values."""


class ProblemChangedError(InputError):
    """The problem has changed since the run began."""


class NoRowsError(InputError):
    """A run with `run.record = "counts"` has no row for each update."""

    def __init__(self, run: Path) -> None:
        super().__init__(
            f'{run}: run.record = "counts": expected run.record = "updates" for what needs a row '
            "of each update; run.counts has their numbers by time, worker and staleness"
        )


class RunFailedError(AsgdError, RuntimeError):
    """The run ended before its last update; its directory is readable.

    Attributes
    ----------
    run
        The run directory, None if unknown.
    """

    run: Path | None = None


class DivergedError(RunFailedError):
    """The loss diverged: the learning rate is too large for the staleness."""


class UnreliableEstimateError(AsgdError):
    """There is too little data for a reliable estimate.

    Attributes
    ----------
    estimate
        The unreliable estimate.
    """

    def __init__(self, message: str, estimate: Any) -> None:
        super().__init__(message)
        self.estimate = estimate


def message_of(error: BaseException) -> str:
    """Return the message of an exception of the user's code in one line."""
    try:
        return " ".join(str(error).split())
    except Exception:  # an exception may raise another when it is shown
        return "its message cannot be shown"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint with the closest known name, "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""


@contextmanager
def written(path: str | Path) -> Iterator[None]:
    """Turn an `OSError` in the block into an `InputError`: the file cannot be written."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise InputError(f"{where}: cannot be written ({error.strerror or error})") from None
