"""The built-in problems: values, derivatives, moments and noise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from sklearn import datasets
from threadpoolctl import threadpool_limits

from asgd.config.make import make_config
from asgd.config.tables import LINEAR_KINDS, SCALAR_KINDS
from asgd.errors import InputError
from asgd.problems.base import Array, Indices, Problem
from asgd.problems.linear import DATASETS, LeastSquares, Logistic, Softmax
from asgd.problems.make import make_problem
from asgd.problems.scalar import ScalarProblem
from asgd.streams import stream
from tests.support.exact import small_least_squares

KINDS = [*SCALAR_KINDS, *LINEAR_KINDS]


@pytest.fixture(autouse=True)
def _one_blas_thread() -> Iterator[None]:
    """Keep small products from competing for a busy machine."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(scope="module")
def problems() -> dict[str, Problem]:
    return {kind: make_problem(make_config({"problem": {"kind": kind}})) for kind in KINDS}


@pytest.fixture(params=KINDS)
def problem(request, problems) -> Problem:
    return problems[request.param]


def small_models() -> list[Problem]:
    """Return linear models that are small enough to form every array."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(40, 3))
    labels = rng.integers(3, size=40)
    labels[:3] = (0, 1, 2)
    return [
        LeastSquares(features, rng.normal(size=40), 0.02),
        Logistic(features, (labels > 0).astype(float), 0.02),
        Softmax(features, labels, 0.02),
    ]


class OnlyRequired(Problem):
    """A problem with only the required methods of another, to test the general forms."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.dim, self.n_samples = problem, problem.dim, problem.n_samples

    def initial_point(self, rng: np.random.Generator) -> Array:
        return self.problem.initial_point(rng)

    def loss(self, x: Array) -> Array:
        return self.problem.loss(x)

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        return self.problem.gradient(x, indices)


def some_points(problem: Problem, *lead: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return problem.initial_point(rng) + 0.3 * rng.normal(size=(*lead, problem.dim))


def test_sizes_and_first_losses(problems):
    shapes = {kind: (p.n_samples, p.dim) for kind, p in problems.items()}
    assert shapes == {
        "quadratic": (2, 1),
        "quartic": (2, 1),
        "double_well": (2, 1),
        "least_squares": (442, 10),
        "logistic": (569, 31),
        "softmax": (1797, 650),
    }
    start = {kind: float(p.loss(p.initial_point(stream(0, "t")))) for kind, p in problems.items()}
    assert start["quadratic"] == 1.0
    assert start["least_squares"] == pytest.approx(0.5)
    assert start["logistic"] == pytest.approx(np.log(2))
    assert start["softmax"] == pytest.approx(np.log(10))


def test_options_reach_the_problem():
    config = {"kind": "quadratic", "curvature": 3.0, "noise": 0.5, "initial": -2.0}
    quadratic = make_problem(make_config({"problem": config}))
    x = np.array([-2.0])
    assert quadratic.initial_point(stream(0, "t")) == x
    assert quadratic.loss(x) == 6.0
    assert quadratic.gradient(x) == -6.0
    assert quadratic.gradient_covariance(x) == 0.25
    heavy = make_problem(make_config({"problem": {"kind": "least_squares", "l2": 5.0}}))
    assert np.linalg.eigvalsh(heavy.hessian(np.zeros(10)))[0] > 5.0


def test_additive_noise_is_the_same_everywhere(problem):
    covariance = problem.gradient_covariance(some_points(problem, 2))
    same = bool(np.allclose(covariance[0], covariance[1], rtol=1e-6))
    assert same == problem.additive_noise == isinstance(problem, ScalarProblem)


def test_gradient_is_the_derivative_of_the_loss(problem):
    x = some_points(problem)
    rng = np.random.default_rng(2)
    for _ in range(3):
        v = rng.normal(size=problem.dim)
        h = 1e-5
        slope = (problem.loss(x + h * v) - problem.loss(x - h * v)) / (2 * h)
        assert slope == pytest.approx(problem.gradient(x) @ v, rel=1e-6, abs=1e-7)


def test_sample_gradients_average_to_batch_and_full_gradient(problem):
    x = some_points(problem, 2)
    g = problem.sample_gradients(x)
    assert g.shape == (2, problem.n_samples, problem.dim)
    np.testing.assert_allclose(g.mean(axis=-2), problem.gradient(x), rtol=1e-9, atol=1e-12)
    indices = np.random.default_rng(3).integers(problem.n_samples, size=16)
    np.testing.assert_allclose(
        g[:, indices].mean(axis=-2), problem.gradient(x, indices), rtol=1e-9, atol=1e-12
    )


def test_one_batch_for_each_point(problem):
    x = some_points(problem, 3, 2)
    indices = np.random.default_rng(4).integers(problem.n_samples, size=(3, 2, 5))
    expected = [[problem.gradient(x[i, j], indices[i, j]) for j in range(2)] for i in range(3)]
    np.testing.assert_allclose(problem.gradient(x, indices), expected, rtol=1e-9, atol=1e-12)
    same_point = [[problem.gradient(x[0, 0], batch) for batch in row] for row in indices]
    np.testing.assert_allclose(
        problem.gradient(x[0, 0], indices), same_point, rtol=1e-9, atol=1e-12
    )


def test_leading_axes_are_paths(problem):
    x = some_points(problem, 2, 17)
    one_by_one = {
        "loss": [[problem.loss(point) for point in row] for row in x],
        "gradient": [[problem.gradient(point) for point in row] for row in x],
    }
    for name, expected in one_by_one.items():
        value = getattr(problem, name)(x)
        assert value.shape == np.shape(expected)
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12)
    assert np.ndim(problem.loss(x[0, 0])) == 0


def test_hessian_vector_product_is_the_derivative_of_the_gradient(problem):
    x = some_points(problem)
    v = np.random.default_rng(5).normal(size=(2, 3, problem.dim))
    h = 1e-5
    expected = (problem.gradient(x + h * v) - problem.gradient(x - h * v)) / (2 * h)
    product = problem.hessian_vector(x, v)
    np.testing.assert_allclose(product, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(product, v @ problem.hessian(x), rtol=1e-9, atol=1e-10)


def test_hessian_vector_product_of_one_point_for_each_vector(problem):
    x = some_points(problem, 3)
    v = np.random.default_rng(6).normal(size=(3, problem.dim))
    expected = [problem.hessian_vector(point, w) for point, w in zip(x, v, strict=True)]
    np.testing.assert_allclose(problem.hessian_vector(x, v), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        problem.hessian_vector(x, v[0]),
        [problem.hessian_vector(point, v[0]) for point in x],
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("model", small_models(), ids=lambda m: type(m).__name__)
def test_moments_of_the_sample_gradients(model):
    x = some_points(model, 3)
    g = model.sample_gradients(x)
    second = np.einsum("pni,pnj->pij", g, g) / model.n_samples
    np.testing.assert_allclose(model.second_moment(x), second, rtol=1e-9, atol=1e-12)
    centred = g - g.mean(axis=1, keepdims=True)
    covariance = np.einsum("pni,pnj->pij", centred, centred) / model.n_samples
    np.testing.assert_allclose(model.gradient_covariance(x), covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", SCALAR_KINDS)
def test_moments_of_scalar_problems(problems, kind):
    problem = problems[kind]
    x = some_points(problem, 4)
    slope = problem.gradient(x)[..., None]
    np.testing.assert_allclose(problem.second_moment(x), slope**2 + 4.0)
    np.testing.assert_allclose(problem.gradient_covariance(x), np.full((4, 1, 1), 4.0))


def test_the_quadratic_of_the_paper(problems):
    x = np.array([[0.7], [-1.3]])
    g = problems["quadratic"].sample_gradients(x)[..., 0]
    np.testing.assert_allclose(g, 2.0 * (x + np.array([-1.0, 1.0])))
    np.testing.assert_allclose(problems["quadratic"].second_moment(x)[..., 0], 4.0 * x**2 + 4.0)


def test_double_well_survives_large_arguments(problems):
    loss = problems["double_well"].loss(np.array([[2000.0], [0.0]]))
    np.testing.assert_allclose(loss, [0.5 * 2000.0**2 - 2.0 * (2000.0 - np.log(2.0)), 0.0])
    bottom = np.array([1.9150080481545])
    assert problems["double_well"].gradient(bottom) == pytest.approx(0.0, abs=1e-12)


def test_losses_survive_large_scores(problems):
    for kind in ("logistic", "softmax"):
        problem = problems[kind]
        x = 1e3 * some_points(problem)
        assert np.isfinite(problem.loss(x))
        assert np.all(np.isfinite(problem.gradient(x)))


def noise_error(problem: Problem, draws: int, seed: int) -> Array:
    """Return the errors of the noise's mean and covariance S(x), in standard errors of each."""
    x = some_points(problem)
    mean, xi = problem.gradient_and_noise(
        np.broadcast_to(x, (draws, problem.dim)), np.random.default_rng(seed)
    )
    np.testing.assert_allclose(mean, np.broadcast_to(problem.gradient(x), mean.shape), atol=1e-9)
    z_mean = xi.mean(axis=0) / (xi.std(axis=0) / np.sqrt(draws))
    products = xi[:, :, None] * xi[:, None, :]
    error = products.mean(axis=0) - problem.gradient_covariance(x)
    z_covariance = error / (products.std(axis=0) / np.sqrt(draws))
    return np.concatenate([np.abs(z_mean), np.abs(z_covariance).ravel()])


@pytest.mark.parametrize("kind", ["quadratic", "least_squares", "logistic"])
def test_noise_has_the_covariance_of_one_sample(problems, kind):
    assert noise_error(problems[kind], 6000, 7).max() < 4.5


@pytest.mark.parametrize("model", small_models(), ids=lambda m: type(m).__name__)
def test_noise_of_small_models(model):
    assert noise_error(model, 20_000, 8).max() < 4.5


@pytest.mark.parametrize("n", [20, 60], ids=["one by one", "resampled"])
def test_noise_from_the_required_methods_alone(n):
    rng = np.random.default_rng(9)
    inner = LeastSquares(rng.normal(size=(n, 3)), rng.normal(size=n), 0.1)
    assert noise_error(OnlyRequired(inner), 20_000, 10).max() < 4.5


def test_noise_of_softmax_along_directions(problems):
    problem = problems["softmax"]
    x = some_points(problem)
    directions = np.random.default_rng(11).normal(size=(problem.dim, 4))
    g = problem.sample_gradients(x) @ directions
    _, xi = problem.gradient_and_noise(np.broadcast_to(x, (800, 650)), np.random.default_rng(12))
    square = (xi @ directions) ** 2
    z = (square.mean(axis=0) - g.var(axis=0)) / (square.std(axis=0) / np.sqrt(len(square)))
    assert np.abs(z).max() < 4.0


def test_noise_is_independent_between_points(problem):
    x = np.broadcast_to(some_points(problem), (2, 50, problem.dim))
    _, xi = problem.gradient_and_noise(x, np.random.default_rng(13))
    assert xi.shape == x.shape
    assert len(np.unique(xi[..., -1])) == 100


def test_general_forms_agree_with_the_fast_ones(problem):
    general = OnlyRequired(problem)
    x = some_points(problem)
    v = np.random.default_rng(14).normal(size=(2, problem.dim))
    np.testing.assert_allclose(
        general.hessian_vector(x, v), problem.hessian_vector(x, v), rtol=1e-5, atol=1e-6
    )
    if problem.dim < 100:
        np.testing.assert_allclose(
            general.sample_gradients(x), problem.sample_gradients(x), rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(
            general.gradient_covariance(x), problem.gradient_covariance(x), rtol=1e-9, atol=1e-9
        )
        np.testing.assert_allclose(general.hessian(x), problem.hessian(x), rtol=1e-5, atol=1e-6)


def test_single_precision_stays_single_and_close(problem):
    x = some_points(problem, 3)
    single = x.astype(np.float32)
    indices = np.array([0, 1, 1])
    calls = {
        "loss": lambda p, x: p.loss(x),
        "gradient": lambda p, x: p.gradient(x),
        "batch": lambda p, x: p.gradient(x, indices),
        "own batches": lambda p, x: p.gradient(x, np.tile(indices, (3, 1))),
        "hessian": lambda p, x: p.hessian_vector(x[0], x),
        "gradient and noise": lambda p, x: p.gradient_and_noise(x, np.random.default_rng(0))[0],
        "noise": lambda p, x: p.gradient_and_noise(x, np.random.default_rng(0))[1],
    }
    for name, call in calls.items():
        value = call(problem, single)
        assert value.dtype == np.float32, name
        if name != "noise":  # other numbers are drawn in single precision
            np.testing.assert_allclose(value, call(problem, x), rtol=2e-5, atol=2e-5)


def test_single_precision_noise_has_the_right_size(problems):
    problem = problems["least_squares"]
    x = some_points(problem)
    many = np.broadcast_to(x, (20_000, problem.dim)).astype(np.float32)
    _, xi = problem.gradient_and_noise(many, np.random.default_rng(15))
    variance = np.diag(problem.gradient_covariance(x))
    z = (np.mean(xi**2, axis=0) / variance - 1.0) / np.sqrt(2.0 / len(xi))
    assert np.abs(z).max() < 4.0


def test_least_squares_with_a_known_answer():
    problem = small_least_squares()
    best = np.array([1.0, 2.0])
    np.testing.assert_allclose(problem.gradient(best), 0.0, atol=1e-15)
    assert problem.loss(best) == pytest.approx(0.02)
    np.testing.assert_allclose(problem.hessian(best), np.diag([1.0, 4.0]), atol=1e-15)
    ridge = small_least_squares(l2=1.0)
    np.testing.assert_allclose(ridge.gradient(np.array([0.5, 1.6])), 0.0, atol=1e-15)


def test_the_best_intercept_of_the_diabetes_data_is_zero(problems):
    problem = problems["least_squares"]
    residual_mean = np.linalg.solve(problem.hessian(np.zeros(10)), -problem.gradient(np.zeros(10)))
    features, targets = problem._data[0]
    assert (features @ residual_mean - targets[0]).mean() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "load"),
    [
        ("least_squares", datasets.load_diabetes),
        ("logistic", datasets.load_breast_cancer),
        ("softmax", datasets.load_digits),
    ],
)
def test_data_are_those_of_scikit_learn(problems, kind, load):
    features, targets = problems[kind]._data[0]
    raw, target = load(return_X_y=True)
    spread = raw.std(axis=0)
    expected = raw / 16 if kind == "softmax" else (raw - raw.mean(axis=0)) / spread
    np.testing.assert_allclose(features[:, : raw.shape[1]], expected, rtol=1e-12, atol=1e-12)
    if kind == "least_squares":
        target = (target - target.mean()) / target.std()
    shown = targets.argmax(axis=0) if kind == "softmax" else targets[0]
    np.testing.assert_allclose(shown, target, rtol=1e-12)


def test_a_scikit_learn_without_its_tables_is_refused(tmp_path, monkeypatch):
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sklearn")
    with pytest.raises(
        InputError, match=r"digits\.csv\.gz: not found; it .* scikit-learn, from 1\.5"
    ):
        DATASETS["digits"]()


def test_data_sets_load_without_scikit_learn():
    code = "import sys; from asgd.problems.linear import *; {}; assert 'sklearn' not in sys.modules"
    loads = "; ".join(f"{name}()" for name in DATASETS)
    subprocess.run([sys.executable, "-c", code.format(loads)], check=True)


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"features.shape = \(4, 2\): expected \(n, m\)"):
        LeastSquares(np.zeros((4, 2)), np.zeros(3))
