"""Decides when a failed worker is restarted, and when it is given up."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

_FIRST_DELAY = 0.1  # seconds; doubles with each failure in a row
_LONGEST_DELAY = 30.0
_FAILURES = 5  # in a row, without a delivered gradient
_PATIENCE = 180.0  # seconds of transient failures, such as refused connections


@dataclass
class _Streak:
    """Consecutive failures of a worker; the last `raised` were in the problem's code."""

    since: float
    delivered: int
    failures: int = 0
    raised: int = 0


@dataclass
class Restarts:
    """The failures of the workers of one run.

    A worker that has delivered gradients since its last start is restarted with the shortest delay.
    Otherwise the delay doubles, and the worker is given up after five exceptions in a row of the
    problem's code, or after three minutes of other failures.
    """

    _streaks: dict[int, _Streak] = field(default_factory=dict)
    _waiting: list[tuple[float, int]] = field(default_factory=list)
    first_reason: str | None = None
    _in_code: bool = False

    def failed(
        self, worker: int, reason: str, delivered: int, now: float, *, in_code: bool = False
    ) -> float | None:
        """Note a failure.

        Parameters
        ----------
        worker
            The worker that failed.
        reason
            Why, in one line.
        delivered
            Gradients the server has received from this worker in the whole run.
        now
            Seconds on any steady clock.
        in_code
            Whether the problem's code raised; the first such reason is shown.

        Returns
        -------
        float or None
            Seconds until the restart; None if the worker is given up.
        """
        if self.first_reason is None or (in_code and not self._in_code):
            self.first_reason = f"worker {worker}: {reason}"
            self._in_code = in_code
        streak = self._streaks.get(worker)
        if streak is None or delivered > streak.delivered:
            streak = self._streaks[worker] = _Streak(now, delivered)
        streak.failures += 1
        streak.raised = streak.raised + 1 if in_code else 0
        lasting = streak.failures >= _FAILURES and now - streak.since >= _PATIENCE
        if streak.raised >= _FAILURES or lasting:
            return None
        delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** (streak.failures - 1))
        heapq.heappush(self._waiting, (now + delay, worker))
        return delay

    def streak(self, worker: int, now: float) -> str:
        """Describe how often a worker has failed in a row, and for how long."""
        streak = self._streaks[worker]
        return f"{streak.failures} failures in a row, {now - streak.since:.0f} s"

    def due(self, now: float) -> list[int]:
        """Remove and return the workers to start now."""
        workers = []
        while self._waiting and self._waiting[0][0] <= now:
            workers.append(heapq.heappop(self._waiting)[1])
        return workers

    @property
    def pending(self) -> bool:
        """Whether a restart is still pending."""
        return bool(self._waiting)
