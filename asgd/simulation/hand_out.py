"""The positions of epochs that a server hands out in virtual time."""

from __future__ import annotations

import numpy as np

from asgd.arrays import Integers
from asgd.epochs import Handout
from asgd.simulation.order import ServerOrder


def handed_out(
    handout: Handout, order: ServerOrder, batch_size: Integers, served: int
) -> tuple[Integers, Integers]:
    """Return batch size and position of each update, as a server without faults hands them out.

    The server hands out a range with each snapshot: to all workers at version 0, then to the worker
    of each update. If the order was not simulated by a server, ranges follow the updates.

    Parameters
    ----------
    handout
        Hands out the positions.
    order
        The gradients, one of each update.
    batch_size
        Samples of a gradient by the version that it reads, shape (updates,).
    served
        Number of workers, if a server was simulated; else 0.

    Returns
    -------
    tuple
        Batch sizes and positions, shape (updates,) each.
    """
    updates = len(order.worker)
    wanted = (batch_size if served else batch_size[order.read_version]).tolist()
    held = {worker: handout.take(worker, 0, wanted[0]) for worker in range(served)}
    used = []
    numbers = zip(order.worker.tolist(), order.sequence.tolist(), strict=True)
    for update, (worker, sequence) in enumerate(numbers):
        if not served:
            held[worker] = handout.take(worker, sequence, wanted[update])
        used.append(held[worker])
        handout.use(worker, sequence, *held[worker])
        if served and update + 1 < updates:
            held[worker] = handout.take(worker, sequence + 1, wanted[update + 1])
    position, size = np.array(used, dtype=np.int64).T
    return size, position
