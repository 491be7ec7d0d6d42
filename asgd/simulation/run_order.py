"""The gradients of each update of a simulated run, from its configuration."""

from __future__ import annotations

import numpy as np

from asgd.config.tables import RunConfig
from asgd.delays import ComputeTime, CycleTimes
from asgd.draws import WorkerDraws
from asgd.epochs import Handout
from asgd.errors import InputError
from asgd.local_steps import PushRule
from asgd.policy import Policy
from asgd.schedules import batch_schedule
from asgd.shards import all_part_sizes
from asgd.simulation.gathering import Gathering, gather
from asgd.simulation.hand_out import handed_out
from asgd.simulation.order import ServerOrder, server_order, unhindered_order
from asgd.staleness.by_name import named_law
from asgd.streams import stream

_CONTINUOUS = ("exponential", "gamma", "lognormal")  # laws without simultaneous arrivals


def check_policy(config: RunConfig) -> None:
    """Refuse a policy that is not simulated.

    Raises
    ------
    InputError
        The mode is "bounded", or the staleness is drawn from a law and the policy needs a server.
    """
    cluster, staleness = config.cluster, config.simulation.staleness
    if cluster.mode == "bounded":
        raise InputError('cluster.mode = "bounded": expected async, buffered or sync to simulate')
    if Policy.of(cluster).plain:
        return
    policy = f'mode = "{cluster.mode}"'
    if cluster.mode == "async":
        policy = f"discard_above = {cluster.discard_above}"
    if staleness != "server":
        raise InputError(
            f'simulation.staleness = "{staleness}": expected "server", because a server decides on '
            f"cluster.{policy}"
        )


def run_order(config: RunConfig, draws: WorkerDraws, n_samples: int) -> Gathering:
    """Return the gradients of each update."""
    policy, optimizer, workers = Policy.of(config.cluster), config.optimizer, config.cluster.workers
    batch_size = batch_schedule(optimizer).array(config.run.updates).astype(np.int64)
    batch_size *= optimizer.gradients_per_push
    handout = None
    if config.data.sampling == "epoch":
        handout = Handout(all_part_sizes(config, n_samples))
    served = config.simulation.staleness == "server"
    if policy.plain or not served:
        order = _server_order(config, draws) if served else _independent_order(config, draws)
        if handout is None:
            return Gathering.of(order, batch_size[order.read_version])
        return Gathering.of(order, *handed_out(handout, order, batch_size, workers * served))
    times = CycleTimes.of(config.simulation)
    gradient_time = times.gradient_time * optimizer.gradients_per_push
    return gather(
        lambda worker, number: gradient_time + draws.compute_seconds(worker, number),
        batch_size,
        workers,
        policy,
        messages=times.messages,
        service_time=times.service_time,
        keeps=PushRule.of(config).keeps,
        handout=handout,
    )


def _server_order(config: RunConfig, draws: WorkerDraws) -> ServerOrder:
    workers, updates = config.cluster.workers, config.run.updates
    times, turns = CycleTimes.of(config.simulation), None
    gradient_time = times.gradient_time * config.optimizer.gradients_per_push
    if config.cluster.schedule == "uniform":
        turns = stream(config.run.seed, "schedule").integers(workers, size=updates)
    elif times.service_time == 0.0 and config.cluster.compute_time.law in _CONTINUOUS:
        order = unhindered_order(
            lambda *block: gradient_time + draws.compute_seconds_of(*block),
            workers,
            updates,
            times.messages,
        )
        if order is not None:
            return order
    added = [draws.all_compute_seconds(worker) for worker in range(workers)]
    return server_order(
        lambda worker, _: gradient_time + next(added[worker]),
        workers,
        updates,
        turns=turns,
        messages=times.messages,
        service_time=times.service_time,
    )


def _independent_order(config: RunConfig, draws: WorkerDraws) -> ServerOrder:
    """Draw each staleness from the law; no read is before x_0.

    No queue produces such reads, so the workers take turns at their average rate.
    """
    times, workers, updates = config.simulation, config.cluster.workers, config.run.updates
    mean = workers - 1 if times.mean_staleness is None else times.mean_staleness
    law = named_law(times.staleness, mean)
    staleness = law.rvs(updates, stream(config.run.seed, "staleness"))
    update = np.arange(updates)
    worker, sequence = update % workers, update // workers
    added = [draws.all_compute_seconds(worker) for worker in range(workers)]
    gradients = config.optimizer.gradients_per_push
    fixed = gradients * times.gradient_time
    computing = fixed + np.array([next(added[w]) for w in worker.tolist()])
    mean_compute = gradients * float(ComputeTime.from_config(config.cluster).mean.mean())
    cycle = fixed + mean_compute + CycleTimes.of(times).messages
    applied = max(cycle / workers, times.service_time) * np.arange(1.0, updates + 1.0)
    return ServerOrder(worker, sequence, update - np.minimum(staleness, update), computing, applied)
