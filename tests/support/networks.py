"""Networks that tests train: a perceptron with one hidden layer on the digits."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits

HIDDEN = 8
TRAINED = 1500  # of 1 797 images; the others measure the accuracy


def digits() -> tuple[Any, Any]:
    """Return images, shape (1797, 64), in [0, 1], and labels."""
    images, labels = load_digits(return_X_y=True)
    return images / 16, labels


def torch_perceptron(
    dropout: float = 0.0, seeded: bool = True, dtype: str = "float32", kept: str | None = None
) -> Any:
    """Return the perceptron in PyTorch.

    `seeded` draws its start from the run's seed; `kept` is the precision of a run's parameters.
    """
    import torch
    from torch import nn

    import asgd

    images, labels = digits()
    held_out = torch.as_tensor(images[TRAINED:], dtype=getattr(torch, dtype))

    def module() -> Any:
        return nn.Sequential(
            nn.Linear(64, HIDDEN), nn.Tanh(), nn.Dropout(dropout), nn.Linear(HIDDEN, 10)
        ).to(getattr(torch, dtype))

    def metrics(module: Any) -> dict[str, float]:
        with torch.no_grad():
            found = module(held_out.to(module[0].weight.device)).argmax(1).cpu().numpy()
        return {"test_accuracy": float(np.mean(found == labels[TRAINED:]))}

    return asgd.TorchProblem(
        module if seeded else module(),
        nn.functional.cross_entropy,
        (images[:TRAINED], labels[:TRAINED]),
        weight_decay=1e-3,
        metrics=metrics,
        dtype=kept,
    )


def jax_perceptron(drop: float = 0.0, seeded: bool = True, kept: str | None = None) -> Any:
    """Return the perceptron in JAX."""
    import jax
    import jax.numpy as jnp

    import asgd

    images, labels = digits()

    def parameters(key: Any) -> Any:
        first, second = jax.random.split(key)
        return {
            "hidden": {
                "w": jax.random.normal(first, (64, HIDDEN)) / 8,
                "b": jnp.zeros(HIDDEN),
            },
            "out": {
                "w": jax.random.normal(second, (HIDDEN, 10)) / HIDDEN**0.5,
                "b": jnp.zeros(10),
            },
        }

    def scores(p: Any, x: Any, key: Any = None) -> Any:
        hidden = jnp.tanh(x @ p["hidden"]["w"] + p["hidden"]["b"])
        if key is not None:
            kept = jax.random.bernoulli(key, 1 - drop, hidden.shape)
            hidden = hidden * kept / (1 - drop)
        return hidden @ p["out"]["w"] + p["out"]["b"]

    def loss(p: Any, x: Any, y: Any, key: Any = None) -> Any:
        likelihood = jax.nn.log_softmax(scores(p, x, key))
        return -jnp.mean(jnp.take_along_axis(likelihood, y[:, None], axis=1))

    def metrics(p: Any) -> dict[str, float]:
        found = scores(p, images[TRAINED:]).argmax(axis=1)
        return {"test_accuracy": float(jnp.mean(found == labels[TRAINED:]))}

    return asgd.JaxProblem(
        loss,
        parameters if seeded else parameters(jax.random.key(0)),
        (images[:TRAINED], labels[:TRAINED]),
        weight_decay=1e-3,
        random=drop > 0,
        metrics=metrics,
        dtype=kept,
    )


WIDE, SAMPLES = 100, 400  # of the wide linear problem


def wide_linear_data() -> tuple[Any, Any]:
    """Return the data of least squares whose Hessian a^T a / n has one large eigenvalue."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((SAMPLES, WIDE)) / 3
    features[:, 0] *= 4
    return features, features.sum(axis=1) + rng.standard_normal(SAMPLES)


def wide_linear() -> Any:
    """Return the wide linear problem in JAX."""
    import jax.numpy as jnp

    import asgd

    def loss(w: Any, a: Any, y: Any) -> Any:
        return jnp.mean((a @ w - y) ** 2) / 2

    return asgd.JaxProblem(loss, np.zeros(WIDE, np.float32), wide_linear_data())
