"""The worker: its draws, its gradients, and its end."""

from __future__ import annotations

import numpy as np

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.draws import WorkerDraws
from asgd.problems.make import make_problem
from asgd.streams import stream
from cluster.core.messages import Array, Gradient, Reply, Snapshot, Stop
from cluster.core.server import ParameterServer
from cluster.core.worker import Worker


def configure(**cluster: object) -> RunConfig:
    return make_config(
        {
            "problem": {"kind": "least_squares"},
            "optimizer": {"learning_rate": 0.05, "batch_size": 3},
            "cluster": {"workers": 2, **cluster},
            "run": {"updates": 40, "seed": 5},
        }
    )


class Direct:
    """A connection of one worker to a server in the same process."""

    def __init__(self, server: ParameterServer) -> None:
        self.server = server
        self.sequences: list[int] = []

    def join(self, worker: int) -> Reply:
        self.server.join(1 - worker, 0.0)
        return dict(self.server.join(worker, 0.0))[worker]

    def push(self, gradient: Gradient) -> Reply:
        self.sequences.append(gradient.sequence)
        return dict(self.server.receive(gradient, 0.0))[gradient.worker]


def snapshot(config: RunConfig, sequence: int) -> tuple[Array, Snapshot]:
    x = make_problem(config).initial_point(stream(config.run.seed, "initial"))
    return x, Snapshot(x, version=7, epoch=2, sequence=sequence, batch_size=3)


def test_a_worker_works_until_it_is_told_to_stop() -> None:
    config = configure()
    problem = make_problem(config)
    server = ParameterServer(config, problem.initial_point(stream(5, "initial")))
    connection = Direct(server)
    assert Worker(config, 1, problem).run(connection) == Stop("finished")
    assert connection.sequences == list(range(40))
    assert server.version == 40


def test_draws_depend_on_seed_worker_and_sequence_alone() -> None:
    config = configure()
    problem = make_problem(config)
    x, late = snapshot(config, sequence=9)
    used, fresh = Worker(config, 1, problem), Worker(config, 1, problem)
    for sequence in (0, 3, 200):
        used.compute(snapshot(config, sequence)[1])
    expected = problem.gradient(x, WorkerDraws(config, problem).batch(1, 9, 3))
    for worker in (used, fresh):
        np.testing.assert_array_equal(worker.compute(late).gradient, expected)
    other = Worker(config, 0, problem).compute(late).gradient
    assert not np.array_equal(other, expected)


def test_a_gradient_carries_the_numbers_of_its_snapshot() -> None:
    config = configure()
    gradient = Worker(config, 1, make_problem(config)).compute(snapshot(config, 4)[1])
    assert (gradient.worker, gradient.sequence) == (1, 4)
    assert (gradient.read_version, gradient.epoch) == (7, 2)


def test_added_compute_time_is_spent() -> None:
    config = configure(compute_time={"law": "constant", "mean": [1e-9, 0.02]})
    gradient = Worker(config, 1, make_problem(config)).compute(snapshot(config, 0)[1])
    assert gradient.compute_seconds >= 0.02
