"""Fixtures shared by the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

    from tests.support.reports import Reports


def reads_reports(nodeid: str) -> bool:
    """Whether a test is in a file that shares the fixture `reports`."""
    return nodeid.partition("::")[0].endswith(("test_report.py", "test_browser.py"))


class Scheduling(LoadScopeScheduling):
    """Even-numbered processes take tests from the front of the list, the others from its end.

    Tests of real processes, which mostly wait, stand in front; the longest computations stand at
    the end. So the cores are always busy, only half of the processes start a Ray, and the last
    tests, from the middle, are short. All tests that read the reports run in one process, as do
    all tests of hosts. (The groups of pytest-xdist 3.8 would do this if pytest 9.2 still let it
    rename tests.)
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.partition("::")[0].endswith("test_hosts.py"):
            return "hosts"
        return "reports" if reads_reports(nodeid) else nodeid

    def _assign_work_unit(self, node: WorkerController) -> None:
        if int(node.gateway.id.removeprefix("gw")) % 2:
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Make pytest-xdist distribute the tests by `Scheduling`."""
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort tests as `Scheduling` expects: long ones at both ends."""

    def rank(item: pytest.Item) -> tuple[bool, bool, bool]:
        fixtures = getattr(item, "fixturenames", ())
        slow, shared = item.get_closest_marker("slow") is not None, "shared_ray" in fixtures
        if shared or item.get_closest_marker("ray") is not None:
            return False, not slow, shared  # a test without the shared Ray starts its own
        return True, reads_reports(item.nodeid), slow

    items.sort(key=rank)


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """Start the Ray that tests share; a start takes seconds."""
    from cluster.local_ray.session import ray_session

    with ray_session(metrics_port=0):
        yield


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Return the reports that tests share; drawing them takes seconds."""
    from tests.support.reports import Reports

    return Reports.make(tmp_path_factory.mktemp("reports"))
