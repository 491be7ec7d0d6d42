"""Fixtures shared by the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from reports import Reports


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what two processes may run at the same time: files, but Ray and the reports only once."""

    def group(item: pytest.Item) -> str:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "shared_ray" in fixtures or item.get_closest_marker("ray"):
            return "ray"
        return "reports" if "reports" in fixtures else item.path.stem

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    # Ray's tests wait rather than compute, and are one group: they start first.
    items.sort(key=lambda item: group(item) != "ray")


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
