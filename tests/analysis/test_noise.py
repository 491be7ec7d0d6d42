import numpy as np
import pytest

from analysis.models.descent import Descent
from analysis.models.history import History, HistoryMatrixNoise, HistorySnapshotNoise
from analysis.models.noise import (
    DRAWN_UPDATES,
    ExplicitNoise,
    MatrixNoise,
    ScalarNoise,
    SnapshotNoise,
    psd_factor,
    staleness_noise,
    standard_increments,
)
from analysis.models.sme_asgd import SmeAsgd, sme_asgd
from asgd.errors import InputError
from asgd.problems.linear import LeastSquares
from asgd.problems.scalar import DoubleWell, Quadratic, Quartic
from asgd.staleness.counts import Poisson
from asgd.staleness.geometric import Geometric
from asgd.streams import stream

PATHS = 8_000
LAWS = {"geometric": Geometric(0.7), "poisson": Poisson(3.0)}


def least_squares(dim):
    rng = stream(5, f"features/{dim}")
    features = rng.standard_normal((12, dim))
    return LeastSquares(features, rng.standard_normal(12), 0.1)


def known_path(dim, points=10):
    """Return the points that every path of a test visits, newest last."""
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
    # the second term: the weights leave out 1e-6 of the law; two-point variances do not scatter
    error = samples.std(axis=0) / np.sqrt(len(samples)) + 1e-6 * np.abs(samples).max()
    return (samples.mean(axis=0) - expected) / error


def draw(noise, g, batch):
    """Return Sigma^{1/2} z, by which the noise moves zeros at learning rate zero."""
    if hasattr(noise, "draw"):
        return noise.draw(g, batch).copy()
    z = np.zeros_like(g)
    noise.kick(z, g, batch, 0.0, 1.0)
    return z


def build(name, law, problem, x, lag_noise):
    """Return the named carrier of Sigma in its initial state."""
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
            noise.absorb(x, g)
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
    first, second = draw(noise, g, batch), draw(noise, g, batch)
    assert np.abs(standard_scores(first, np.zeros(dim))).max() < 4
    products = first[:, :, None] * first[:, None, :]
    assert np.abs(standard_scores(products, sigma)[np.triu_indices(dim)]).max() < 4
    # draws of two updates are independent, whatever state the carrier keeps
    crossed = first[:, :, None] * second[:, None, :]
    assert np.abs(standard_scores(crossed, np.zeros((dim, dim)))).max() < 4


@pytest.mark.parametrize("lag_noise", [True, False])
@pytest.mark.parametrize("retention", [0.7, 0.95])
@pytest.mark.parametrize("problem", [least_squares(3), least_squares(1), DoubleWell()])
def test_explicit_sigma_is_the_closed_one(problem, retention, lag_noise):
    """(S3), (S4) and the form of (S4) for d = 1 have equal Sigma and equal expected reads."""
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
            draw(carrier, g[name], 1.0)
            carrier.absorb(point[None], g[name])
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
@pytest.mark.parametrize("size", [1001, 64])
def test_two_point_increments(dtype, size):
    """They are fair, and independent within a draw and between draws."""
    draws, rng = 300, stream(2, "signs")
    z = np.stack(
        [standard_increments(np.empty((size, 1), dtype), rng, True)[:, 0] for _ in range(draws)]
    )
    assert z.dtype == dtype
    assert set(np.unique(z)) == {-1.0, 1.0}
    z = z.astype(float)
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    assert abs(z[:, -1].mean()) < 4 / np.sqrt(draws)  # the last bits of the last word
    for lag in (1, 2, 8, 31, 32, 63):
        assert abs((z[lag:] * z[:-lag]).mean()) < 4 / np.sqrt((draws - lag) * size)
        assert abs((z[:, lag:] * z[:, :-lag]).mean()) < 4 / np.sqrt(draws * (size - lag))


def transcribed(problem, x, z, eta, batch, mu, substeps, lag_noise):
    """Return the path of (S5) with Sigma by (S4), transcribed to NumPy for d = 1."""
    r = 1 - (1 - mu) / substeps
    g = problem.gradient(x)
    gamma, s = np.zeros_like(x), problem.gradient_covariance(x)[..., 0]
    for k in range(len(z)):
        sigma = gamma + s / batch
        x = x - eta / substeps * g + eta / np.sqrt(substeps) * np.sqrt(sigma) * z[k]
        gradient = problem.gradient(x)
        if lag_noise:
            gamma = r * gamma + r * (1 - r) * (gradient - g) ** 2
        g = r * g + (1 - r) * gradient
        s = r * s + (1 - r) * problem.gradient_covariance(x)[..., 0]
    return x


@pytest.mark.parametrize("lag_noise", [True, False])
@pytest.mark.parametrize("substeps", [1, 3])
@pytest.mark.parametrize("noise", ["matrix", "two_point"])
@pytest.mark.parametrize("problem", [DoubleWell(), least_squares(1)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_compiled_step_is_the_equation(problem, noise, substeps, lag_noise, dtype):
    paths, updates, mu, eta, batch = 131, 20, 0.8, 0.2, 3.0
    start = np.linspace(-2, 2, paths)[:, None]
    block = SmeAsgd(
        Descent(problem, np.full(updates, eta), np.full(updates, batch)),
        mu,
        start.astype(dtype),
        stream(9, "z"),
        noise=noise,
        substeps=substeps,
        lag_noise=lag_noise,
    )
    for k in range(updates):
        block.step(k)
    rng = stream(9, "z")
    draws = -(-updates * substeps // DRAWN_UPDATES)
    z = [
        standard_increments(np.empty((DRAWN_UPDATES, paths), dtype), rng, noise == "two_point")
        for _ in range(draws)
    ]
    z = np.concatenate(z).astype(float)[: updates * substeps, :, None]
    expected = transcribed(problem, start, z, eta, batch, mu, substeps, lag_noise)
    other = transcribed(problem, start, z, eta, batch, mu, substeps, not lag_noise)
    assert block.x.dtype == dtype
    # every update rounds a few times, and nothing here grows
    tolerance = 10 * updates * substeps * np.finfo(dtype).eps * np.abs(expected).max()
    np.testing.assert_allclose(block.x, expected, rtol=0, atol=tolerance)
    assert np.abs(other - expected).max() > 100 * tolerance


class OtherTypes(DoubleWell):
    """A double well with read-only gradients in float64 and losses that are not contiguous."""

    def gradient(self, x, indices=None):
        gradient = super().gradient(x.astype(float), indices)
        gradient.flags.writeable = False
        return gradient

    def loss(self, x):
        return np.stack([super().loss(x.astype(float))] * 2, axis=-1)[..., 0]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_problem_may_return_any_kind_of_array(dtype):
    ours, plain = (
        sme_asgd(problem, 0.1, 0.7, 30, 50, 3, dtype=dtype)
        for problem in (OtherTypes(), DoubleWell())
    )
    tolerance = 1000 * np.finfo(dtype).eps
    np.testing.assert_allclose(ours.final, plain.final, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(ours.loss_mean, plain.loss_mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(ours.loss_std, plain.loss_std, rtol=tolerance, atol=tolerance)


def test_a_variance_below_zero_by_rounding_is_zero():
    """With equal samples S is zero, but V - grad f grad f^T is +-1e-17 by rounding."""
    problem = LeastSquares(np.full((3, 1), 0.1), np.full(3, 0.7), 0.0)
    points = np.linspace(-1, 1, 101)[:, None]
    assert problem.gradient_covariance(points).min() < 0
    final = sme_asgd(problem, 0.5, 0.5, 20, 100, 0, noise="matrix").final
    assert np.all(np.isfinite(final))


def test_a_diverging_path_stays_inf_or_nan():
    x, g = np.array([[1e200], [np.inf], [1.0]]), np.ones((3, 1))
    noise = ScalarNoise(Quartic(), x, stream(0, "diverging"), 0.5, True, False)
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(3):
            noise.kick(x, g, 1.0, 0.1, 0.1)
            noise.absorb(x, g)
    assert not np.isfinite(x[:2]).any()
    assert np.isfinite(x[2])


def test_each_kind_has_its_class():
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
    with pytest.raises(InputError, match="noise = 'gauss': expected auto, matrix"):
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
