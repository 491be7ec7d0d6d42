"""Every private part of Ray that we use, one function each.

Ray has no public interface for these, and may change its private parts in any release. So
`pyproject.toml` pins Ray's version, and each function here refuses any other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import ray
from ray._private import parameter, ray_constants, services, worker

from asgd.errors import InputError

_VERSION = "2.60."


def lines_logged(log: Callable[[str], None]) -> AbstractContextManager[None]:
    """Send Ray's messages about lost processes to `log` instead of standard output."""

    def take(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        log("\n".join(data["lines"]))

    return _replaced(worker, "print_to_stdstream", take)


def loopback_only() -> AbstractContextManager[None]:
    """Make a Ray started in the block listen only on 127.0.0.1."""
    return _replaced(ray_constants, "ENABLE_RAY_CLUSTER", False)


@contextmanager
def few_processes() -> Iterator[None]:
    """Make a Ray started in the block omit three processes that are not needed on one machine.

    The autoscaler, the log monitor and the dashboard take half of the start and a second of the
    shutdown. With the dashboard off, its process would only report usage statistics, which are off
    as well.
    """
    parameters = partial(
        parameter.RayParams,
        no_monitor=True,
        include_log_monitor=False,  # type: ignore[arg-type]  # Ray's type hint is wrong
        dashboard_agent_listen_port=0,  # the default port would delay a second run by seconds
    )
    with (
        _replaced(parameter, "RayParams", parameters),
        _replaced(services, "start_api_server", lambda *_, **__: ("", None)),
    ):
        yield


def processes_marked(
    variables: Mapping[str, str], started: Callable[[Any], None]
) -> AbstractContextManager[None]:
    """Start Ray's processes in the block with environment variables and their own process group.

    A signal to the driver's group, from a terminal or a supervisor, then does not reach Ray, so the
    driver can shut down in order while Ray is still alive.

    Parameters
    ----------
    variables
        Added to the environment of each process.
    started
        Called with the `subprocess.Popen` of each process.
    """

    class Popen(services.ConsolePopen):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options["env"] = {**(options.get("env") or os.environ), **variables}
            super().__init__(*arguments, process_group=0, **options)
            started(self)

    return _replaced(services, "ConsolePopen", Popen)


def reload_environment() -> None:
    """Make Ray in this process reread its settings and its token from the environment."""
    _check_version("_raylet")
    raylet: Any = ray._raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    _check_version(f"{module.__name__}.{name}")
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _check_version(part: str) -> None:
    if not ray.__version__.startswith(_VERSION):
        raise InputError(
            f"ray = {ray.__version__}: expected {_VERSION}x, because we use its private {part}; "
            f'pip install "ray=={_VERSION}*"'
        )
