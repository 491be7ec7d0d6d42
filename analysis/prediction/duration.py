"""Estimates the duration of a prediction from its first steps."""

from __future__ import annotations

import time
from collections.abc import Callable

_MEASURED = 2.0  # seconds over which the pace is measured


class Forecast:
    """Announces the duration of long work, once.

    The first report is not part of the pace, because the first calls may compile code.

    Parameters
    ----------
    announce
        Called with the seconds that the whole work takes, if it takes long enough to be measured.
    clock
        A monotonic clock, in seconds.
    """

    def __init__(
        self, announce: Callable[[float], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._announce, self._clock = announce, clock
        self._first: tuple[float, float] | None = None
        self._announced = False

    def __call__(self, share: float) -> None:
        """Take in the completed share of the work."""
        if self._announced or share <= 0:
            return
        now = self._clock()
        if self._first is None:
            self._first = now, share
        elif now - self._first[0] >= _MEASURED and share > self._first[1]:
            self._announced = True
            self._announce((now - self._first[0]) / (share - self._first[1]))


def in_words(seconds: float) -> str:
    """Return a duration in everyday words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
