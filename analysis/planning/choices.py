"""The choices of a plan: combinations of workers, learning rates and batch sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from asgd.config.tables import RunConfig
from asgd.errors import InputError

MOST_PLANNED_WORKERS = 10_000


@dataclass(frozen=True)
class Choice:
    """A combination of workers, learning rate and batch size, in samples per gradient."""

    workers: int
    learning_rate: float
    batch_size: int

    def __str__(self) -> str:
        return f"{self.workers} workers, rate {self.learning_rate:g}, batch {self.batch_size}"


def choices_of(
    config: RunConfig,
    workers: Sequence[int] | None,
    learning_rates: Sequence[float] | None,
    batch_sizes: Sequence[int] | None,
) -> list[Choice]:
    """Return every combination once; values that are not given lie around the configured ones.

    Raises
    ------
    InputError
        A value is invalid.
    """
    own, rate = config.cluster.workers, config.optimizer.learning_rate
    if workers is None:
        around = {max(1, own // 2), own, 2 * own}
        workers = sorted({min(count, MOST_PLANNED_WORKERS) for count in around})
    learning_rates = [rate / 2, rate, 2 * rate] if learning_rates is None else learning_rates
    batch_sizes = [config.optimizer.batch_size] if batch_sizes is None else batch_sizes
    for name, counts, most in (
        ("workers", workers, MOST_PLANNED_WORKERS),
        ("batch_size", batch_sizes, 10**9),
    ):
        wrong = [count for count in counts if not 1 <= count <= most]
        if wrong:
            raise InputError(f"{name} = {wrong[0]}: expected 1 to {most}")
    for value in learning_rates:
        if not 0.0 < value < math.inf:
            raise InputError(f"learning_rate = {value}: expected a finite number > 0")
    grid = itertools.product(workers, learning_rates, batch_sizes)
    return list(dict.fromkeys(Choice(*values) for values in grid))
