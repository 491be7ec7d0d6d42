"""The parameter server as a state machine: order of updates, refusals, and the end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.draws import WorkerDraws
from asgd.policy import Policy
from asgd.rules.base import Optimizer
from asgd.rules.make import make_rule
from asgd.rundir.columns import SHARED
from asgd.streams import stream
from cluster.core.ledger import Record
from cluster.core.messages import Gradient
from cluster.core.server import ParameterServer
from tests.support.faults import Crowd, gradients_of, replay

QUADRATIC = {"kind": "quadratic"}


def configure(workers: int = 3, updates: int = 1000, **cluster: Any) -> RunConfig:
    return make_config(
        {
            "problem": QUADRATIC,
            "optimizer": {"learning_rate": 0.05, "batch_size": 2},
            "cluster": {"workers": workers, **cluster},
            "run": {"updates": updates, "eval_every": 10},
        }
    )


def forged(worker: int, sequence: int, value: Any, read_version: int = 0) -> Gradient:
    return Gradient(worker, sequence, read_version, 0, np.asarray(value, dtype=float), 0.0)


def test_the_first_snapshots_are_sent_together() -> None:
    crowd = Crowd(configure(workers=3))
    crowd.join(0)
    crowd.join(2)
    assert not crowd.at_hand
    crowd.join(1)
    assert {w: s.version for w, s in crowd.at_hand.items()} == {0: 0, 1: 0, 2: 0}


def test_the_start_does_not_wait_for_dead_workers() -> None:
    crowd = Crowd(configure(workers=2))
    crowd.join(0)
    crowd.die(1)
    assert crowd.at_hand[0].version == 0
    crowd.push(0)
    crowd.join(1)
    assert crowd.at_hand[1].version == 1


def test_free_schedule_applies_in_order_of_arrival() -> None:
    crowd = Crowd(configure(workers=3))
    crowd.join_all()
    order = [2, 0, 0, 1, 2, 0, 1, 1, 1, 2]
    for worker in order:
        crowd.push(worker)
    record = crowd.server.drain()
    assert record.trace["worker"].tolist() == order
    assert record.trace["staleness"].tolist() == [0, 1, 0, 3, 3, 2, 2, 0, 0, 4]
    np.testing.assert_array_equal(
        crowd.server.parameters, replay(crowd.config, crowd.problem, crowd.initial, record)[-1]
    )


def test_uniform_schedule_follows_the_drawn_order() -> None:
    config = configure(workers=4, updates=400, schedule="uniform")
    crowd = Crowd(config)
    crowd.join_all()
    arrivals = np.random.default_rng(1)
    while crowd.at_hand:
        crowd.push(int(arrivals.choice(sorted(crowd.at_hand))))
    record = crowd.server.drain()
    drawn = stream(config.run.seed, "schedule").integers(4, size=400)
    np.testing.assert_array_equal(record.trace["worker"], drawn)
    points = replay(config, crowd.problem, crowd.initial, record)
    np.testing.assert_array_equal(crowd.server.parameters, points[-1])
    for evaluation in record.evaluations:
        np.testing.assert_array_equal(evaluation.parameters, points[evaluation.update])
    # A worker gets the version that its own gradient made, even if other gradients wait.
    assert set(crowd.stopped) == set(range(4))
    for worker in range(4):
        own = record.trace["worker"] == worker
        made = record.trace["update"][own][:-1] + 1
        np.testing.assert_array_equal(record.trace["read_version"][own][1:], made)


def test_the_uniform_schedule_continues_without_a_dead_worker() -> None:
    crowd = Crowd(configure(workers=3, schedule="uniform"))
    crowd.join_all()
    waited_for = int(stream(0, "schedule").integers(3))
    others = [w for w in range(3) if w != waited_for]
    for worker in others:
        crowd.push(worker)
    assert crowd.server.version == 0
    crowd.die(waited_for)
    assert crowd.server.version > 0
    for _ in range(20):
        crowd.push(next(iter(crowd.at_hand)))
    assert waited_for not in crowd.server.drain().trace["worker"]


def test_lost_gradient_names_the_update_the_server_had_reached() -> None:
    crowd = Crowd(configure(workers=3))
    crowd.join_all()
    crowd.push(0)
    crowd.push(1)
    crowd.die(2)
    (lost,) = crowd.server.drain().events
    assert (lost["event"], lost["worker"], lost["update"]) == ("gradient_lost", 2, 2)


def test_a_repeated_gradient_is_answered_but_not_applied() -> None:
    crowd = Crowd(configure(workers=2))
    crowd.join_all()
    crowd.push(0)
    crowd.push(1)
    before = crowd.server.parameters.copy()
    del crowd.at_hand[0]
    crowd.send(crowd.sent[0][0])
    assert crowd.server.version == 2
    np.testing.assert_array_equal(crowd.server.parameters, before)
    assert (crowd.at_hand[0].version, crowd.at_hand[0].sequence) == (2, 1)


def test_gradient_of_an_older_epoch_is_refused() -> None:
    crowd = Crowd(configure(workers=1))
    crowd.server.epoch = 3
    crowd.join_all()
    crowd.send(forged(0, 0, [1.0]))
    assert crowd.server.version == 0
    assert crowd.at_hand[0].epoch == 3
    crowd.push(0)
    assert crowd.server.version == 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([np.nan], "not finite"),
        ([np.inf], "not finite"),
        ([1.0, 2.0], "shape (2,), expected (1,)"),
        ([[1.0]], "shape (1, 1), expected (1,)"),
    ],
)
def test_unusable_gradient_is_refused_and_counted(value: Any, reason: str) -> None:
    crowd = Crowd(configure(workers=1))
    crowd.join_all()
    crowd.send(forged(0, 0, value))
    assert crowd.server.version == 0
    assert crowd.server.status(crowd.now).rejected == 1
    assert crowd.at_hand[0].sequence == 1  # the next gradient uses another batch
    (event,) = crowd.server.drain().events
    assert event.pop("time") > 0
    assert event == {
        "event": "gradient_rejected",
        "worker": 0,
        "sequence": 0,
        "update": 0,
        "reason": reason,
    }


def test_large_finite_gradient_is_applied() -> None:
    crowd = Crowd(configure(workers=1))
    crowd.join_all()
    crowd.send(forged(0, 0, [1e200]))
    assert crowd.server.version == 1


@pytest.mark.parametrize("read_version", [-1, 1])
def test_version_that_was_never_read_is_refused(read_version: int) -> None:
    crowd = Crowd(configure(workers=1))
    crowd.join_all()
    crowd.send(forged(0, 0, [1.0], read_version))
    assert crowd.server.version == 0


def test_the_end_stops_all_workers() -> None:
    crowd = Crowd(configure(workers=3, updates=5))
    crowd.join_all()
    for worker in (0, 1, 0, 1, 0):
        crowd.push(worker)
    assert crowd.stopped == {0: "finished"}
    for worker in (1, 2):
        crowd.push(worker)
    assert set(crowd.stopped) == {0, 1, 2}
    record = crowd.server.drain()
    assert record.trace["update"].tolist() == [0, 1, 2, 3, 4]
    assert [e.update for e in record.evaluations] == [0, 5]


def test_many_updates_between_drains_lose_no_row() -> None:
    crowd = Crowd(configure(workers=1, updates=5000))
    crowd.join_all()
    while crowd.at_hand:
        crowd.push(0)
    np.testing.assert_array_equal(crowd.server.drain().trace["update"], np.arange(5000))
    assert crowd.server.drain().empty


def test_too_many_unusable_gradients_end_the_run() -> None:
    crowd = Crowd(configure(workers=2))
    crowd.join_all()
    for sequence in range(11):
        assert not crowd.stopped
        crowd.send(forged(0, sequence, [np.nan]))
    assert crowd.stopped[0].startswith("11 gradients were refused; the last one, of worker 0")
    assert crowd.server.drain().evaluations.update.tolist() == [0]


def test_a_run_that_unusable_gradients_end_has_a_last_loss() -> None:
    """It tells the launcher whether the gradients overflowed because the run diverged."""
    crowd = Crowd(configure(workers=2))
    crowd.join_all()
    for _ in range(3):
        crowd.push(0)
    for sequence in range(3, 14):
        assert not crowd.stopped
        crowd.send(forged(0, sequence, [np.inf]))
    assert crowd.stopped
    evaluations = crowd.server.drain().evaluations
    assert evaluations.update.tolist() == [0, 3]
    np.testing.assert_array_equal(evaluations.parameters[-1], crowd.server.parameters)


def run_in_random_order(crowd: Crowd, seed: int = 0) -> Record:
    """Let workers push in random order until all are stopped."""
    crowd.join_all()
    arrivals = np.random.default_rng(seed)
    while crowd.at_hand:
        crowd.push(int(arrivals.choice(sorted(crowd.at_hand))))
    return crowd.server.drain()


def test_sync_equals_serial_sgd_with_the_batches_of_all_workers() -> None:
    config = configure(workers=4, updates=50, mode="sync")
    crowd = Crowd(config)
    record = run_in_random_order(crowd)
    draws = WorkerDraws(config, crowd.problem)
    x = crowd.initial.copy()
    for update in range(50):
        batch = np.concatenate([draws.batch(worker, update, 2) for worker in range(4)])
        x = x - 0.05 * crowd.problem.gradient(x, batch)
    np.testing.assert_allclose(crowd.server.parameters, x, rtol=1e-12)
    assert (record.trace["worker"] == SHARED).all()
    assert (record.trace["staleness"] == 0).all()
    assert (record.trace["batch_size"] == 8).all()
    assert record.trace["sequence"].tolist() == list(range(50))
    assert record.members["worker"].tolist() == [0, 1, 2, 3] * 50


def test_a_bound_of_zero_equals_the_synchronous_mode() -> None:
    records = []
    for cluster in ({"mode": "sync"}, {"mode": "bounded", "max_staleness": 0}):
        crowd = Crowd(configure(workers=3, updates=60, **cluster))
        records.append((run_in_random_order(crowd), crowd.server.parameters))
    (sync, x), (bounded, y) = records
    np.testing.assert_array_equal(x, y)
    for name in ("worker", "sequence", "read_version", "staleness", "gradient_norm"):
        np.testing.assert_array_equal(sync.trace[name], bounded.trace[name])


@pytest.mark.parametrize("bound", [1, 2, 5, 12])
def test_bounded_mode_limits_the_staleness_and_discards_nothing(bound: int) -> None:
    config = configure(workers=4, updates=400, mode="bounded", max_staleness=bound)
    crowd = Crowd(config)
    crowd.join_all()
    eager = np.random.default_rng(bound)
    while crowd.at_hand:  # worker 3 pushes only when others wait for it
        ready = sorted(crowd.at_hand)
        crowd.push(int(eager.choice(ready[:-1] if ready[-1] == 3 and ready[1:] else ready)))
    record = crowd.server.drain()
    assert record.trace["staleness"].max() == bound
    check_exactly_once(crowd, record)
    assert not record.events


def test_bound_that_is_never_reached_changes_nothing() -> None:
    records = []
    for cluster in ({"mode": "async"}, {"mode": "bounded", "max_staleness": 10**6}):
        crowd = Crowd(configure(workers=4, updates=300, **cluster))
        records.append((run_in_random_order(crowd), crowd.server.parameters))
    (free, x), (bounded, y) = records
    np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(free.trace["worker"], bounded.trace["worker"])


def test_a_repeat_of_a_waiting_gradient_is_neither_counted_nor_answered() -> None:
    """An answer would let the worker run ahead of the barrier."""
    crowd = Crowd(configure(workers=2, mode="sync"))
    crowd.join_all()
    crowd.push(0)
    crowd.push(1)
    crowd.push(0)
    for waiting in (crowd.sent[0][-1], crowd.sent[0][0]):
        crowd.send(waiting)
        assert 0 not in crowd.at_hand
    assert crowd.server.status(crowd.now).workers[0].received == 2
    crowd.push(1)
    assert crowd.at_hand[0].version == crowd.server.version == 2


def test_the_barrier_does_not_wait_for_dead_workers() -> None:
    crowd = Crowd(configure(workers=3, mode="sync"))
    crowd.join_all()
    crowd.push(0)
    crowd.push(1)
    assert crowd.server.version == 0
    crowd.die(2)
    assert crowd.server.version == 1
    assert crowd.server.drain().trace["batch_size"].tolist() == [4]


def test_schedules_follow_the_update_and_the_version_read() -> None:
    config = make_config(
        {
            "problem": QUADRATIC,
            "optimizer": {
                "rule": "momentum",
                "momentum": 0.5,
                "learning_rate_schedule": {"at": [10, 20], "values": [0.02, 0.01]},
                "batch_size": 1,
                "batch_schedule": {"at": [15], "values": [7]},
            },
            "cluster": {"workers": 3},
            "run": {"updates": 40},
        }
    )
    crowd = Crowd(config)
    record = run_in_random_order(crowd)
    expected = np.where(record.trace["read_version"] >= 15, 7, 1)
    np.testing.assert_array_equal(record.trace["batch_size"], expected)
    points = replay(config, crowd.problem, crowd.initial, record)
    np.testing.assert_array_equal(crowd.server.parameters, points[-1])


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "push", "lose_reply", "repeat", "die", "join"]),
        st.integers(0, 2),
        st.integers(0, 5),
    ),
    max_size=60,
)
ORDERS: list[dict[str, Any]] = [
    {"schedule": "free"},
    {"schedule": "uniform"},
    {"mode": "sync"},
    {"mode": "bounded", "max_staleness": 1},
    {"mode": "bounded", "max_staleness": 3},
    {"discard_above": 1},
    {"mode": "buffered", "gradients_per_update": 2},
    {"mode": "buffered", "gradients_per_update": 4, "discard_above": 0},
    {"mode": "sync", "gradients_per_update": 2},
    {"mode": "sync", "gradients_per_update": 2, "late": "keep"},
]


@settings(max_examples=300, deadline=None)
@given(ACTIONS, st.sampled_from(ORDERS), st.sampled_from(["sgd", "momentum", "delay_compensated"]))
def test_each_gradient_is_applied_exactly_once_despite_faults(
    actions: list[tuple[str, int, int]], order: dict[str, Any], rule: str
) -> None:
    data: dict[str, Any] = {
        "problem": QUADRATIC,
        "optimizer": {"learning_rate": 0.05, "batch_size": 2, "rule": rule},
        "cluster": {"workers": 3, **order},
        "run": {"updates": 12, "eval_every": 10},
    }
    if rule == "delay_compensated":
        assume("mode" not in order)
        data["optimizer"]["compensation"] = 1.0
    crowd = Crowd(make_config(data))
    crowd.join_all()
    for action, worker, which in actions:
        if action == "push" and worker in crowd.at_hand:
            crowd.push(worker)
        elif action == "lose_reply" and worker in crowd.at_hand and crowd.sent[worker]:
            del crowd.at_hand[worker]
            crowd.send(crowd.sent[worker][-1])  # a worker without an answer asks again
        elif action == "repeat" and crowd.sent[worker]:
            crowd.send(crowd.sent[worker][which % len(crowd.sent[worker])])
        elif action == "die":
            crowd.die(worker)
        elif action == "join":
            crowd.join(worker)
    crowd.server.stop("test")  # records discards since the last update
    check_exactly_once(crowd, crowd.server.drain())


def check_exactly_once(crowd: Crowd, record: Record) -> None:
    """Assert that the trace accounts for every gradient and for the parameters."""
    trace, cluster = record.trace, crowd.config.cluster
    updates = np.arange(crowd.server.version)
    np.testing.assert_array_equal(trace["update"], updates)
    np.testing.assert_array_equal(trace["staleness"], updates - trace["read_version"])
    assert (trace["staleness"] >= 0).all()
    bounded = cluster.mode == "bounded"
    bound = cluster.max_staleness if bounded else Policy.of(cluster).oldest
    assert (trace["staleness"] <= bound).all()
    early = record.discarded["update"] < crowd.server.version
    assert (record.discarded["staleness"][early] > bound).all()
    points = replay(crowd.config, crowd.problem, crowd.initial, record)
    np.testing.assert_array_equal(crowd.server.parameters, points[-1])

    applied = [gradient[:2] for group in gradients_of(record) for gradient in group]
    columns = (record.discarded[name].tolist() for name in ("worker", "sequence"))
    unused = [*zip(*columns, strict=True), *((e["worker"], e["sequence"]) for e in record.events)]
    assert max(Counter(applied + unused).values(), default=1) == 1
    for worker in crowd.workers:
        known = sorted(sequence for w, sequence in applied + unused if w == worker)
        assert known == list(range(len(known)))


@pytest.mark.parametrize("size", [1, 2**15, 100_003])
@pytest.mark.parametrize(
    "optimizer",
    [{}, {"rule": "momentum"}, {"rule": "staleness_aware"}, {"clip_norm": 1e-3}],
    ids=["sgd", "momentum", "staleness_aware", "clipped"],
)
def test_steps_of_long_vectors_equal_those_of_the_rule(
    optimizer: dict[str, Any], size: int
) -> None:
    config = make_config({"optimizer": optimizer, "cluster": {"workers": 2}})
    rng = np.random.default_rng(8)
    server = ParameterServer(config, rng.normal(size=size))
    x = server.parameters.copy()
    optimizer = Optimizer(make_rule(config), x[None])  # for paths, which have no blocks
    ((_, first), (_, second)) = [*server.join(0, 0.0), *server.join(1, 0.0)]
    for staleness, snapshot in enumerate((first, second)):
        gradient = rng.normal(size=size)
        message = Gradient(staleness, snapshot.sequence, snapshot.version, 0, gradient, 0.0)
        server.receive(message, 1.0)
        rate = config.optimizer.learning_rate
        optimizer.apply(x[None], gradient[None], rate, staleness, staleness)
        np.testing.assert_array_equal(server.parameters, x)
