"""The positions of epochs that a server hands out in virtual time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asgd.arrays import Integers
from asgd.config.tables import RunConfig
from asgd.epochs import Handout
from asgd.simulation.gathering import Gathering


def handed_out(
    config: RunConfig, order: Gathering, sizes: Sequence[int], batch_size: Integers
) -> tuple[Integers, Integers]:
    """Return position and batch size of each update, as a server without faults hands them out.

    The server hands out a range with each snapshot: to all workers at version 0, then to the worker
    of each update. Where no server makes the order, ranges follow the updates.

    Parameters
    ----------
    config
        The run.
    order
        Its gradients, one of each update.
    sizes
        Number of samples of each part.
    batch_size
        Samples of a gradient by the version that it reads, shape (updates,).

    Returns
    -------
    tuple
        Positions and batch sizes, shape (updates, 1) each.
    """
    handout, updates = Handout(sizes), len(order)
    workers, sequences = order.worker[:, 0].tolist(), order.sequence[:, 0].tolist()
    served = config.simulation.staleness == "server"
    wanted = batch_size.tolist() if served else batch_size[order.read_version[:, 0]].tolist()
    held = {
        worker: handout.take(worker, 0, wanted[0])
        for worker in range(config.cluster.workers if served else 0)
    }
    used = []
    for update, (worker, sequence) in enumerate(zip(workers, sequences, strict=True)):
        if not served:
            held[worker] = handout.take(worker, sequence, wanted[update])
        used.append(held[worker])
        handout.use(worker, sequence, *held[worker])
        if served and update + 1 < updates:
            held[worker] = handout.take(worker, sequence + 1, wanted[update + 1])
    position, size = np.array(used, dtype=np.int64).reshape(-1, 1, 2).transpose(2, 0, 1)
    return position, size
