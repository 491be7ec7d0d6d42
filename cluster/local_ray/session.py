"""A Ray to run on: the caller's, an existing cluster, or one of our own that leaves no trace.

Our own Ray listens on loopback only, demands a token that exists in its own environment alone,
keeps its files in a private directory and is gone, with every process it started, when the block
ends. The environment, the signal handlers and the umask of this process are put back.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import parameter, ray_constants, services
from ray._private import worker as ray_worker

from asgd.errors import InputError, RunFailedError
from cluster.local_ray.guard import end_processes, guarded, mark
from cluster.local_ray.temporary import private_directory
from cluster.local_ray.vitals import Vitals, ray_death, vitals_of

_log = logging.getLogger(__name__)

_SECONDS_TO_EXIT = 5.0
_SECONDS_TO_ANSWER = 5.0
_INNER = "r"  # Ray's directory in our private one
# The longest path of a Unix socket is 107 bytes, of which Ray's part and our names take up to 87.
_LONGEST_DIRECTORY = 20


@contextmanager
def ray_session(
    address: str | None = None,
    object_store_bytes: int = 100_000_000,
    metrics_port: int | None = None,
) -> Iterator[None]:
    """Provide a Ray for the block: one that is running in this process, `address`, or our own.

    Our own shows its page of metrics, which asks for no token, only where `metrics_port` says at
    which port, 0 for any free one.

    Raises
    ------
    InputError
        There is no cluster at `address`.
    RunFailedError
        Our own could not be started.
    """
    if ray.is_initialized():
        yield
        return
    session = _own(object_store_bytes, metrics_port) if address is None else _joined(address)
    with _ray_off_standard_output(), session:
        yield


@contextmanager
def _ray_off_standard_output() -> Iterator[None]:
    """Log what Ray has to say of lost processes; it would print it where our results go.

    The events of a run tell who was lost, and why.
    """

    def log(data: dict[str, Any], ignore_prefix: bool) -> None:
        _log.info("%s", "\n".join(data["lines"]))

    prints = ray_worker.print_to_stdstream
    ray_worker.print_to_stdstream = log
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = prints


@contextmanager
def _joined(address: str) -> Iterator[None]:
    handlers = _handlers()
    environment = dict(os.environ)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        _exit_on_signals(handlers)
    except (ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--address {address}: no Ray cluster answers there ({reason})") from None
    if os.environ.get("RAY_AUTH_MODE") != "token":
        _log.warning(
            "the Ray cluster at %s asks for no token: anyone who reaches it can use it", address
        )
    try:
        with guarded() as guard, vitals_of(guard):
            yield
    finally:
        with undisturbed():
            ray.shutdown()
        _restore(environment, handlers)


@contextmanager
def _own(object_store_bytes: int, metrics_port: int | None) -> Iterator[None]:
    token = secrets.token_hex(32)
    with (
        _restored_process_state(),
        private_directory(_parent_directory()) as directory,
        guarded(directory) as guard,
        vitals_of(guard, directory) as vitals,
        _marked_processes(directory, vitals),
    ):
        os.environ.update(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=token,
            RAY_USAGE_STATS_ENABLED="0",
            RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
            # Ray prints a warning on our standard output beyond three times this many processes.
            RAY_worker_maximum_startup_concurrency="64",
            # With Ray's 15 workers wait for whatever else runs, which shows as staleness.
            RAY_worker_niceness="0",
            RAY_enable_metrics_collection=str(int(metrics_port is not None)),
            PYTHONPATH=os.pathsep.join(dict.fromkeys(os.path.abspath(p) for p in sys.path)),
        )
        # Workers share the cores: BLAS threads of their own would only fight for them.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = "1"
        _reload_ray_environment()
        # Ray opens what it is given, and all below, to everybody: nobody gets through ours to it.
        inner = os.path.join(directory, _INNER)
        os.mkdir(inner)
        handlers = _handlers()
        try:
            _start_ray(inner, object_store_bytes, metrics_port)
            _exit_on_signals(handlers)
            yield
        finally:
            with undisturbed():
                # Ray does not take down what an interrupted start has left.
                whole = ray.is_initialized() and ray_death() is None
                patience = _SECONDS_TO_EXIT if whole else 0.0
                ray.shutdown()
                end_processes(directory, patience)
    _reload_ray_environment()


def _start_ray(directory: str, object_store_bytes: int, metrics_port: int | None) -> None:
    umask = os.umask(0o077)
    try:
        with _needed_processes_only():
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=object_store_bytes,
                _metrics_export_port=metrics_port or None,
                _temp_dir=directory,
            )
    except Exception as error:  # of any kind: Ray tells little of what its processes met
        reason = ray_death() or " ".join(str(error).split())
        raise RunFailedError(f"Ray could not be started: {reason}") from error
    finally:
        os.umask(umask)


@contextmanager
def _restored_process_state() -> Iterator[None]:
    environment = dict(os.environ)
    umask = os.umask(0o077)
    os.umask(umask)
    handlers = _handlers()
    loopback_off = ray_constants.ENABLE_RAY_CLUSTER
    # With clusters disabled, as Ray does on laptops, every listener binds to 127.0.0.1.
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        _exit_on_signals(handlers)
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = loopback_off
        os.umask(umask)
        _restore(environment, handlers)


def check_address(address: str | None) -> None:
    """Refuse at once what Ray would try to reach for minutes.

    Raises
    ------
    InputError
        Nothing answers at `address`.
    """
    if address is None or address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise InputError(f'--address {address}: expected host:port of a Ray cluster, or "auto"')
    try:
        socket.create_connection((host, int(port)), _SECONDS_TO_ANSWER).close()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--address {address}: nothing answers there ({reason})") from None


def _restore(environment: dict[str, str], handlers: dict[signal.Signals, Any]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _handlers() -> dict[signal.Signals, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}


def _exit_on_signals(before: dict[signal.Signals, Any]) -> None:
    """End in order on SIGTERM and when the terminal is closed.

    Ray's own handler would take Ray down first, with what has not been written yet. What the
    program had set up before, as nohup does, stays.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def leave(*_: object) -> None:
        sys.exit(1)  # the status of a run that was interrupted; Ray would make it so in its calls

    for number, handler in before.items():
        signal.signal(number, leave if handler is signal.SIG_DFL else handler)


def _parent_directory() -> str:
    parent = tempfile.gettempdir()
    return "/tmp" if len(parent) > _LONGEST_DIRECTORY and os.access("/tmp", os.W_OK) else parent


@contextmanager
def _marked_processes(directory: str, vitals: Vitals) -> Iterator[None]:
    popen = services.ConsolePopen
    services.ConsolePopen = functools.partial(_Popen, directory, vitals)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        services.ConsolePopen = popen  # type: ignore[misc]


@contextmanager
def _needed_processes_only() -> Iterator[None]:
    """Leave out three processes of Ray, which take half of its start and a second of its end.

    One machine has nothing to scale up, nobody reads what the workers print, and of the dashboard,
    which is off, only the report of usage statistics would be left, which is off as well.
    """
    parameters, start_dashboard = parameter.RayParams, services.start_api_server
    parameter.RayParams = functools.partial(  # type: ignore[assignment, misc]
        parameters,
        no_monitor=True,
        include_log_monitor=False,  # type: ignore[arg-type]  # Ray's own hint is wrong
        dashboard_agent_listen_port=0,  # for its fixed one, a second run here would wait seconds
    )
    services.start_api_server = lambda *_, **__: ("", None)
    try:
        yield
    finally:
        parameter.RayParams = parameters  # type: ignore[misc]
        services.start_api_server = start_dashboard


class _Popen(services.ConsolePopen):
    """Starts a process of Ray with the mark of its directory and in a group of its own.

    A signal to the whole group, from a terminal or a supervisor, is for the driver, which ends
    the run in order with Ray still alive.
    """

    def __init__(self, directory: str, vitals: Vitals, *arguments: Any, **options: Any) -> None:
        options["env"] = {**(options.get("env") or os.environ), **mark(directory)}
        super().__init__(*arguments, process_group=0, **options)
        vitals.add(self)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C while things are put in order: a second one would leave them torn."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _reload_ray_environment() -> None:
    """Make the Ray in this process forget the token and settings it read before."""
    raylet: Any = ray._raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
