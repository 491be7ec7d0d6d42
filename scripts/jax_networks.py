"""A small convolutional network in JAX for the benchmarks of plans and predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import asgd

FILTERS, SIDE = 8, 3  # number of filters, side of a patch
PLACES = 8 - SIDE + 1  # positions of a patch along each axis of an image


def patches() -> tuple[np.ndarray, np.ndarray]:
    """Return all patches of the digits, shape (1797, 6, 6, 9), and the labels."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16
    windows = np.lib.stride_tricks.sliding_window_view(images, (SIDE, SIDE), axis=(1, 2))
    return windows.reshape(len(images), PLACES, PLACES, SIDE * SIDE), labels


def convolutional() -> Any:
    """Return a classifier of the digits: 8 filters of 3 x 3, ReLU, mean pooling, a linear layer.

    A filter is a matrix product with all patches, which XLA computes for several points at once.
    """
    import jax
    import jax.numpy as jnp

    pooled = PLACES // 2
    first, second = jax.random.split(jax.random.key(0))
    start = {
        "filters": jax.random.normal(first, (SIDE * SIDE, FILTERS)) / SIDE,
        "shifts": jnp.zeros(FILTERS),
        "out": jax.random.normal(second, (pooled * pooled * FILTERS, 10)) / 9,
        "offsets": jnp.zeros(10),
    }

    def loss(p: Any, x: Any, y: Any) -> Any:
        active = jax.nn.relu(x @ p["filters"] + p["shifts"])
        parts = active.reshape(-1, pooled, 2, pooled, 2, FILTERS).mean(axis=(2, 4))
        scores = parts.reshape(len(x), -1) @ p["out"] + p["offsets"]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(scores), y[:, None], axis=1))

    return asgd.JaxProblem(loss, start, patches())
