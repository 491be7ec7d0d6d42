import numpy as np
import pytest

from analysis.history import History, HistoryMatrixNoise, HistorySnapshotNoise
from analysis.noise import (
    ExplicitNoise,
    MatrixNoise,
    ScalarNoise,
    Signs,
    SnapshotNoise,
    psd_factor,
    staleness_noise,
    standard_increments,
)
from asgd.errors import InputError
from asgd.problems.linear import LeastSquares
from asgd.problems.scalar import DoubleWell, Quadratic
from asgd.staleness import Geometric, Poisson
from asgd.streams import stream

PATHS = 8_000
LAWS = {"geometric": Geometric(0.7), "poisson": Poisson(3.0)}


def least_squares(dim):
    rng = stream(5, f"features/{dim}")
    features = rng.standard_normal((12, dim))
    return LeastSquares(features, rng.standard_normal(12), 0.1)


def known_path(dim, points=10):
    """Points that every path of the test visits, newest last."""
    return np.cumsum(stream(6, "path").standard_normal((points, dim)), axis=0) / 3


def exact(problem, law, points, batch, lag_noise):
    """Return Sigma and g by the sum over lags, with constant pre-history."""
    weights = law.weights(law.support_length())
    old = np.maximum(len(points) - 1 - np.arange(len(weights)), 0)
    gradients = problem.gradient(points[old])
    g = weights @ gradients
    sigma = np.einsum("l,lij->ij", weights, problem.gradient_covariance(points[old])) / batch
    if lag_noise:
        sigma += np.einsum("l,li,lj->ij", weights, gradients, gradients) - np.outer(g, g)
    return sigma, g


def standard_scores(samples, expected):
    # the floor: the weights leave out 1e-6 of the law, and two-point variances have no error
    error = samples.std(axis=0) / np.sqrt(len(samples)) + 1e-6 * np.abs(samples).max()
    return (samples.mean(axis=0) - expected) / error


def build(name, law, problem, x, lag_noise):
    """Return one of the carriers of Sigma, at its start."""
    rng = stream(7, name)
    if name == "snapshots":
        return SnapshotNoise(problem, x, rng, law.mu, lag_noise)
    if name in ("matrices", "two_point"):
        carrier = ScalarNoise if problem.dim == 1 else MatrixNoise
        return carrier(problem, x, rng, law.mu, lag_noise, name == "two_point")
    weights = law.weights(law.support_length())
    if name == "history_matrices":
        return HistoryMatrixNoise(problem, x, problem.gradient(x), rng, weights, lag_noise)
    gradients = History(weights, problem.gradient(x))
    return HistorySnapshotNoise(problem, x, rng, weights, gradients, lag_noise)


@pytest.mark.parametrize("lag_noise", [True, False])
@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("matrices", "geometric"),
        ("two_point", "geometric"),
        ("snapshots", "geometric"),
        ("history_matrices", "poisson"),
        ("history_snapshots", "poisson"),
    ],
)
def test_covariance_is_sigma(name, law, dim, lag_noise):
    problem, points, batch, law = least_squares(dim), known_path(dim), 3.0, LAWS[law]
    noise = build(name, law, problem, np.tile(points[0], (PATHS, 1)), lag_noise)
    g = problem.gradient(np.tile(points[0], (PATHS, 1)))
    for point in points[1:]:
        x = np.tile(point, (PATHS, 1))
        if "history" not in name:
            g += noise.absorb(x, g)
            continue
        gradient = noise.absorb(x)
        np.testing.assert_allclose(gradient, problem.gradient(x))
        if name == "history_snapshots":
            noise.gradients.push(gradient)
    sigma, expected = exact(problem, law, points, batch, lag_noise)
    if "history" in name:
        g = np.tile(expected, (PATHS, 1))
    # the weights leave out 1e-6 of the law
    np.testing.assert_allclose(g, np.tile(expected, (PATHS, 1)), atol=1e-5)
    first, second = noise.draw(g, batch).copy(), noise.draw(g, batch)
    assert np.abs(standard_scores(first, np.zeros(dim))).max() < 4
    products = first[:, :, None] * first[:, None, :]
    assert np.abs(standard_scores(products, sigma)[np.triu_indices(dim)]).max() < 4
    # fresh for every update, whatever is kept from one to the next
    crossed = first[:, :, None] * second[:, None, :]
    assert np.abs(standard_scores(crossed, np.zeros((dim, dim)))).max() < 4


@pytest.mark.parametrize("lag_noise", [True, False])
@pytest.mark.parametrize("retention", [0.7, 0.95])
@pytest.mark.parametrize("problem", [least_squares(3), least_squares(1), DoubleWell()])
def test_explicit_sigma_is_the_closed_one(problem, retention, lag_noise):
    """(S4), also in the form for d = 1, and (S3): one Sigma, and one expected read."""
    path, rng = known_path(problem.dim), stream(0, "explicit")
    x = path[:1].copy()
    carriers = {
        "explicit": ExplicitNoise(problem, x, rng, retention, lag_noise),
        "closed": MatrixNoise(problem, x, rng, retention, lag_noise, False),
    }
    if problem.dim == 1:
        carriers["scalar"] = ScalarNoise(problem, x, rng, retention, lag_noise, False)
    g = {name: problem.gradient(x) for name in carriers}
    for point in path[1:]:
        for name, carrier in carriers.items():
            carrier.draw(g[name], 1.0)
            g[name] += carrier.absorb(point[None], g[name])
    closed = carriers.pop("closed")
    expected = closed.s + (closed.h - g["closed"].T @ g["closed"] if lag_noise else 0)
    assert lag_noise == bool(np.abs(expected - closed.s).max() > 0.001)
    for name, carrier in carriers.items():
        sigma = (carrier.gamma + carrier.s).reshape(expected.shape)
        np.testing.assert_allclose(sigma, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(g[name], g["closed"], rtol=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_factor_of_singular_matrices(rank, dtype):
    root = stream(1, "root").standard_normal((50, 3, rank)).astype(dtype)
    root[:10] = 0
    matrices = root @ root.swapaxes(-1, -2)
    factor = psd_factor(matrices)
    assert factor.dtype == dtype
    np.testing.assert_array_equal(factor, np.tril(factor))
    scale = np.abs(matrices).max(initial=1.0)
    tolerance = 100 * np.sqrt(np.finfo(dtype).eps) * scale if rank < 3 else 1e-5 * scale
    np.testing.assert_allclose(factor @ factor.swapaxes(-1, -2), matrices, atol=tolerance)


def test_factor_takes_small_negative_variances_as_zero():
    matrices = np.array([[[-1e-17]], [[4.0]]])
    np.testing.assert_array_equal(psd_factor(matrices)[:, 0, 0], [0.0, 2.0])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_two_point_increments(dtype):
    z = standard_increments(np.empty((1001, 7), dtype), stream(2, "signs"), two_point=True)
    assert set(np.unique(z)) == {-1.0, 1.0}
    flat = z.reshape(-1)
    assert abs(flat.mean()) < 4 / np.sqrt(flat.size)
    for lag in (1, 7, 8, 64):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 4 / np.sqrt(flat.size - lag)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_signs_flipped_in_place(dtype):
    """Fair, and independent between numbers and between steps, also where new bits are drawn."""
    size, steps = 1001, 70
    signs = Signs(np.empty((size, 1), dtype), stream(2, "signs"))
    seen = np.full((steps, size, 1), 3, dtype)
    for values in seen:
        signs.flip(values)
    assert set(np.unique(seen)) == {-3.0, 3.0}
    z = seen[..., 0].astype(float) / 3
    error = 1 / np.sqrt(z.size)
    assert abs(z.mean()) < 4 * error
    assert np.abs(z.mean(axis=1)).max() < 5 / np.sqrt(size)
    for lag in (1, 2, 31, 32, 63, 64):
        assert abs((z[lag:] * z[:-lag]).mean()) < 4 / np.sqrt((steps - lag) * size)
        assert abs((z[:, lag:] * z[:, :-lag]).mean()) < 4 / np.sqrt(steps * (size - lag))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("size", [400_001, 1])
def test_normal_increments(dtype, size):
    """Moments and tail of both generators; float32 has one of its own."""
    z = standard_increments(np.empty((size, 1), dtype), stream(3, "normals"), two_point=False)
    assert z.dtype == dtype
    assert np.all(np.isfinite(z))
    z = z[:, 0].astype(float)
    if size > 1:
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(np.mean(z**power) - moment) < 4 * np.sqrt(variance / size)
        tail = 0.0026998
        assert abs(np.mean(np.abs(z) > 3) - tail) < 4 * np.sqrt(tail / size)
        half = size // 2  # the two numbers of a pair lie half an array apart
        for lag in (1, half, half + 1):
            assert abs(np.mean(z[lag:] * z[:-lag])) < 4 / np.sqrt(size - lag)


def test_kinds():
    x, rng = np.ones((5, 1)), stream(0, "kinds")
    made = {
        kind: type(staleness_noise(kind, Quadratic(), x, rng, 0.5)[0])
        for kind in ("auto", "matrix", "two_point", "samples", "explicit")
    }
    assert made == {
        "auto": ScalarNoise,
        "matrix": ScalarNoise,
        "two_point": ScalarNoise,
        "samples": SnapshotNoise,
        "explicit": ExplicitNoise,
    }
    wide = least_squares(6)
    start = np.ones((5, 6))
    assert isinstance(staleness_noise("auto", wide, start, rng, 0.5)[0], SnapshotNoise)
    assert isinstance(staleness_noise("matrix", wide, start, rng, 0.5)[0], MatrixNoise)
    with pytest.raises(InputError, match="noise: 'gauss'; accepted: auto, matrix"):
        staleness_noise("gauss", Quadratic(), x, rng, 0.5)


def test_history_is_a_weighted_sum_over_lags():
    weights = np.array([0.5, 0.3, 0.2])
    history = History(weights, np.array([[1.0]]))
    assert history.average() == pytest.approx(1.0)
    seen = [1.0, 1.0, 1.0]
    for value in (2.0, 5.0, -3.0, 7.0, 11.0):
        history.push(np.array([[value]]))
        seen.append(value)
        assert history.average() == pytest.approx(weights @ seen[:-4:-1])
        np.testing.assert_array_equal(history.pick(np.array([[0], [2]])).ravel(), seen[-1:-4:-2])
