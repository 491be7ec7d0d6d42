"""Private parts of Ray: another version of Ray is refused before they are used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import ray
from ray._private import services

from asgd.errors import InputError
from cluster.local_ray import internals


@pytest.mark.parametrize(
    "use",
    [
        lambda: internals.lines_logged(print).__enter__(),
        lambda: internals.loopback_only().__enter__(),
        lambda: internals.few_processes().__enter__(),
        lambda: internals.processes_marked({}, print).__enter__(),
        internals.reload_environment,
    ],
)
def test_another_version_of_ray_is_refused(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[], None]
) -> None:
    monkeypatch.setattr(ray, "__version__", "2.61.0")
    with pytest.raises(InputError, match=r"ray = 2\.61\.0: expected 2\.60\.x, because we use"):
        use()


def test_private_parts_are_restored() -> None:
    before = services.ConsolePopen, services.start_api_server
    with internals.few_processes(), internals.processes_marked({}, print):
        assert services.ConsolePopen is not before[0]
        assert services.start_api_server is not before[1]
    assert (services.ConsolePopen, services.start_api_server) == before
