"""The policy of the server: which gradients make the next update, and what becomes of the others.

Real and simulated runs share it. Gradients are taken in order of arrival. One that is too stale is
discarded; every other one counts towards the next update, which is the mean of those that count.

    mode                          gradients  oldest         waits
    async                         1          discard_above  no     Ringmaster ASGD
    buffered                      K          discard_above  no     FedBuff; with 0, Rennala SGD
    sync                          all        0              yes
    sync, K, late = "discard"     K          0              yes    K fastest of P
    sync, K, late = "keep"        K          none           yes

Nguyen et al., Federated learning with buffered asynchronous aggregation (2022); Chen et al.,
Revisiting distributed synchronous SGD (2016); Tyurin and Richtarik, Optimal time complexities of
parallel stochastic optimization methods (2023: Rennala SGD); Maranjyan, Tyurin and Richtarik,
Ringmaster ASGD (2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from asgd.config.tables import ClusterConfig


@dataclass(frozen=True)
class Policy:
    """Which gradients make the next update, and what becomes of the others.

    Attributes
    ----------
    gradients
        Number of gradients of an update; None for those of all workers.
    oldest
        Largest accepted staleness on arrival, in updates; inf if nothing is discarded.
    waits
        Whether a worker waits for the update that its gradient counts towards. Otherwise it gets
        the newest snapshot at once, and may deliver several gradients for one update.
    """

    gradients: int | None
    oldest: float
    waits: bool

    @classmethod
    def of(cls, cluster: ClusterConfig) -> Policy:
        """Return the policy of a mode other than bounded."""
        if cluster.mode == "sync":
            oldest = 0 if cluster.late == "discard" else math.inf
            return cls(cluster.gradients_per_update, oldest, waits=True)
        oldest = math.inf if cluster.discard_above is None else cluster.discard_above
        return cls(cluster.gradients_per_update or 1, oldest, waits=False)

    @property
    def plain(self) -> bool:
        """Whether each gradient makes an update of its own, as it arrives."""
        return self == _PLAIN


_PLAIN = Policy(1, math.inf, waits=False)
