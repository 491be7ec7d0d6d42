"""Linear models with a canonical link: least squares, logistic and softmax regression.

Every sample has features a_i of shape (m,) and a target of C outputs. With the parameters as a
matrix X of shape (C, m), row after row in x of shape (d,), d = C m,

    f_i(x) = loss_i(X a_i) + (l2/2) |x|^2
    grad f_i(x) = (response(X a_i) - target_i) a_i^T + l2 x

so a full gradient takes two matrix products and gradient noise a third. The l2 term is part of
every f_i and covers every parameter, including the intercept: all curvatures are at least l2.

Computations use the dtype of x; a float32 copy of the data serves float32 parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array
from asgd.errors import InputError
from asgd.problems.base import Indices, Problem
from asgd.streams import standard_normals

_BLOCK_OUTPUTS = 1 << 17  # scores per block of points; a block fits in the L2 cache


class LinearModel(Problem):
    """Base class of the linear models.

    Parameters
    ----------
    features
        Shape (n, m).
    targets
        Target response of each sample, shape (n, C).
    l2
        Weight of the penalty (l2/2) |x|^2.
    """

    def __init__(self, features: Array, targets: Array, l2: float = 1e-3) -> None:
        features = np.ascontiguousarray(features, dtype=float)
        targets = np.asarray(targets, dtype=float)
        if features.ndim != 2 or targets.ndim != 2 or len(features) != len(targets):
            raise InputError(
                f"features.shape = {features.shape}: expected (n, m) with targets of (n, C), "
                f"not {targets.shape}"
            )
        self.l2 = float(l2)
        self.n_samples, self.n_features = features.shape
        self.n_outputs = targets.shape[1]
        self.dim = self.n_outputs * self.n_features
        double = features, np.ascontiguousarray(targets.T)
        single = double[0].astype(np.float32), double[1].astype(np.float32)
        self._data: list[tuple[Array, Array]] = [double, cast(Any, single)]

    @abstractmethod
    def respond(self, scores: Array) -> None:
        """Replace the scores X a_i, shape (..., C, b), by the predicted responses, in place."""

    @abstractmethod
    def response_change(self, response: Array, change: Array) -> Array:
        """Return the derivative of the response along a change of the scores, (..., C, b)."""

    @abstractmethod
    def sample_losses(self, scores: Array, targets: Array) -> Array:
        """Return the loss of each sample without the penalty, shape (..., b).

        `scores` has shape (..., C, b).
        """

    def initial_point(self, rng: np.random.Generator) -> Array:
        """Return zeros, shape (d,); the losses are convex, so nothing is drawn."""
        return np.zeros(self.dim)

    def loss(self, x: Array) -> Array:
        """Return f(x), shape (...)."""
        points, features, targets = self._prepare(x)
        value = np.empty(len(points), dtype=points.dtype)
        for block, scores in self._scores(points, features):
            value[block] = self.sample_losses(scores, targets).mean(axis=-1)
        value += 0.5 * self.l2 * np.einsum("pcm,pcm->p", points, points)
        return value.reshape(x.shape[:-1])[()]

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        """Return the mean gradient over a mini-batch, or grad f(x), shape (..., d)."""
        if indices is not None and indices.ndim > 1:
            return self._gradient_of_own_batches(x, indices)
        points, features, targets = self._prepare(x)
        if indices is not None:
            features, targets = features.take(indices, axis=0), targets.take(indices, axis=1)
            if x.ndim == 1:
                return self._gradient_at(points[0], features, targets)
        total = np.empty_like(points)
        for block, residual in self._residuals(points, features, targets):
            _sum_outer(residual, features, total[block])
        total /= len(features)
        total += self.l2 * points
        return total.reshape(x.shape)

    def _gradient_at(self, point: Array, features: Array, targets: Array) -> Array:
        """Return the gradient at one point, as a worker computes it.

        The block code would take 1.5 times as long for a single point.
        """
        residual = point @ features.T
        self.respond(residual)
        residual -= targets
        total = residual @ features
        total /= len(features)
        total += self.l2 * point
        return total.reshape(-1)

    def _gradient_of_own_batches(self, x: Array, indices: Indices) -> Array:
        lead = np.broadcast_shapes(x.shape[:-1], indices.shape[:-1])
        x = np.broadcast_to(x, (*lead, self.dim))
        points, features, targets = self._prepare(x)
        chosen = np.broadcast_to(indices, (*lead, indices.shape[-1])).reshape(len(points), -1)
        total = np.empty_like(points)
        for block in _blocks(len(points), self.n_outputs * chosen.shape[-1]):
            batch = features[chosen[block]]
            residual = points[block] @ batch.swapaxes(-1, -2)
            self.respond(residual)
            residual -= targets[:, chosen[block]].swapaxes(0, 1)
            total[block] = residual @ batch
        total /= indices.shape[-1]
        total += self.l2 * points
        return total.reshape(x.shape)

    def sample_gradients(self, x: Array) -> Array:
        """Return grad f_i(x) for every sample, shape (..., n, d)."""
        points, features, targets = self._prepare(x)
        g = np.empty((len(points), self.n_samples, *points.shape[1:]), dtype=points.dtype)
        for block, residual in self._residuals(points, features, targets):
            np.multiply(residual.swapaxes(-1, -2)[..., None], features[:, None, :], out=g[block])
        g += self.l2 * points[:, None]
        return g.reshape(*x.shape[:-1], self.n_samples, self.dim)

    def second_moment(self, x: Array) -> Array:
        """Return V(x), shape (..., d, d)."""
        g = self.gradient(x)
        return self.gradient_covariance(x) + g[..., :, None] * g[..., None, :]

    def gradient_covariance(self, x: Array) -> Array:
        """Return S(x), shape (..., d, d), computed from centred gradients."""
        points, features, targets = self._prepare(x)
        covariance = np.empty((len(points), self.dim, self.dim), dtype=points.dtype)
        for block, residuals in self._residuals(points, features, targets):
            for residual, out in zip(residuals, covariance[block], strict=True):
                g = (residual.T[:, :, None] * features[:, None, :]).reshape(-1, self.dim)
                g -= g.mean(axis=0)
                np.matmul(g.T, g, out=out)
        covariance /= self.n_samples
        return covariance.reshape(*x.shape, self.dim)

    def gradient_and_noise(self, x: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        """Return grad f(x) and a draw xi ~ N(0, S(x)), with three matrix products per block."""
        points, features, targets = self._prepare(x)
        total, noise = np.empty_like(points), np.empty_like(points)
        for block, residual in self._residuals(points, features, targets):
            _sum_outer(residual, features, total[block])
            z = standard_normals(np.empty((len(residual), self.n_samples), points.dtype), rng)
            # sum_i z_i (g_i - g) = sum_i (z_i - mean z) g_i; the penalty cancels.
            z -= z.mean(axis=-1, keepdims=True)
            residual *= z[:, None, :]
            _sum_outer(residual, features, noise[block])
        total /= self.n_samples
        total += self.l2 * points
        noise /= np.sqrt(self.n_samples)
        return total.reshape(x.shape), noise.reshape(x.shape)

    def hessian_vector(self, x: Array, v: Array) -> Array:
        """Return the product of the Hessian of f at x with v, shape (..., d)."""
        shape = np.broadcast_shapes(x.shape, v.shape)
        vectors, features, _ = self._prepare(np.broadcast_to(v, shape))
        points, _, _ = self._prepare(x if x.ndim == 1 else np.broadcast_to(x, shape))
        responses = self._responses(points, features)
        if x.ndim == 1:
            responses = repeat(next(responses))
        product = np.empty_like(vectors)
        blocks = zip(self._scores(vectors, features), responses, strict=False)
        for (block, change), (_, response) in blocks:
            _sum_outer(self.response_change(response, change), features, product[block])
        product /= self.n_samples
        product += self.l2 * vectors
        return product.reshape(shape)

    def hessian(self, x: Array) -> Array:
        """Return the Hessian of f at x of shape (d,), shape (d, d)."""
        points, features, _ = self._prepare(x)
        _, response = next(self._responses(points, features))
        blocks = np.empty((self.n_outputs, self.n_features, self.n_outputs, self.n_features))
        for output in range(self.n_outputs):
            change = np.zeros_like(response[0])
            change[output] = 1.0
            for other, weight in enumerate(self.response_change(response[0], change)):
                blocks[other, :, output] = (features.T * weight) @ features
        hessian = blocks.reshape(self.dim, self.dim) / self.n_samples
        hessian[np.diag_indices(self.dim)] += self.l2
        return hessian

    def _prepare(self, x: Array) -> tuple[Array, Array, Array]:
        """Return contiguous points (points, C, m), and features and targets of their dtype."""
        features, targets = self._data[x.dtype == np.float32]
        points = x.reshape(-1, self.n_outputs, self.n_features)
        return np.ascontiguousarray(points), features, targets

    def _scores(self, points: Array, features: Array) -> Iterator[tuple[slice, Array]]:
        """Yield the scores of each block of points, in a buffer that is reused."""
        buffer = None
        for block in _blocks(len(points), self.n_outputs * len(features)):
            rows = points[block]
            if buffer is None:
                buffer = np.empty((*rows.shape[:2], len(features)), dtype=points.dtype)
            scores = buffer[: len(rows)]
            product = scores.reshape(-1, len(features))
            np.matmul(rows.reshape(-1, self.n_features), features.T, out=product)
            yield block, scores

    def _responses(self, points: Array, features: Array) -> Iterator[tuple[slice, Array]]:
        for block, scores in self._scores(points, features):
            self.respond(scores)
            yield block, scores

    def _residuals(
        self, points: Array, features: Array, targets: Array
    ) -> Iterator[tuple[slice, Array]]:
        for block, residual in self._responses(points, features):
            residual -= targets
            yield block, residual


def _blocks(points: int, outputs: int) -> Iterator[slice]:
    """Cut points into blocks that fit in cache; each point has `outputs` scores."""
    size = max(1, _BLOCK_OUTPUTS // outputs)
    return (slice(start, start + size) for start in range(0, points, size))


def _sum_outer(residual: Array, features: Array, out: Array) -> None:
    """Write sum_i residual_i a_i^T: (points, C, b) and (b, m) to (points, C, m)."""
    rows = residual.reshape(-1, residual.shape[-1])
    np.matmul(rows, features, out=out.reshape(-1, out.shape[-1]))


class SingleOutputModel(LinearModel):
    """A linear model with one output.

    Parameters
    ----------
    features, target
        Shapes (n, m) and (n,).
    l2
        Weight of the penalty (l2/2) |x|^2.
    """

    def __init__(self, features: Array, target: Array, l2: float = 1e-3) -> None:
        super().__init__(features, np.asarray(target)[:, None], l2)

    def gradient_covariance(self, x: Array) -> Array:
        """Return S(x), shape (..., d, d), with one matrix product for many points."""
        points, features, targets = self._prepare(x)
        upper = np.triu_indices(self.dim)
        products = features[:, upper[0]] * features[:, upper[1]]
        moments = np.empty((len(points), len(upper[0])), dtype=points.dtype)
        mean = np.empty((len(points), self.dim), dtype=points.dtype)
        for block, residuals in self._residuals(points, features, targets):
            residual = residuals[:, 0]
            np.matmul(residual, features, out=mean[block])
            np.matmul(residual**2, products, out=moments[block])
        mean /= self.n_samples
        moments /= self.n_samples
        moments -= mean[:, upper[0]] * mean[:, upper[1]]
        covariance = np.empty((len(points), self.dim, self.dim), dtype=points.dtype)
        covariance[:, upper[0], upper[1]] = moments
        covariance[:, upper[1], upper[0]] = moments
        return covariance.reshape(*x.shape, self.dim)


class LeastSquares(SingleOutputModel):
    """f_i = (1/2) (a_i . x - y_i)^2 + (l2/2) |x|^2."""

    def respond(self, scores: Array) -> None:
        """Do nothing: the scores are the response."""

    def response_change(self, response: Array, change: Array) -> Array:
        """Return the change of scores."""
        return change

    def sample_losses(self, scores: Array, targets: Array) -> Array:
        """Return half the squared residuals."""
        return 0.5 * (scores - targets)[..., 0, :] ** 2


class Logistic(SingleOutputModel):
    """f_i = log(1 + exp(s)) - y_i s + (l2/2) |x|^2 with s = a_i . x and y_i in {0, 1}."""

    def __init__(self, features: Array, target: Array, l2: float = 1e-3) -> None:
        super().__init__(features, target, l2)
        self.labels = np.asarray(target).astype(int)

    def respond(self, scores: Array) -> None:
        """Replace the scores by probabilities of y = 1."""
        scores *= 0.5  # (1 + tanh(s/2)) / 2 does not overflow
        np.tanh(scores, out=scores)
        scores += 1.0
        scores *= 0.5

    def response_change(self, response: Array, change: Array) -> Array:
        """Return p (1 - p) times the change of scores."""
        return response * (1.0 - response) * change

    def sample_losses(self, scores: Array, targets: Array) -> Array:
        """Return the cross entropy of each sample."""
        return (np.logaddexp(0.0, scores) - targets * scores)[..., 0, :]


class Softmax(LinearModel):
    """f_i = log sum_c exp(s_c) - s_y + (l2/2) |x|^2 with scores s = X a_i and label y.

    Parameters
    ----------
    features, labels
        Shapes (n, m) and (n,); the labels are 0, 1, ..., C - 1.
    """

    def __init__(self, features: Array, labels: npt.ArrayLike, l2: float = 1e-3) -> None:
        labels = np.asarray(labels)
        super().__init__(features, np.eye(int(labels.max()) + 1)[labels], l2)
        self.labels = labels

    def respond(self, scores: Array) -> None:
        """Replace the scores by class probabilities."""
        scores -= scores.max(axis=-2, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-2, keepdims=True)

    def response_change(self, response: Array, change: Array) -> Array:
        """Return (diag(p) - p p^T) times the change of scores."""
        product: Array = response * change
        product -= response * product.sum(axis=-2, keepdims=True)
        return product

    def sample_losses(self, scores: Array, targets: Array) -> Array:
        """Return the cross entropy of each sample."""
        own = np.einsum("...cb,cb->...b", scores, targets)
        peak = scores.max(axis=-2)
        losses: Array = np.log(np.exp(scores - peak[..., None, :]).sum(axis=-2)) + peak - own
        return losses


def diabetes(l2: float = 1e-3) -> LeastSquares:
    """Return least squares on the diabetes data: n = 442, d = 10.

    Features and target are standardised, so no intercept is needed; the loss at x = 0 is 1/2.
    """
    features, target = _read("diabetes_data_raw.csv.gz"), _read("diabetes_target.csv.gz")
    return LeastSquares(_standardise(features), _standardise(target), l2)


def breast_cancer(l2: float = 1e-3) -> Logistic:
    """Return logistic regression on the breast cancer data.

    n = 569; d = 31, which is 30 features and an intercept.
    """
    table = _read("breast_cancer.csv", delimiter=",", skiprows=1)
    features, target = table[:, :-1], table[:, -1].astype(int)
    return Logistic(_with_intercept(_standardise(features)), target, l2)


def digits(l2: float = 1e-3) -> Softmax:
    """Return softmax regression on the digits data: n = 1797, d = 10 x (64 pixels + intercept).

    Pixels are scaled from 0..16 to 0..1 and not standardised, because they share one unit and
    some are always blank.
    """
    table = _read("digits.csv.gz", delimiter=",")
    features, labels = table[:, :-1], table[:, -1].astype(int)
    return Softmax(_with_intercept(features / 16.0), labels, l2)


DATASETS: dict[str, Callable[..., LinearModel]] = {
    "diabetes": diabetes,
    "breast_cancer": breast_cancer,
    "digits": digits,
}


def _read(file: str, **options: Any) -> Array:
    """Read a data file of scikit-learn without importing it: the import takes a second."""
    package = find_spec("sklearn")
    places = (package and package.submodule_search_locations) or ["scikit-learn"]
    path = Path(places[0], "datasets", "data", file)
    try:
        return np.loadtxt(path, **options)
    except OSError:
        raise InputError(
            f"problem.dataset: {path}: not found; it comes with scikit-learn, from 1.5 on, below 2"
        ) from None


def _standardise(values: Array) -> Array:
    scaled: Array = (values - values.mean(axis=0)) / values.std(axis=0)
    return scaled


def _with_intercept(features: Array) -> Array:
    return np.column_stack([features, np.ones(len(features))])
