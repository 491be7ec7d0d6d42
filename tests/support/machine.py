"""A run directory with one server after another, without processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.rundir.checkpoint import CHECKPOINTS
from asgd.rundir.reader import read_run
from asgd.rundir.writer import RunWriter
from cluster.storage.lease import Lease
from cluster.storage.recorder import Recorder
from cluster.storage.recovery import Restored, restore, start_server
from tests.support.faults import Crowd

EXACT = ("update", "worker", "sequence", "read_version", "staleness", "gradient_norm")


def configure(
    workers: int = 1, updates: int = 60, durability: str = "checkpoint", **tables: Any
) -> RunConfig:
    run = {"updates": updates, "eval_every": 10, "checkpoint_every": 20}
    return make_config(
        {
            "problem": {"kind": "quadratic"},
            "optimizer": {"rule": "momentum", "learning_rate": 0.05, "batch_size": 2},
            "cluster": {"workers": workers, **tables},
            "run": {**run, "durability": durability},
        }
    )


def work(crowd: Crowd, updates: int, seed: int = 0) -> None:
    """Let workers push in random order until `updates` updates, or until all are stopped."""
    arrivals = np.random.default_rng(seed)
    while crowd.at_hand and crowd.server.version < updates:
        crowd.push(int(arrivals.choice(sorted(crowd.at_hand))))


def contents(directory: Path) -> dict[Path, tuple[int, bytes]]:
    """Return the modification time and the bytes of each entry of a directory."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [directory, *directory.rglob("*")]
    }


class Machine:
    """A run directory, and one crowd after another that works on it."""

    def __init__(self, path: Path, config: RunConfig, *, left: bool = False) -> None:
        """Begin a run, or resume the run `left` in the directory."""
        self.config = config
        self.path = path
        self.writer = RunWriter(path) if left else RunWriter.create(path, config)
        self.lease = Lease(path / CHECKPOINTS, config.cluster.lease)
        epoch = self.lease.take()
        self.start(restore(self.writer, epoch, "test") if left else None, epoch)

    def start(self, restored: Restored | None, epoch: int) -> None:
        self.crowd = Crowd(self.config)
        self.crowd.server = start_server(
            self.config,
            self.crowd.initial,
            self.path,
            epoch,
            restored,
            self.crowd.problem.n_samples,
        )
        self.recorder = Recorder(self.path, self.crowd.problem, epoch)
        self.crowd.join_all()

    def restart(self) -> None:
        """Lose everything that is not on disk, and resume."""
        epoch = self.lease.take()
        self.start(restore(self.writer, epoch, "test", self.crowd.server.version), epoch)

    def work(self, updates: int, seed: int = 0) -> None:
        work(self.crowd, updates, seed)
        self.record()

    def record(self) -> None:
        """Write everything so far to the disk."""
        self.recorder.record(self.crowd.server.drain())

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_run(self.path).events if event["event"] == kind]
