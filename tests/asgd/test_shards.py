"""The parts of the samples that workers draw from."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from scipy import stats

from asgd.arrays import Array
from asgd.config.make import make_config
from asgd.config.tables import DataConfig, RunConfig
from asgd.draws import WorkerDraws
from asgd.errors import InputError
from asgd.problems.linear import LeastSquares, digits
from asgd.problems.make import make_problem
from asgd.rundir.reader import Run, read_run
from asgd.shards import Shards
from asgd.simulation.simulate import simulate
from asgd.verify import record_findings, replay_findings
from tests.support.faults import Crowd

DIGITS = digits()
DIVIDED: list[dict[str, Any]] = [
    {"shards": "partition"},
    {"shards": "by_label"},
    {"shards": "dirichlet", "alpha": 0.3},
]


def config_of(data: dict[str, Any], workers: int = 6, seed: int = 0) -> RunConfig:
    return make_config({"data": data, "cluster": {"workers": workers}, "run": {"seed": seed}})


def classes_of(shards: Shards) -> Array:
    """Return how many samples of each class each part has, shape (parts, classes)."""
    assert shards.parts is not None
    return np.array([np.bincount(DIGITS.labels[part], minlength=10) for part in shards.parts])


@pytest.mark.parametrize("data", DIVIDED, ids=lambda data: data["shards"])
@pytest.mark.parametrize("workers", [1, 6, 1797])
def test_parts_hold_every_sample_once_and_are_of_one_size(data, workers):
    parts = Shards.of(config_of(data, workers), DIGITS).parts
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1797))
    sizes = [len(part) for part in parts]
    assert len(parts) == workers
    assert max(sizes) - min(sizes) <= 1
    again = Shards.of(config_of(data, workers), DIGITS).parts
    assert all(map(np.array_equal, parts, again))
    if workers == 6:
        other = Shards.of(config_of(data, workers, seed=1), DIGITS).parts
        assert not any(map(np.array_equal, parts, other))


def test_a_partition_is_random():
    found = classes_of(Shards.of(config_of({"shards": "partition"}, workers=16), DIGITS))
    assert stats.chi2_contingency(found).pvalue > 1e-3


def test_parts_by_label_are_cut_from_the_sorted_classes():
    found = classes_of(Shards.of(config_of({"shards": "by_label"}, workers=10), DIGITS))
    assert (found > 0).sum() <= 10 + 10 - 1  # a cut adds at most one part to a class
    for part in Shards.of(config_of({"shards": "by_label"}), DIGITS).parts:
        assert not np.array_equal(part, np.sort(part))  # in random order within a class


def test_shares_of_dirichlet_parts_follow_their_law():
    """The first part never exhausts a class, so its shares have the variance of the Dirichlet law.

    Var q_c = p_c (1 - p_c) / (alpha + 1), summed over the classes; rounding adds at most one sample
    of 1797/40. The tolerance is five standard errors over 400 seeds.
    """
    alpha, workers, p = 2.0, 40, np.bincount(DIGITS.labels) / 1797
    data = {"shards": "dirichlet", "alpha": alpha}
    teams = (Shards.of(config_of(data, workers, seed), DIGITS) for seed in range(400))
    first = np.array([classes_of(team)[0] for team in teams])
    assert first.sum(axis=1).max() <= 1797 // workers + 1
    squares = ((first / first.sum(axis=1, keepdims=True) - p) ** 2).sum(axis=1)
    expected = (p * (1 - p)).sum() / (alpha + 1)
    error = squares.std() / np.sqrt(len(squares))
    assert abs(squares.mean() - expected) < 5 * error + 10 * (workers / 1797) ** 2 / 4


@pytest.mark.parametrize(("alpha", "most"), [(1e6, 12.5), (1e-6, 100.0)])
def test_alpha_goes_from_equal_shares_to_single_classes(alpha, most):
    found = classes_of(Shards.of(config_of({"shards": "dirichlet", "alpha": alpha}, 10), DIGITS))
    assert found.sum(axis=1).min() == 179
    largest = found[0].max() / found[0].sum() * 100
    assert largest == pytest.approx(most, abs=2.5)
    if alpha > 1:  # also of the last part, which gets the remaining samples
        assert (np.abs(found - found.mean(axis=0)) <= 10).all()


@pytest.mark.parametrize("data", DIVIDED, ids=lambda data: data["shards"])
def test_workers_draw_uniformly_from_their_part_alone(data):
    config = config_of(data)
    draws, shards = WorkerDraws(config, DIGITS), Shards.of(config, DIGITS)
    for worker in (0, 5, 11):  # worker 11 joined later
        drawn = np.concatenate([draws.batch(worker, sequence, 500) for sequence in range(60)])
        part = shards.parts[worker % 6]
        values, counts = np.unique(drawn, return_counts=True)
        np.testing.assert_array_equal(values, np.sort(part))
        assert stats.chisquare(counts).pvalue > 1e-4
    assert not np.array_equal(draws.batch(5, 0, 8), draws.batch(11, 0, 8))


@pytest.mark.parametrize("data", DIVIDED, ids=lambda data: data["shards"])
def test_a_simulation_uses_the_parts_and_is_verified(tmp_path, data):
    config = make_config(
        {
            "problem": {"kind": "logistic"},
            "data": data,
            "cluster": {"workers": 9, "compute_time": {"law": "exponential"}},
            "run": {"updates": 120, "eval_every": 40},
        }
    )
    run = read_run(simulate(config, tmp_path / "run"))
    assert record_findings(run) == []
    assert replay_findings(run, {}) == []
    shared = msgspec.structs.replace(config, data=DataConfig())
    found = replay_findings(Run(run.path, shared), {})
    assert any("norm of the gradient" in line for line in found)


class Labelled:
    """A plug-in with labels of a chosen kind."""

    dim, n_samples = 1, 8

    def __init__(self, kind: str = "good") -> None:
        if kind == "broken":
            return
        kinds: dict[str, Any] = {
            "good": np.arange(8) % 2,
            "list": [True, False] * 4,
            "short": np.arange(5),
            "floats": np.linspace(0, 1, 8),
            "ragged": [[1], [2, 3]],
        }
        self.labels = kinds[kind]

    def __getattr__(self, name: str) -> Any:
        if name == "labels":
            raise OSError("the disk is gone")
        raise AttributeError(name)

    def initial_point(self, rng):
        return np.zeros(1)

    def loss(self, x):
        return (x**2).sum(axis=-1)

    def gradient(self, x, indices):
        return 2 * x


class Watched(Labelled):
    """A plug-in that records the indices it gets."""

    seen: ClassVar[list[int]] = []

    def gradient(self, x, indices):
        self.seen.extend(np.asarray(indices).tolist())
        return 2 * x


@pytest.mark.parametrize("sampling", ["replacement", "epoch"])
def test_a_plugin_gets_indices_of_the_part_of_its_worker_only(sampling):
    config = make_config(
        {
            "problem": {"kind": "tests.asgd.test_shards:Watched"},
            "data": {"shards": "by_label", "sampling": sampling},
            "optimizer": {"batch_size": 3},
            "cluster": {"workers": 2},
        }
    )
    crowd = Crowd(config)
    crowd.join_all()
    crowd.add(2)
    seen: list[set[int]] = [set(), set(), set()]
    for push in range(60):
        Watched.seen.clear()
        crowd.push(push % 3)
        seen[push % 3] |= set(Watched.seen)
    assert seen[0] == seen[2]  # the added worker shares a part
    assert sorted(map(sorted, seen[:2])) == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("kind", ["good", "list"])
def test_labels_of_a_plugin_are_used(kind):
    table = {"kind": "tests.asgd.test_shards:Labelled", "options": {"kind": kind}}
    config = make_config(
        {"problem": table, "data": {"shards": "by_label"}, "cluster": {"workers": 2}}
    )
    shards = Shards.of(config, make_problem(config))
    assert [sorted(part % 2) for part in shards.parts] in ([[0] * 4, [1] * 4], [[1] * 4, [0] * 4])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", r"has int64 of shape \(5,\)"),
        ("floats", "has float64"),
        ("ragged", "cannot be read"),
        ("broken", r"cannot be read \(OSError: the disk is gone\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(kind, message):
    table = {"kind": "tests.asgd.test_shards:Labelled", "options": {"kind": kind}}
    config = make_config({"problem": table, "data": {"shards": "by_label"}})
    with pytest.raises(InputError, match=f"data.shards = 'by_label'.*problem.kind = .*{message}"):
        Shards.of(config, make_problem(config))


def test_impossible_parts_are_refused():
    few = LeastSquares(np.zeros((3, 1)), np.zeros(3))
    refused = [
        (lambda: config_of({"shards": "dirichlet"}), "shards = 'dirichlet' needs alpha"),
        (
            lambda: config_of({"shards": "by_label", "alpha": 1.0}),
            "alpha = 1 does not belong to shards = 'by_label'",
        ),
        (lambda: config_of({"shards": "dirichlet", "alpha": 0.0}), "data.alpha = 0.0: expected"),
        (lambda: config_of({"shards": "labels"}), "data.shards = 'labels': expected one of"),
        (
            lambda: Shards.of(config_of({"shards": "partition"}, 4), few),
            "data.shards = 'partition': cannot divide 3 samples among cluster.workers = 4",
        ),
        (
            lambda: Shards.of(config_of({"shards": "by_label"}, 2), few),
            "data.shards = 'by_label': expected a problem with labels",
        ),
    ]
    for call, message in refused:
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_least_squares_has_no_classes(tmp_path):
    config = {"problem": {"kind": "least_squares"}, "data": {"shards": "by_label"}}
    with pytest.raises(
        InputError, match=r"'by_label': expected a problem with labels.*'least_squares'"
    ):
        simulate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_whole_numbers_in_the_last_array_of_a_network_are_its_labels():
    torch = pytest.importorskip("torch")
    from asgd import TorchProblem

    x, y = torch.zeros(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])

    class Items(torch.utils.data.Dataset):
        def __init__(self, targets: Any) -> None:
            self._own = targets

        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> Any:
            return x[i], self._own[i]

    class Known(Items):
        targets = (5, 4, 3, 2, 1, 0)

    entropy, square = torch.nn.functional.cross_entropy, torch.nn.functional.mse_loss
    data = torch.utils.data.TensorDataset(x, y)
    for given, loss, expected in (
        ((x, y), entropy, y.tolist()),
        ((x.numpy(), y.numpy()), entropy, y.tolist()),
        (data, entropy, y.tolist()),
        (Items(y), entropy, y.tolist()),
        (Known(y), entropy, [5, 4, 3, 2, 1, 0]),
        ((x, torch.zeros(6, 3)), square, None),
        (Items(torch.zeros(6, 3)), square, None),
    ):
        labels = TorchProblem(torch.nn.Linear(2, 3), loss, given).labels
        assert (labels if labels is None else labels.tolist()) == expected


def test_whole_numbers_in_the_last_array_of_a_jax_problem_are_its_labels():
    jax = pytest.importorskip("jax")
    from asgd import JaxProblem

    def loss(w: Any, x: Any, y: Any) -> Any:
        return jax.numpy.mean((x @ w - y) ** 2)

    x, y = np.zeros((4, 2), np.float32), np.arange(4)
    assert JaxProblem(loss, np.zeros(2, np.float32), (x, y)).labels.tolist() == [0, 1, 2, 3]
    assert JaxProblem(loss, np.zeros(2, np.float32), (x, y / 2)).labels is None
