"""The cause of an actor's death, in words, from the exceptions of Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, WorkerCrashedError

from cluster.local_ray.causes import cause_of

ROOT = Path(__file__).parents[2]


class Faulty:
    """An actor that fails in its constructor or in one of its methods."""

    def __init__(self, raises: bool = False) -> None:
        if raises:
            raise ValueError("no\n  such thing")

    def leave(self) -> None:
        sys.exit(3)

    def fall(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def err(self) -> None:
        raise KeyError("x")


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    ("raises", "method", "cause"),
    [
        (True, "err", "ValueError: no such thing"),
        (False, "leave", "its process exited with status 3"),
        (
            False,
            "fall",
            "its process died: killed (by the kernel, if memory ran out; see `dmesg`) or crashed",
        ),
        (False, "err", "KeyError: 'x'"),
    ],
)
def test_cause_is_one_line(raises: bool, method: str, cause: str) -> None:
    actor: Any = ray.remote(Faulty).options(num_cpus=0).remote(raises)
    with pytest.raises(RayError) as raised:
        ray.get(getattr(actor, method).remote())
    assert cause_of(raised.value) == cause


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            OutOfMemoryError(
                "1 worker(s) were killed due to the node running low on memory. Memory on the node "
                "(IP: 127.0.0.1, ID: cc) was 22.7GB used / 23.54GB limit (0.96)\nOOM kill reason"
            ),
            "out of memory: Ray's memory monitor killed its process: 22.7GB used / 23.54GB "
            "limit on its node",
        ),
        (OutOfMemoryError("in other words"), "out of memory: Ray's memory monitor killed"),
        (NodeDiedError("the node\nis dead"), "its node is gone"),
        (WorkerCrashedError(), "The worker died unexpectedly while executing this task."),
    ],
)
def test_causes_of_rare_exceptions(error: RayError, cause: str) -> None:
    assert cause_of(error).startswith(cause)
    assert "\n" not in cause_of(error)


SHORT_OF_MEMORY = """
import os, sys
os.environ.update(RAY_memory_usage_threshold="0.0001", RAY_memory_monitor_refresh_ms="100")
from asgd.config.make import make_config
from cluster import run

def enough(progress):
    if "out of memory" in open(sys.argv[1] + "/events.jsonl").read():
        raise KeyboardInterrupt

cluster = {"workers": 2, "compute_time": {"mean": 0.1}}
config = make_config({"problem": {"kind": "quadratic"}, "cluster": cluster})
run(config, sys.argv[1], progress=enough)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_memory_is_named_as_the_cause(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, str(tmp_path / "run")],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        check=False,
        timeout=280,
    )
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "out of memory: Ray's memory monitor killed its process" in events
