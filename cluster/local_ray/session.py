"""Provides Ray: the caller's, an existing cluster, or a private one that we start and stop.

A private Ray listens only on loopback, requires a token that only its own environment contains, and
keeps its files in a private directory. At the end of the block its processes and files are gone,
and the environment, signal handlers and umask of this process are restored.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from asgd.errors import InputError, RunFailedError
from asgd.rundir.claims import check_locks
from asgd.rundir.files import NoLocksError
from cluster.local_ray.guard import end_processes, mark
from cluster.local_ray.internals import (
    few_processes,
    lines_logged,
    loopback_only,
    processes_marked,
    reload_environment,
)
from cluster.local_ray.temporary import private_directory
from cluster.local_ray.vitals import guard_of_process, ray_death, vitals_of

_log = logging.getLogger(__name__)

_SECONDS_TO_EXIT = 5.0
_SECONDS_TO_ANSWER = 5.0
_INNER = "r"  # Ray's directory inside our private one
# The path of a Unix socket has at most 107 bytes; Ray's part and our names use up to 87.
_LONGEST_DIRECTORY = 20


@contextmanager
def ray_session(
    address: str | None = None,
    object_store_bytes: int = 100_000_000,
    metrics_port: int | None = None,
) -> Iterator[None]:
    """Provide Ray for the block: that of this process if there is one, `address`, or a private one.

    A private Ray opens its metrics page, which needs no token, only if `metrics_port` is given; 0
    means any free port.

    Raises
    ------
    InputError
        There is no cluster at `address`.
    RunFailedError
        The private Ray could not be started.
    """
    if ray.is_initialized():
        yield
        return
    session = _own(object_store_bytes, metrics_port) if address is None else _joined(address)
    # Standard output is for results; lost processes are in the events of the run.
    with lines_logged(lambda lines: _log.info("%s", lines)), session:
        yield


@contextmanager
def _joined(address: str) -> Iterator[None]:
    handlers = _handlers()
    environment = dict(os.environ)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        _exit_on_signals(handlers)
    except (ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--address {address}: expected a Ray cluster there ({reason})") from None
    if os.environ.get("RAY_AUTH_MODE") != "token":
        _log.warning(
            "the Ray cluster at %s asks for no token: anyone who reaches it can use it", address
        )
    try:
        with guard_of_process() as guard, vitals_of(guard):
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
        loopback_only(),
        guard_of_process() as guard,
        private_directory(_parent_directory()) as directory,
        vitals_of(guard, directory) as vitals,
        processes_marked(mark(directory), vitals.add),
    ):
        os.environ.update(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=token,
            RAY_USAGE_STATS_ENABLED="0",
            RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
            # Beyond three times this many processes, Ray prints a warning on standard output.
            RAY_worker_maximum_startup_concurrency="64",
            # At Ray's default of 15, workers wait for other processes, which adds staleness.
            RAY_worker_niceness="0",
            RAY_enable_metrics_collection=str(int(metrics_port is not None)),
            PYTHONPATH=os.pathsep.join(dict.fromkeys(os.path.abspath(p) for p in sys.path)),
        )
        # One BLAS thread per worker, as more would compete for the same cores.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = "1"
        reload_environment()
        # Ray's directory is readable by everybody, so it is inside our private one.
        inner = os.path.join(directory, _INNER)
        os.mkdir(inner)
        handlers = _handlers()
        try:
            _start_ray(inner, object_store_bytes, metrics_port)
            _exit_on_signals(handlers)
            yield
        finally:
            with undisturbed():
                # After an interrupted start, Ray leaves processes behind.
                whole = ray.is_initialized() and ray_death() is None
                patience = _SECONDS_TO_EXIT if whole else 0.0
                ray.shutdown()
                end_processes(directory, patience)
    reload_environment()


def _start_ray(directory: str, object_store_bytes: int, metrics_port: int | None) -> None:
    umask = os.umask(0o077)
    try:
        with few_processes(), no_fork_warnings():
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=object_store_bytes,
                _metrics_export_port=metrics_port or None,
                _temp_dir=directory,
            )
    except Exception as error:  # Ray may raise anything
        reason = ray_death() or " ".join(str(error).split())
        raise RunFailedError(f"Ray could not be started: {reason}") from error
    finally:
        os.umask(umask)


@contextmanager
def no_fork_warnings() -> Iterator[None]:
    """Hide JAX's warning about forks, as Ray's processes call exec at once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        yield


@contextmanager
def _restored_process_state() -> Iterator[None]:
    environment = dict(os.environ)
    umask = os.umask(0o077)
    os.umask(umask)
    handlers = _handlers()
    try:
        _exit_on_signals(handlers)
        yield
    finally:
        os.umask(umask)
        _restore(environment, handlers)


def check_address(address: str | None) -> None:
    """Refuse an unreachable address at once; Ray would try for minutes.

    Raises
    ------
    InputError
        Nothing answers at `address`, or the temporary directory of a private Ray has no file locks.
    """
    if address is None:
        _check_parent_directory()
    if address is None or address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise InputError(f'--address {address}: expected host:port of a Ray cluster, or "auto"')
    try:
        socket.create_connection((host, int(port)), _SECONDS_TO_ANSWER).close()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--address {address}: expected a Ray cluster there ({reason})") from None


def _restore(environment: dict[str, str], handlers: dict[signal.Signals, Any]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _handlers() -> dict[signal.Signals, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}


def _exit_on_signals(before: dict[signal.Signals, Any]) -> None:
    """Shut down in order on SIGTERM and when the terminal is closed.

    Ray's own handler would end Ray first and lose unwritten records. Earlier handlers, such as
    that of nohup, stay in place.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def leave(*_: object) -> None:
        sys.exit(1)  # the exit status of an interrupted run

    for number, handler in before.items():
        signal.signal(number, leave if handler is signal.SIG_DFL else handler)


def _parent_directory() -> str:
    parent = tempfile.gettempdir()
    return "/tmp" if len(parent) > _LONGEST_DIRECTORY and os.access("/tmp", os.W_OK) else parent


def _check_parent_directory() -> None:
    parent = _parent_directory()
    try:
        check_locks(Path(parent), "flock")
    except NoLocksError as error:
        raise InputError(
            f"TMPDIR = {parent}: is on a file system without locks ({error.reason}): expected a "
            "local disk"
        ) from None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C during the shutdown, which a second Ctrl-C would interrupt halfway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
