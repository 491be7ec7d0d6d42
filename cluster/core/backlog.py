"""How far the recorder may fall behind the server: about a second of its work.

If evaluating a loss takes longer than the updates between two losses, the run slows down to the
recorder's pace. So memory stays bounded, status calls are answered, and an interrupted run has
little left to write.
"""

from __future__ import annotations

from dataclasses import dataclass

_RECORDS = 4  # queued besides the one being written
_SECONDS = 0.3  # of evaluation per record
_SECONDS_ON_THEIR_WAY = 0.45  # of evaluation queued, below which another record may follow
_AT_FIRST = 0.012  # assumed seconds of an evaluation until one was measured


@dataclass
class Backlog:
    """The records that the recorder has not written yet.

    Attributes
    ----------
    records
        How many there are.
    evaluations
        Of losses, in all of them.
    seconds_each
        That the latest evaluations took.
    """

    records: int = 0
    evaluations: int = 0
    seconds_each: float = _AT_FIRST

    @property
    def most_evaluations(self) -> int:
        """How many losses to be evaluated make a record."""
        return max(1, round(_SECONDS / self.seconds_each))

    @property
    def has_room(self) -> bool:
        """Whether another record may be handed over now."""
        return self.records <= _RECORDS and self._seconds < _SECONDS_ON_THEIR_WAY

    @property
    def _seconds(self) -> float:
        return self.evaluations * self.seconds_each

    def add(self, evaluations: int) -> None:
        """Take note of a record that is handed over."""
        self.records += 1
        self.evaluations += evaluations

    def remove(self, evaluations: int, seconds: float) -> None:
        """Take note of a record that is written, and how long its evaluations took."""
        self.records -= 1
        self.evaluations -= evaluations
        if evaluations:
            self.seconds_each = max(seconds / evaluations, 1e-9)
