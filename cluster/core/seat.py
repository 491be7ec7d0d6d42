"""What the server knows of one worker."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Seat:
    """What the server knows of one worker.

    `sequence` is the number of the gradient it computes, or of the one held for it, whose norm is
    `norm`; `granted` is when it got the snapshot for that gradient, infinite while it owes none.
    A worker that is `retired` gets no further snapshot.
    """

    sequence: int = 0
    read_version: int = 0
    batch_size: int = 0
    present: bool = False
    granted: float = math.inf
    received: int = 0
    norm: float = math.nan
    retired: bool = False

    @property
    def owes(self) -> bool:
        """Whether a snapshot is out and its gradient has not arrived."""
        return self.granted < math.inf
