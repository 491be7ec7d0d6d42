"""The power may fail at every write: a resumed run is correct and keeps its saved updates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from asgd.config.tables import RunConfig
from asgd.errors import InputError
from asgd.rundir.reader import read_run
from tests.support.disk import VARIANTS, Disk, lay_out
from tests.support.faults import Crowd
from tests.support.machine import EXACT, Machine, configure

UPDATES = 60


class Undisturbed:
    """The same run without a disk; with one worker, it is deterministic."""

    def __init__(self, config: RunConfig) -> None:
        crowd = Crowd(config)
        crowd.join_all()
        self.points = [crowd.server.parameters.copy()]
        while crowd.at_hand:
            crowd.push(0)
            self.points.append(crowd.server.parameters.copy())
        self.trace = crowd.server.drain().trace
        self.losses = [crowd.problem.loss(point) for point in self.points]

    def check(self, machine: Machine, reached: int) -> None:
        """Assert that a run and its record equal this run up to an update."""
        assert machine.crowd.server.version == reached
        np.testing.assert_array_equal(machine.crowd.server.parameters, self.points[reached])
        run = read_run(machine.path)
        for column in EXACT:
            np.testing.assert_array_equal(run.trace[column], self.trace[column][:reached])
        updates = run.loss["update"].to_numpy()
        np.testing.assert_array_equal(run.loss["loss"], [self.losses[u] for u in updates])
        assert updates.tolist() == list(range(0, reached + 1, 10))


class Power:
    """Lets the power fail before each step of the disk, on a copy, and resumes the run from it.

    `promised` is the update of the last saved checkpoint, which a resumed run must reach; None if
    no checkpoint is saved yet.
    """

    def __init__(self, config: RunConfig, directory: Path) -> None:
        self.undisturbed = Undisturbed(config)
        self.promised: int | None = None
        self.version = 0
        self._config = config
        self._directory = directory
        self._random = np.random.default_rng(0)
        self._tried: set[tuple[int, int | None]] = set()

    def fail(self, disk: Disk, what: str) -> None:
        number = len(disk.steps)
        # A log has many similar steps, one for each update.
        if self._config.run.durability == "log" and number % 4:
            return
        for variant in VARIANTS:
            image = disk.image(variant, self._random)
            known = hash(frozenset(image.items())), self.promised
            if known in self._tried:
                continue
            self._tried.add(known)
            left = lay_out(image, self._directory / f"{number}-{variant}")
            message = f"power lost before step {number}, {what!r}: {variant}"
            try:
                self.recover(left, variant)
            except Exception as error:
                error.add_note(message)
                raise

    def recover(self, left: Path, variant: str) -> None:
        try:
            machine = Machine(left, self._config, left=True)
        except InputError:
            assert self.promised is None
            return
        reached = machine.crowd.server.version
        assert reached >= (self.promised or 0)
        assert reached <= self.version
        if variant == "kept" and self._config.run.durability == "log":
            assert reached == self.version
        machine.record()
        self.undisturbed.check(machine, reached)
        if self._random.random() < 0.05:
            machine.work(UPDATES)
            self.undisturbed.check(machine, UPDATES)


@pytest.mark.parametrize("durability", ["log", "checkpoint"])
def test_a_run_can_be_resumed_after_power_lost_at_any_step(
    tmp_path: Path, durability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    power = Power(configure(durability=durability), tmp_path / "left")
    disk = Disk(tmp_path / "run", power.fail)

    def work(machine: Machine, reached: int) -> None:
        while machine.crowd.server.version < reached:
            machine.crowd.push(0)
            power.version = machine.crowd.server.version
        machine.record()
        power.promised = reached // 20 * 20

    with disk.watched(monkeypatch):
        machine = Machine(tmp_path / "run", power._config)
        for reached in (3, 27):
            work(machine, reached)
        machine.restart()
        for reached in (44, 60):
            work(machine, reached)
    power.undisturbed.check(machine, UPDATES)
