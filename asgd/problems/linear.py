"""Linear models with a canonical link: least squares, logistic and softmax regression.

Every sample has features a_i of shape (m,) and a target of C outputs. With the parameters as a
matrix X of shape (C, m), row after row in x of shape (d,), d = C m,

    f_i(x) = loss_i(X a_i) + (l2/2) |x|^2,    grad f_i(x) = (response(X a_i) - target_i) a_i^T + l2 x

so a full gradient is two matrix products and gradient noise is a third. The l2 term belongs to
every sample and to every parameter, the intercept included: all curvatures are at least l2.

Computations follow the type of x: float32 parameters are served from float32 data.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator

import numpy as np

from asgd.errors import InputError
from asgd.problems.base import Array, Indices, Problem

_BLOCK_BYTES = 1 << 20  # outputs of one block of paths: what stays in the second-level cache


class LinearModel(Problem):
    """What the linear models share.

    Parameters
    ----------
    features
        Shape (n, m).
    targets
        Shape (n, C): what the response of each sample should be.
    l2
        Weight of the penalty (l2/2) |x|^2.
    """

    def __init__(self, features: Array, targets: Array, l2: float = 1e-3) -> None:
        features = np.ascontiguousarray(features, dtype=float)
        targets = np.asarray(targets, dtype=float)
        if features.ndim != 2 or targets.ndim != 2 or len(features) != len(targets):
            raise InputError(
                f"features {features.shape} and targets {targets.shape}: expected (n, m) and (n, C)"
            )
        self.l2 = float(l2)
        self.n_samples, self.n_features = features.shape
        self.n_outputs = targets.shape[1]
        self.dim = self.n_outputs * self.n_features
        double = features, np.ascontiguousarray(targets.T)
        self._data = {"d": double, "f": tuple(array.astype(np.float32) for array in double)}

    @abstractmethod
    def respond(self, scores: Array) -> None:
        """Replace scores X a_i, shape (..., C, b), by the responses the model predicts."""

    @abstractmethod
    def response_change(self, response: Array, change: Array) -> Array:
        """Return the first-order change of the response, (..., C, b), for a change of scores."""

    @abstractmethod
    def sample_losses(self, scores: Array, targets: Array) -> Array:
        """Return the loss of each sample without the penalty, (..., b) for (..., C, b)."""

    def initial_point(self, rng: np.random.Generator) -> Array:
        """Return zeros, shape (d,): the losses are convex; nothing is drawn."""
        return np.zeros(self.dim)

    def loss(self, x: Array) -> Array:
        points, features, targets = self._prepare(x)
        value = np.empty(len(points), dtype=points.dtype)
        for block in self._blocks(len(points)):
            scores = self._scores(points[block], features)
            value[block] = self.sample_losses(scores, targets).mean(axis=-1)
        value += 0.5 * self.l2 * np.einsum("pcm,pcm->p", points, points)
        return value.reshape(x.shape[:-1])[()]

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        if indices is not None and indices.ndim > 1:
            return self._gradient_of_own_batches(x, indices)
        points, features, targets = self._prepare(x)
        if indices is not None:
            features, targets = features[indices], targets[:, indices]
        total = np.empty_like(points)
        for block in self._blocks(len(points)):
            residual = self._residual(points[block], features, targets)
            total[block] = residual @ features
        total /= len(features)
        total += self.l2 * points
        return total.reshape(x.shape)

    def _gradient_of_own_batches(self, x: Array, indices: Indices) -> Array:
        lead = np.broadcast_shapes(x.shape[:-1], indices.shape[:-1])
        x = np.broadcast_to(x, (*lead, self.dim))
        points, features, targets = self._prepare(x)
        chosen = np.broadcast_to(indices, (*lead, indices.shape[-1])).reshape(len(points), -1)
        total = np.empty_like(points)
        for block in self._blocks(len(points)):
            batch = features[chosen[block]]
            residual = points[block] @ batch.swapaxes(-1, -2)
            self.respond(residual)
            residual -= targets[:, chosen[block]].swapaxes(0, 1)
            total[block] = residual @ batch
        total /= indices.shape[-1]
        total += self.l2 * points
        return total.reshape(x.shape)

    def sample_gradients(self, x: Array) -> Array:
        points, features, targets = self._prepare(x)
        residual = self._residual(points, features, targets)
        g = residual.swapaxes(-1, -2)[..., None] * features[:, None, :]
        g += self.l2 * points[:, None]
        return g.reshape(*x.shape[:-1], self.n_samples, self.dim)

    def second_moment(self, x: Array) -> Array:
        g = self.gradient(x)
        return self.gradient_covariance(x) + g[..., :, None] * g[..., None, :]

    def gradient_covariance(self, x: Array) -> Array:
        points, features, targets = self._prepare(x)
        covariance = np.empty((len(points), self.dim, self.dim), dtype=points.dtype)
        for number, point in enumerate(points):
            residual = self._residual(point[None], features, targets)[0]
            g = (residual.T[:, :, None] * features[:, None, :]).reshape(self.n_samples, self.dim)
            g -= g.mean(axis=0)
            covariance[number] = g.T @ g
        covariance /= self.n_samples
        return covariance.reshape(*x.shape, self.dim)

    def gradient_and_noise(self, x: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        points, features, targets = self._prepare(x)
        total, noise = np.empty_like(points), np.empty_like(points)
        for block in self._blocks(len(points)):
            residual = self._residual(points[block], features, targets)
            total[block] = residual @ features
            z = rng.standard_normal((len(residual), self.n_samples), dtype=points.dtype.type)
            # sum_i z_i (g_i - g) = sum_i (z_i - mean z) g_i, and the penalty drops out
            z -= z.mean(axis=-1, keepdims=True)
            residual *= z[:, None, :]
            noise[block] = residual @ features
        total /= self.n_samples
        total += self.l2 * points
        noise /= np.sqrt(self.n_samples)
        return total.reshape(x.shape), noise.reshape(x.shape)

    def hessian_vector(self, x: Array, v: Array) -> Array:
        shape = np.broadcast_shapes(x.shape, v.shape)
        points, features, _ = self._prepare(x)
        vectors, _, _ = self._prepare(np.broadcast_to(v, shape))
        response = self._scores(points, features)
        self.respond(response)
        response = np.broadcast_to(
            response.reshape(*x.shape[:-1], *response.shape[1:]),
            (*shape[:-1], *response.shape[1:]),
        ).reshape(len(vectors), *response.shape[1:])
        product = np.empty_like(vectors)
        for block in self._blocks(len(vectors)):
            change = self._scores(vectors[block], features)
            product[block] = self.response_change(response[block], change) @ features
        product /= self.n_samples
        product += self.l2 * vectors
        return product.reshape(shape)

    def hessian(self, x: Array) -> Array:
        points, features, _ = self._prepare(x)
        response = self._scores(points, features)[0]
        self.respond(response)
        hessian = np.empty((self.n_outputs, self.n_features, self.n_outputs, self.n_features))
        for output in range(self.n_outputs):
            change = np.zeros_like(response)
            change[output] = 1.0
            for other, weight in enumerate(self.response_change(response, change)):
                hessian[other, :, output] = (features.T * weight) @ features
        hessian = hessian.reshape(self.dim, self.dim) / self.n_samples
        hessian[np.diag_indices(self.dim)] += self.l2
        return hessian

    def _prepare(self, x: Array) -> tuple[Array, Array, Array]:
        """Return points of shape (points, C, m) with features and targets of their type."""
        features, targets = self._data["f" if x.dtype == np.float32 else "d"]
        return x.reshape(-1, self.n_outputs, self.n_features), features, targets

    def _blocks(self, points: int) -> Iterator[slice]:
        """Cut many points into blocks whose scores stay in cache."""
        size = max(1, _BLOCK_BYTES // (8 * self.n_outputs * self.n_samples))
        return (slice(start, start + size) for start in range(0, points, size))

    def _scores(self, points: Array, features: Array) -> Array:
        rows = points.reshape(-1, self.n_features)
        return (rows @ features.T).reshape(len(points), self.n_outputs, len(features))

    def _residual(self, points: Array, features: Array, targets: Array) -> Array:
        residual = self._scores(points, features)
        self.respond(residual)
        residual -= targets
        return residual


class LeastSquares(LinearModel):
    """f_i = (1/2) (a_i . x - y_i)^2 + (l2/2) |x|^2.

    Parameters
    ----------
    features, target
        Shapes (n, m) and (n,).
    """

    def __init__(self, features: Array, target: Array, l2: float = 1e-3) -> None:
        super().__init__(features, np.asarray(target)[:, None], l2)

    def respond(self, scores: Array) -> None:
        pass  # the response is the score

    def response_change(self, response: Array, change: Array) -> Array:
        return change

    def sample_losses(self, scores: Array, targets: Array) -> Array:
        return 0.5 * (scores - targets)[..., 0, :] ** 2


class Logistic(LinearModel):
    """f_i = log(1 + exp(s)) - y_i s + (l2/2) |x|^2 with s = a_i . x and y_i in {0, 1}."""

    def __init__(self, features: Array, target: Array, l2: float = 1e-3) -> None:
        super().__init__(features, np.asarray(target)[:, None], l2)

    def respond(self, scores: Array) -> None:
        scores *= 0.5  # (1 + tanh(s/2)) / 2 does not overflow
        np.tanh(scores, out=scores)
        scores += 1.0
        scores *= 0.5

    def response_change(self, response: Array, change: Array) -> Array:
        return response * (1.0 - response) * change

    def sample_losses(self, scores: Array, targets: Array) -> Array:
        return (np.logaddexp(0.0, scores) - targets * scores)[..., 0, :]


class Softmax(LinearModel):
    """f_i = log sum_c exp(s_c) - s_y + (l2/2) |x|^2 with scores s = X a_i and label y.

    Parameters
    ----------
    features, labels
        Shapes (n, m) and (n,); the labels are 0, 1, ..., C - 1.
    """

    def __init__(self, features: Array, labels: Indices, l2: float = 1e-3) -> None:
        super().__init__(features, np.eye(int(labels.max()) + 1)[labels], l2)

    def respond(self, scores: Array) -> None:
        scores -= scores.max(axis=-2, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-2, keepdims=True)

    def response_change(self, response: Array, change: Array) -> Array:
        product = response * change
        return product - response * product.sum(axis=-2, keepdims=True)

    def sample_losses(self, scores: Array, targets: Array) -> Array:
        own = np.einsum("...cb,cb->...b", scores, targets)
        peak = scores.max(axis=-2)
        return np.log(np.exp(scores - peak[..., None, :]).sum(axis=-2)) + peak - own


def diabetes(l2: float = 1e-3) -> LeastSquares:
    """Least squares on the diabetes data: n = 442, d = 10.

    Features and target are centred and scaled to unit variance, so the best intercept is zero and
    none is fitted; the loss at x = 0 is 1/2.
    """
    features, target = _load("diabetes")
    return LeastSquares(_standardise(features), _standardise(target), l2)


def breast_cancer(l2: float = 1e-3) -> Logistic:
    """Logistic regression on the breast cancer data: n = 569, d = 30 features and an intercept."""
    features, target = _load("breast_cancer")
    return Logistic(_with_intercept(_standardise(features)), target, l2)


def digits(l2: float = 1e-3) -> Softmax:
    """Softmax regression on the digits data: n = 1797, d = 10 x (64 pixels and an intercept).

    Pixels are scaled from 0..16 to 0..1, not standardised: they share one unit, and some are
    always blank.
    """
    features, labels = _load("digits")
    return Softmax(_with_intercept(features / 16.0), labels, l2)


DATASETS: dict[str, Callable[[float], LinearModel]] = {
    "diabetes": diabetes,
    "breast_cancer": breast_cancer,
    "digits": digits,
}


def _load(name: str) -> tuple[Array, Array]:
    from sklearn import datasets

    features, target = getattr(datasets, f"load_{name}")(return_X_y=True)
    return features, target


def _standardise(values: Array) -> Array:
    return (values - values.mean(axis=0)) / values.std(axis=0)


def _with_intercept(features: Array) -> Array:
    return np.column_stack([features, np.ones(len(features))])
