"""Refuses a run whose processes do not fit into this machine's memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from msgspec.structs import replace

from asgd.compression import SCRATCH
from asgd.config.tables import MOST_WORKERS, RunConfig
from asgd.errors import InputError
from asgd.problems.base import Problem
from asgd.rules.base import Rule
from asgd.rules.make import make_local_rule
from cluster.storage.write_ahead import is_logged

# The most vectors of parameters that each holds, by `scripts/bench_memory.py`: the server; a worker
# (message, snapshot, gradient); the framework in its process, without activations; the recorder.
_SERVER, _WORKER, _PROCESS, _RECORDER = 5, 3, 2, 5
_OF_STEPS = 2  # of a worker with local steps: its iterate, and the pseudo-gradient
_OF_ROUNDING = 2  # of a worker whose messages may be rounded: its snapshot, and its gradient
_RECORDS = 4  # between server and recorder
# Of each worker or gradient, if updates apply a mean or gradients wait for others.
_COLLECTED = 2
# For each further vector in a checkpoint: the server's own, its copy in the state, and three at the
# recorder, two of them to save it.
_SAVED = 5
# Private memory by `scripts/bench_memory.py`: a process with NumPy and Ray; a framework in addition
# (if workers need one, this process has already imported it); Ray's own processes, and the excess
# of the recorder over other processes.
_PROCESS_BYTES, _FRAMEWORK_BYTES, _RAY_BYTES = 70_000_000, 125_000_000, 180_000_000
_FRAMEWORKS = ("torch", "jax")


def vectors(config: RunConfig, dim: int, rule: Rule) -> int:
    """Return the most vectors of parameters that the processes of a run hold together.

    If a rule needs the snapshots that were read, the server keeps one for each worker, and the
    checkpoints of a run with a log contain them.
    """
    workers, order = config.cluster.workers, (config.cluster.mode, config.cluster.schedule)
    needed = _SERVER + _RECORDER + _RECORDS + _SAVED * len(rule.state)
    needed += _WORKER * workers + _PROCESS * _processes(config)
    if config.cluster.wire_dtype != "auto":
        needed += _OF_ROUNDING * workers
    if not rule.blockwise:
        needed += rule.scratch
    if (local := make_local_rule(config)) is not None:
        own = len(local.state) + (0 if local.blockwise else local.scratch)
        needed += (_OF_STEPS + own) * workers
    if config.cluster.compression != "none":
        needed += (1 + SCRATCH) * workers  # the residual, and what compressing takes
    if order != ("async", "free"):
        needed += _COLLECTED * max(workers, config.cluster.gradients_per_update or 0)
    if rule.reads:
        needed += workers * (_SAVED if is_logged(config, dim) else 1)
    return needed


def check_memory(config: RunConfig, problem: Problem, rule: Rule) -> None:
    """Refuse workers for which the free memory of this machine does not suffice.

    Raises
    ------
    InputError
        It does not suffice; the message says how much is needed.
    """
    workers, free = config.cluster.workers, _free_bytes()
    needed = _bytes(config, problem, rule)
    if free is None or needed <= free:
        return
    most = 0 if config.cluster.gpus_per_worker else min(workers, MOST_WORKERS)
    for together in range(config.cluster.workers_per_process + 1, most + 1):
        sharing = replace(config.cluster, workers_per_process=together)
        if _bytes(replace(config, cluster=sharing), problem, rule) <= free:
            ways = f"fewer workers, cluster.workers_per_process = {together} or more,"
            break
    else:
        ways = "fewer workers,"
    raise InputError(
        f"cluster.workers = {workers}: with {problem.dim:,} parameters in {problem.dtype} "
        f"their processes and the server take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
        f"are free: expected {ways} or more machines (--address)"
    )


def _bytes(config: RunConfig, problem: Problem, rule: Rule) -> int:
    """Return the memory that all processes of a run take."""
    held = vectors(config, problem.dim, rule) * problem.dim * problem.dtype.itemsize
    return held + _without_vectors(config)


def _without_vectors(config: RunConfig) -> int:
    """Return the memory that these processes take without vectors of parameters."""
    each = _PROCESS_BYTES + _FRAMEWORK_BYTES * any(name in sys.modules for name in _FRAMEWORKS)
    return _RAY_BYTES + (_processes(config) + 2) * each


def _processes(config: RunConfig) -> int:
    """Return the number of processes of workers."""
    return -(-config.cluster.workers // config.cluster.workers_per_process)


def _free_bytes() -> int | None:
    """Return the memory that can be used without swapping, None if the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
