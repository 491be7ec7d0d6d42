"""Fixtures shared by the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from reports import Reports


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what is to run in one process, one after the other, and what starts first.

    Files do, and whatever reads the reports. Tests with real processes wait more than they compute:
    each goes where there is room, beside others, and to the Ray that is there. They start first,
    the longest ones at the head, so that at the end there is nothing left to wait for.
    """

    def is_ray(item: pytest.Item) -> bool:
        return "shared_ray" in item.fixturenames or item.get_closest_marker("ray") is not None

    for item in items:
        if "reports" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("reports"))
        elif not is_ray(item):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: (not is_ray(item), item.get_closest_marker("slow") is None))


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
