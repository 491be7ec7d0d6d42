"""Fixtures shared by the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """One Ray of our own for every test that may share it: starting one takes seconds."""
    from cluster.session import ray_session

    with ray_session():
        yield
