"""Fixtures shared by the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from reports import Reports


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """One Ray of our own for every test that may share it: starting one takes seconds."""
    from cluster.session import ray_session

    with ray_session():
        yield


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Reports for every test that reads one: drawing them takes seconds."""
    from reports import Reports

    return Reports.make(tmp_path_factory.mktemp("reports"))
