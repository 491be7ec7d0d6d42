"""The server's state of one worker."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Seat:
    """The server's state of one worker.

    `sequence` is the number of the gradient that the worker computes or the server holds;
    `position` is the position of its first sample in the epochs. `norm` is the norm of a held
    gradient. `granted` is the time when the worker got its snapshot, infinite if it owes no
    gradient. A `retired` worker gets no more snapshots. `continues` says whether the own state of
    the worker follows from its gradient before `sequence`.
    """

    sequence: int = 0
    read_version: int = 0
    batch_size: int = 0
    position: int = 0
    present: bool = False
    granted: float = math.inf
    received: int = 0
    norm: float = math.nan
    retired: bool = False
    continues: bool = False

    @property
    def owes(self) -> bool:
        """Whether the worker has a snapshot and its gradient has not arrived."""
        return self.granted < math.inf
