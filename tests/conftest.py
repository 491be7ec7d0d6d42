"""Fixtures shared by the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from tests.support.reports import Reports


class Scheduling(LoadScopeScheduling):
    """Each test goes where there is room, but those that read the reports to one process.

    The groups of pytest-xdist 3.8 would say so too, if pytest 9.2 still let it name a test anew.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "reports" if file.endswith(("test_report.py", "test_browser.py")) else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Say which process of several runs which test."""
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with real processes, which wait more than they compute, and with the longest ones.

    At the end there is nothing left to wait for.
    """

    def rank(item: pytest.Item) -> tuple[bool, bool, bool]:
        fixtures = getattr(item, "fixturenames", ())
        real = "shared_ray" in fixtures or item.get_closest_marker("ray") is not None
        slow = item.get_closest_marker("slow") is not None
        return not real, not slow, "reports" not in fixtures

    items.sort(key=rank)


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """One Ray of our own for every test that may share it: starting one takes seconds."""
    from cluster.local_ray.session import ray_session

    with ray_session(metrics_port=0):
        yield


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Reports for every test that reads one: drawing them takes seconds."""
    from tests.support.reports import Reports

    return Reports.make(tmp_path_factory.mktemp("reports"))
