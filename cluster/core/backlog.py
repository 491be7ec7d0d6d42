"""Limits the recorder's backlog to about a second of work.

If evaluating a loss takes longer than the updates between two losses, losses are skipped, or the
run slows down to the recorder's speed. This bounds the memory, keeps status calls fast, and leaves
little to write when a run is interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass

_RECORDS = 4  # in the queue, besides the record being written
_BYTES = 32_000_000  # of parameters; another record may be queued below this size
_SECONDS = 0.3  # evaluation time per record
_SECONDS_TO_SKIP = 2.0  # evaluation time that may wait before losses are skipped
_SECONDS_QUEUED = 0.45  # another record may be queued below this evaluation time
_AT_FIRST = 0.012  # assumed seconds per evaluation before the first measurement


@dataclass
class Backlog:
    """The records that the recorder has not yet written.

    Attributes
    ----------
    skips
        Whether losses are skipped. Then a record is written before its losses are evaluated, and
        losses that wait leave room for more records, but not for more losses.
    records
        Number of records.
    evaluations
        Number of losses to evaluate in all of them.
    nbytes
        Size of their parameters.
    seconds_each
        Seconds per evaluation, recently measured.
    """

    skips: bool = False
    records: int = 0
    evaluations: int = 0
    nbytes: int = 0
    seconds_each: float = _AT_FIRST

    @property
    def most_evaluations(self) -> int:
        """Number of losses to evaluate in a full record."""
        seconds = _SECONDS_TO_SKIP if self.skips else _SECONDS
        most = max(1, round(seconds / self.seconds_each))
        if not self.skips:
            return most
        return max(0, most - self.evaluations) if self.nbytes < _BYTES else 0

    @property
    def has_room(self) -> bool:
        """Whether another record may be queued now."""
        if self.records > _RECORDS:
            return False
        return self.skips or (self.nbytes < _BYTES and self._seconds < _SECONDS_QUEUED)

    @property
    def _seconds(self) -> float:
        return self.evaluations * self.seconds_each

    def add(self, evaluations: int, nbytes: int = 0) -> None:
        """Count a queued record."""
        self.records += 1
        self.evaluations += evaluations
        self.nbytes += nbytes

    def remove(self, evaluations: int, seconds: float, nbytes: int = 0) -> None:
        """Count a written record, and the seconds its evaluations took."""
        self.records -= 1
        self.evaluated(evaluations, seconds, nbytes)

    def evaluated(self, evaluations: int, seconds: float, nbytes: int = 0) -> None:
        """Count evaluations, and the seconds they took."""
        self.evaluations -= evaluations
        self.nbytes -= nbytes
        if evaluations:
            self.seconds_each = max(seconds / evaluations, 1e-9)
