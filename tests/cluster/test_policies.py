"""Policies of the server: which gradients count or are discarded, and their record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.errors import InputError
from asgd.problems.make import make_problem
from asgd.rundir.reader import Run, read_run
from asgd.simulation.simulate import simulate
from cluster.storage.verify import verify
from tests.cluster.test_server import check_exactly_once, run_in_random_order
from tests.support.faults import Crowd, replay_run
from tests.support.invariants import check_epochs, check_gradients
from tests.support.machine import Machine

RINGMASTER = {"discard_above": 2}
FEDBUFF = {"mode": "buffered", "gradients_per_update": 3}
RENNALA = {"mode": "buffered", "gradients_per_update": 6, "discard_above": 0}
FASTEST = {"mode": "sync", "gradients_per_update": 2}
KEPT = {**FASTEST, "late": "keep"}
POLICIES = [RINGMASTER, FEDBUFF, RENNALA, FASTEST, KEPT]
NAMES = ["ringmaster", "fedbuff", "rennala", "fastest", "kept"]

# The policies of a pair are the same.
EQUAL = [
    ({"mode": "async"}, {"mode": "buffered", "gradients_per_update": 1}),
    ({"mode": "async"}, {"discard_above": 10**9}),
    ({"mode": "async"}, {"mode": "buffered", "gradients_per_update": 1, "discard_above": 10**9}),
    ({"mode": "sync"}, {"mode": "sync", "gradients_per_update": 4}),
    ({"mode": "sync"}, {"mode": "sync", "gradients_per_update": 4, "late": "keep"}),
]
EQUAL_NAMES = ["buffered-1", "above-1e9", "both", "all-of-4", "all-of-4-kept"]
GRADIENTS = {"rule": "momentum", "learning_rate": 0.01, "batch_size": 2}
STEPS = {"local_steps": 3, "local_learning_rate": 0.02, "batch_size": 2}
KEPT_STEPS = {**STEPS, "local_rule": "adam", "local_state": "keep"}
EPOCHS = {
    "problem": {"kind": "logistic"},  # 569 samples, parts of 142 or 143: the last batch is shorter
    "data": {"sampling": "epoch", "shards": "partition"},
    "optimizer": {**GRADIENTS, "batch_size": 40},
}
PUSHED: dict[str, dict[str, Any]] = {
    "gradients": {"optimizer": GRADIENTS},
    "steps": {"optimizer": STEPS},
    "kept-steps": {"optimizer": KEPT_STEPS},
    "epochs": EPOCHS,
}
VIRTUAL = {"compute_time": {"law": "exponential", "mean": [0.01, 0.01, 0.01, 0.05]}}


def configure(updates: int = 200, rule: str = "momentum", **tables: Any) -> RunConfig:
    cluster = {"workers": 4, **tables.pop("cluster", {})}
    return make_config(
        {
            "problem": {"kind": "quadratic"},
            "optimizer": {"rule": rule, "learning_rate": 0.01, "batch_size": 2},
            "cluster": cluster,
            "run": {"updates": updates, "eval_every": 10, "checkpoint_every": 20},
            **tables,
        }
    )


def assert_same_tables(one: Run, other: Run) -> None:
    for table in ("trace", "members", "discarded", "loss"):
        first, second = getattr(one, table), getattr(other, table)
        assert first.equals(second), f"{table} differs"
    np.testing.assert_array_equal(one.parameters, other.parameters)


@pytest.mark.parametrize("pair", EQUAL, ids=EQUAL_NAMES)
def test_equal_policies_make_equal_servers(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    records = []
    for cluster in pair:
        crowd = Crowd(configure(cluster=cluster))
        records.append((run_in_random_order(crowd), crowd.server.parameters))
    (one, x), (other, y) = records
    np.testing.assert_array_equal(x, y)
    for table in ("trace", "members", "discarded"):
        first, second = getattr(one, table), getattr(other, table)
        for name in set(first) - {"compute_seconds"}:  # measured by the wall clock
            np.testing.assert_array_equal(first[name], second[name])
    assert len(one.trace["update"]) == 200
    assert len(one.members["update"]) == (0 if pair[0]["mode"] == "async" else 4 * 200)


@pytest.mark.parametrize("law", ["exponential", "constant"])  # constant: they arrive together
@pytest.mark.parametrize("pair", EQUAL, ids=EQUAL_NAMES)
def test_equal_policies_make_equal_runs_in_virtual_time(
    tmp_path: Path, pair: tuple[dict[str, Any], dict[str, Any]], law: str
) -> None:
    runs = []
    for name, cluster in enumerate(pair):
        times = {"compute_time": {"law": law, "mean": [0.01, 0.01, 0.01, 0.05]}}
        config = configure(
            cluster={**times, **cluster}, simulation={"service_time": 1e-3, "message_time": 1e-4}
        )
        runs.append(read_run(simulate(config, tmp_path / str(name))))
    assert_same_tables(*runs)


@pytest.mark.parametrize("pushed", PUSHED.values(), ids=PUSHED)
@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_a_run_in_virtual_time_is_equal_to_that_of_the_server(
    tmp_path: Path, policy: dict[str, Any], pushed: dict[str, Any]
) -> None:
    """With gradients in the order of a simulated run, the server makes the same run."""
    config = configure(cluster={**VIRTUAL, **policy}, **pushed)
    run = read_run(simulate(config, tmp_path / "run"))
    # Without compute times, during which workers would sleep; only the order of arrival matters.
    plain = msgspec.structs.replace(config.cluster, compute_time=make_config().cluster.compute_time)
    crowd = Crowd(msgspec.structs.replace(config, cluster=plain))
    crowd.join_all()
    for worker in arrivals(run):
        crowd.push(worker)
    record = crowd.server.drain()
    assert crowd.stopped
    np.testing.assert_array_equal(crowd.server.parameters, run.parameters)
    for table in ("trace", "members", "discarded", "positions"):
        simulated, real = getattr(run, table), getattr(record, table)
        for name in set(simulated) - {"compute_seconds", "applied_seconds", "discarded_seconds"}:
            np.testing.assert_array_equal(simulated[name], real[name], f"{table}.{name}")
    assert resets(run.events) == resets(record.events)
    keeps = pushed == {"optimizer": KEPT_STEPS}
    assert bool(resets(run.events)) == (keeps and not run.discarded.empty)
    assert verify(run).findings == []
    np.testing.assert_array_equal(replay_run(run)[-1], run.parameters)
    assert policy is FEDBUFF or policy is KEPT or len(run.discarded) > 20
    if pushed is EPOCHS:
        assert min(whole for whole, _ in check_epochs(run, make_problem(config))) > 0


def resets(events: list[dict[str, Any]]) -> list[list[int]]:
    """Return update, worker and sequence number of each event `state_reset`."""
    names = ("update", "worker", "sequence")
    return [[one[name] for name in names] for one in events if one["event"] == "state_reset"]


def arrivals(run: Run) -> list[int]:
    """Return the workers of a simulated run in the order of arrival of their gradients."""
    times = run.config.simulation
    gradients = run.trace if run.members.empty else run.members
    known = {
        (worker, sequence): seconds
        for table in (gradients, run.discarded)
        for worker, sequence, seconds in zip(
            table["worker"], table["sequence"], table["compute_seconds"], strict=True
        )
    }
    read = {
        (worker, sequence): version
        for table in (gradients, run.discarded)
        for worker, sequence, version in zip(
            table["worker"], table["sequence"], table["read_version"], strict=True
        )
    }
    assert times.service_time == times.message_time == 0.0
    applied = np.concatenate([[0.0], run.trace["applied_seconds"]])
    found, waits = [], run.config.cluster.mode == "sync"
    discarded = set(zip(run.discarded["worker"], run.discarded["sequence"], strict=True))
    used = dict(
        zip(
            zip(gradients["worker"], gradients["sequence"], strict=True),
            gradients["update"],
            strict=True,
        )
    )
    for worker in range(run.config.cluster.workers):
        now = 0.0
        for address in sorted(address for address in known if address[0] == worker):
            now += known[address]
            found.append((now, read[address], worker))
            if waits and address not in discarded:
                now = applied[used[address] + 1]
    return [worker for _, _, worker in sorted(found)]


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
@pytest.mark.parametrize("durability", ["log", "checkpoint"])
def test_killed_server_loses_no_gradient_of_a_policy(
    tmp_path: Path, policy: dict[str, Any], durability: str
) -> None:
    config = configure(cluster=policy)
    settings = msgspec.structs.replace(config.run, durability=durability)
    machine = Machine(tmp_path / "run", msgspec.structs.replace(config, run=settings))
    for kill, updates in enumerate((33, 70, 71, 140)):
        machine.work(updates, seed=kill)
        push_a_few(machine.crowd, kill)  # some gradients are counted, discarded or wait
        if kill % 2:
            machine.crowd.die(int(min(machine.crowd.at_hand, default=0)))
            machine.record()
        reached = machine.crowd.server.version
        machine.restart()
        assert durability == "checkpoint" or machine.crowd.server.version == reached
    machine.work(200, seed=9)
    machine.writer.event("finish")
    run = read_run(machine.path)
    check_gradients(run)
    assert verify(run).findings == []
    np.testing.assert_array_equal(machine.crowd.server.parameters, replay_run(run)[-1])


def push_a_few(crowd: Crowd, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(3):
        if crowd.at_hand:
            crowd.push(int(rng.choice(sorted(crowd.at_hand))))


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_interrupted_run_resumes_with_every_gradient(
    tmp_path: Path, policy: dict[str, Any]
) -> None:
    machine = Machine(tmp_path / "run", configure(cluster=policy))
    machine.work(50)
    push_a_few(machine.crowd, 1)
    machine.crowd.die(min(machine.crowd.at_hand, default=0))
    machine.crowd.server.stop("interrupted")
    machine.record()
    check_gradients(read_run(machine.path))
    assert verify(read_run(machine.path)).findings == []
    resumed = Machine(tmp_path / "run", machine.config, left=True)
    assert resumed.crowd.server.version == machine.crowd.server.version
    resumed.work(200, seed=1)
    resumed.writer.event("finish")
    run = read_run(tmp_path / "run")
    check_gradients(run)
    assert verify(run).findings == []


def test_counted_gradient_outlives_the_memory_of_its_message() -> None:
    """A worker that does not wait writes its next gradient into the memory of its last one."""
    crowd = Crowd(configure(cluster=FEDBUFF))
    crowd.join_all()
    for worker in (0, 1, 2):
        crowd.push(worker)
        if worker < 2:
            crowd.sent[worker][-1].gradient[:] = np.nan
    record = crowd.server.drain()
    assert crowd.server.version == 1
    assert np.isfinite(crowd.server.parameters).all()
    check_exactly_once(crowd, record)


def test_a_round_of_the_fastest_does_not_wait_for_dead_workers() -> None:
    crowd = Crowd(configure(cluster={"mode": "sync", "gradients_per_update": 3}))
    crowd.join_all()
    crowd.push(0)
    crowd.die(2)
    crowd.push(1)
    assert crowd.server.version == 0  # worker 3 still computes
    crowd.die(3)
    assert crowd.server.version == 1
    assert crowd.server.drain().members["worker"].tolist() == [0, 1]


def test_late_gradients_are_discarded_or_kept() -> None:
    records = []
    for cluster in (FASTEST, KEPT):
        crowd = Crowd(configure(cluster=cluster))
        crowd.join_all()
        for worker in (0, 1, 2, 0, 3):
            crowd.push(worker)
        records.append(crowd.server.drain())
    discarded, kept = records
    assert discarded.members["worker"].tolist() == [0, 1]
    assert kept.members["worker"].tolist() == [0, 1, 0, 2]
    assert kept.trace["staleness"].tolist() == [0, 1]


def test_no_worker_waits_for_a_buffer_and_all_wait_for_a_round() -> None:
    crowd = Crowd(configure(cluster={"mode": "buffered", "gradients_per_update": 5}))
    crowd.join_all()
    for _ in range(4):
        crowd.push(2)
        assert crowd.at_hand[2].version == 0
    crowd.push(2)
    record = crowd.server.drain()
    assert record.members["worker"].tolist() == [2] * 5
    assert record.members["sequence"].tolist() == [0, 1, 2, 3, 4]
    crowd = Crowd(configure(cluster=FASTEST))
    crowd.join_all()
    crowd.push(2)
    assert 2 not in crowd.at_hand


# --- against theory ------------------------------------------------------------------------------


def exponential(tmp_path: Path, updates: int = 20_000, workers: int = 6, **cluster: Any) -> Run:
    law = {"law": "exponential", "mean": 1.0}
    config = configure(
        updates,
        "sgd",
        cluster={"workers": workers, "compute_time": law, **cluster},
        simulation={"gradient_time": 0.0},
        run={"updates": updates, "eval_every": updates},
    )
    return read_run(simulate(config, tmp_path / "run"))


@pytest.mark.parametrize("fastest", [1, 3, 6])
def test_kept_rounds_take_the_time_of_the_fastest(tmp_path: Path, fastest: int) -> None:
    """For memoryless workers of mean m a round takes m (H_P - H_{P-K}), independent of others."""
    run = exponential(tmp_path, mode="sync", gradients_per_update=fastest, late="keep")
    rounds = np.diff(run.trace["applied_seconds"].to_numpy(), prepend=0.0)
    left = np.arange(6, 6 - fastest, -1)
    expected, variance = (1 / left).sum(), (1 / left**2).sum()
    assert abs(rounds.mean() - expected) < 4 * np.sqrt(variance / len(rounds))


def test_rounds_that_discard_late_gradients_take_the_derived_time(tmp_path: Path) -> None:
    """A round begins with K workers at its version and P - K late ones, each of rate 1.

    With c gradients counted and s workers late, the next event comes after 1/(P - c) on average; it
    is a late gradient with probability s/(P - c), whose worker then reads the version of the round.
    """
    workers, fastest = 6, 2
    run = exponential(tmp_path, mode="sync", gradients_per_update=fastest, late="discard")

    def rest(counted: int, late: int) -> tuple[float, float]:
        """Return the mean time and the mean number discarded until the round ends."""
        if counted == fastest:
            return 0.0, 0.0
        rate = workers - counted
        seconds, dropped = 1 / rate, 0.0
        for chance, more, following in (
            (late / rate, 1.0, (counted, late - 1)),
            ((rate - late) / rate, 0.0, (counted + 1, late)),
        ):
            if chance:
                time, lost = rest(*following)
                seconds, dropped = seconds + chance * time, dropped + chance * (more + lost)
        return seconds, dropped

    seconds, dropped = rest(0, workers - fastest)
    # The first round has no late workers. Later ones are independent: workers are memoryless.
    rounds = np.diff(run.trace["applied_seconds"].to_numpy())
    per_round = np.bincount(run.discarded["update"], minlength=len(run.trace))[1:]
    for found, expected in ((rounds, seconds), (per_round, dropped)):
        assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(len(found))


@pytest.mark.parametrize("law", ["exponential", "gamma"])
def test_mean_staleness_of_a_buffer_is_workers_minus_one_over_its_size(
    tmp_path: Path, law: str
) -> None:
    """Between read and arrival come P - 1 gradients on average, so (P - 1)/K updates.

    At a random place in the buffer, n gradients complete n/K updates on average, whatever the law.
    The sum over all gradients differs from that by what workers hold at the end, at most P times
    the largest staleness, and by the ends of the run, each below one.
    """
    times = {"law": law, "mean": 1.0}
    run = exponential(tmp_path, mode="buffered", gradients_per_update=4, compute_time=times)
    staleness = (run.members["update"] - run.members["read_version"]).to_numpy()
    batches = staleness[: len(staleness) // 100 * 100].reshape(100, -1).mean(axis=1)
    assert abs(staleness.mean() - 5 / 4) < 4 * batches.std() / 10 + 6 * staleness.max() / len(
        staleness
    )


def test_gradients_of_slow_workers_are_discarded_more_often(tmp_path: Path) -> None:
    """With R = 0, a gradient counts if the other of two workers has made no update meanwhile.

    Both are memoryless, so the next arrival is from each worker with its share of the rates.
    """
    times = {"law": "exponential", "mean": [1.0, 4.0]}
    run = exponential(tmp_path, workers=2, discard_above=0, compute_time=times)
    share = np.bincount(run.trace["worker"], minlength=2) / len(run.trace)
    # After an update of worker i, worker j is late. Worker i makes the next update with probability
    # p_i. Otherwise the gradient of j is discarded, both workers have the newest version, and each
    # makes the next update with its own probability.
    fast = 0.8
    again = {0: fast + (1 - fast) * fast, 1: fast * fast}  # the fast one is next, after i
    expected = again[1] / (1 - again[0] + again[1])
    chain = (run.trace["worker"].to_numpy() == 0).astype(float)
    batches = chain.reshape(100, -1).mean(axis=1)
    assert abs(share[0] - expected) < 4 * batches.std() / 10
    assert expected > fast + 0.05  # more than its share of the work


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "keys"),
    [
        ({"mode": "sync", "gradients_per_update": 5}, ("gradients_per_update = 5", "workers = 4")),
        ({"mode": "sync", "discard_above": 3}, ("discard_above = 3", "mode", "'sync'")),
        ({"mode": "bounded", "discard_above": 3}, ("discard_above = 3", "mode", "'bounded'")),
        ({"discard_above": 3, "schedule": "uniform"}, ("discard_above = 3", "schedule")),
        ({"gradients_per_update": 3}, ("gradients_per_update = 3", "mode", "'async'")),
        ({"mode": "buffered"}, ('mode = "buffered"', "gradients_per_update")),
        ({"mode": "buffered", "gradients_per_update": 0}, ("gradients_per_update = 0", ">= 1")),
        ({"mode": "sync", "late": "keep"}, ('late = "keep"', "gradients_per_update")),
        ({"late": "keep"}, ('late = "keep"', "mode", "'async'")),
        ({**FEDBUFF, "schedule": "uniform"}, ("schedule", "mode", "'buffered'")),
        ({"discard_above": -1}, ("discard_above = -1", ">= 0")),
    ],
)
def test_impossible_policies_are_refused_with_both_keys(
    cluster: dict[str, Any], keys: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as refusal:
        configure(cluster=cluster)
    message = str(refusal.value)
    assert "\n" not in message
    for key in keys:
        assert key in message, message


@pytest.mark.parametrize("policy", [RINGMASTER, FEDBUFF, FASTEST])
def test_drawn_staleness_with_a_policy_is_refused(tmp_path: Path, policy: dict[str, Any]) -> None:
    config = configure(cluster=policy, simulation={"staleness": "geometric"})
    key = "discard_above" if policy is RINGMASTER else "mode"
    with pytest.raises(InputError, match=rf"simulation\.staleness.*cluster\.{key}"):
        simulate(config, tmp_path / "run")
