"""Work by worker: gradients applied, gradients discarded, and samples that count less.

A worker's share of the applied gradients is smaller than an even one for two reasons: it delivers
less often, and more of what it delivers is discarded. The two factors multiply.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from asgd.arrays import Integers
from asgd.counted import abridged
from asgd.policy import Policy
from asgd.rundir.columns import SHARED
from asgd.rundir.reader import Run
from asgd.shards import has_own_parts

_LISTED = 8  # workers
_PARTS = "Each worker has samples of its own, which weigh as much in the run as its gradients."
_EVEN = 1.5  # a smaller gap below an even share is not reported


def work_by_worker(run: Run) -> pd.DataFrame:
    """Return one row per worker: its delivered, applied and discarded gradients.

    Columns: `worker`; `applied` and `discarded` (gradients); `discarded_share` (of what it
    delivered, nan if that is nothing); `delivered_share` and `applied_share` (of all workers'
    gradients).
    """
    workers, counts = _gradients(run)
    delivered = counts[0] + counts[1]
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {
                "worker": workers,
                "applied": counts[0],
                "discarded": counts[1],
                "discarded_share": counts[1] / delivered,
                "delivered_share": delivered / max(delivered.sum(), 1),
                "applied_share": counts[0] / max(counts[0].sum(), 1),
            }
        )


def _gradients(run: Run) -> tuple[Integers, list[Integers]]:
    """Return the workers, and the number of applied and of discarded gradients of each."""
    team = np.arange(run.config.cluster.workers)
    if run.keeps_rows:
        trace = run.trace
        own = trace["worker"][trace["worker"] != SHARED]
        applied = np.concatenate([own, run.members["worker"]]).astype(np.int64)
        discarded = run.discarded["worker"].to_numpy()
        workers = np.unique(np.concatenate([team, applied, discarded]))
        return workers, [
            np.array([np.count_nonzero(gradients == worker) for worker in workers])
            for gradients in (applied, discarded)
        ]
    rows = run.counts[run.counts["worker"] != SHARED]
    numbers = rows.groupby("worker")[["updates", "members", "discarded"]].sum()
    workers = np.union1d(team, numbers.index.to_numpy())
    numbers = numbers.reindex(workers, fill_value=0)
    applied = (numbers["updates"] + numbers["members"]).to_numpy()
    return workers, [applied, numbers["discarded"].to_numpy()]


def has_bias(run: Run) -> bool:
    """Whether the policy of a run may prefer some workers' gradients."""
    cluster = run.config.cluster
    chooses = cluster.mode != "bounded" and not Policy.of(cluster).plain
    return run.has_discarded or (chooses and cluster.gradients_per_update is not None)


def bias_in_words(work: pd.DataFrame) -> str:
    """Return the discarded share of each worker, and which workers are under-represented."""
    worker, discarded = work["worker"].to_numpy(), int(work["discarded"].sum())
    total, share = discarded + int(work["applied"].sum()), work["discarded_share"].to_numpy()
    text = "No gradient was discarded."
    if discarded:
        text = f"Discarded: {discarded:,} of {total:,} gradients ({_percent(discarded / total)})"
        least, most = int(np.nanargmin(share)), int(np.nanargmax(share))
        if share[most] > share[least]:
            text += (
                f", from {_percent(share[least])} of those of worker {worker[least]} to "
                f"{_percent(share[most])} of those of worker {worker[most]}"
            )
        text += "."
    return f"{text} {_least(work)}" if len(work) > 1 else text


def bias(run: Run) -> dict[str, Any] | None:
    """Return the bias of a run as JSON values, None if all gradients and samples count alike."""
    own_parts = has_own_parts(run.config.data)
    if not has_bias(run) and not own_parts:
        return None
    work = work_by_worker(run)
    sentence = bias_in_words(work) if has_bias(run) else _least(work)
    if own_parts:
        sentence += f" {_PARTS}"
    columns = {
        str(name): [None if value != value else value for value in column.tolist()]
        for name, column in work.items()
    }
    return {"sentence": sentence, **columns}


def _least(work: pd.DataFrame) -> str:
    """Return the sentence on the worker that contributes least."""
    even, shares = 1.0 / len(work), work["applied_share"].to_numpy()
    row, names = int(shares.argmin()), work["worker"].to_numpy()
    name, share = names[row], float(shares[row])
    if share == 0.0:
        none = [str(one) for one in names[shares == 0.0]]
        noun = "worker" if len(none) == 1 else "workers"
        return f"No gradient of {noun} {abridged(none, _LISTED)} was applied."
    if even / share < _EVEN:
        return f"Every worker has at least {_percent(share)} of the applied gradients."
    delivered = float(work["delivered_share"].to_numpy()[row])
    reasons = ", because it delivers less often"
    if work["discarded"].any() and delivered > 0.95 * even:
        reasons = ", although it delivers as often: more of its gradients are discarded"
    elif work["discarded"].any():
        more = "more" if delivered > share else "fewer"
        reasons = (
            f", {even / delivered:.3g} times because it delivers less often and "
            f"{delivered / share:.3g} times because {more} of its gradients are discarded"
        )
    return (
        f"Worker {name} has {_percent(share)} of the applied gradients, an even share is "
        f"{_percent(even)}: {even / share:.3g} times less{reasons}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
