"""The parameters that a run has reached, from its newest checkpoint or its last state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from asgd.arrays import Array
from asgd.errors import InputError
from asgd.rundir.checkpoint import (
    CHECKPOINTS,
    PARAMETERS,
    Checkpoint,
    DamagedCheckpointError,
    load,
    paths,
    version_of,
)
from asgd.rundir.files import replace_file


@dataclass(frozen=True, eq=False)
class Reached:
    """A saved point of a run.

    Attributes
    ----------
    update
        Updates applied.
    parameters
        x, shape (d,).
    """

    update: int
    parameters: Array

    def save(self, directory: Path) -> None:
        """Write the last state of a simulated run."""
        header = msgspec.json.encode({"version": self.update})
        replace_file(directory / PARAMETERS, Checkpoint(header, (self.parameters,)).pack())

    @classmethod
    def load(cls, path: Path) -> Reached:
        """Read the last state of a simulated run, or a checkpoint.

        Raises
        ------
        DamagedCheckpointError
            It cannot be read or is damaged.
        """
        stored = load(path)
        update = _version(stored) if path.name == PARAMETERS else version_of(path)
        return cls(update, stored.arrays[0])

    @classmethod
    def of(cls, directory: Path) -> Reached:
        """Read the newest undamaged state in a run directory.

        Raises
        ------
        InputError
            There is none.
        """
        damaged = ""
        for path in [directory / PARAMETERS, *paths(directory / CHECKPOINTS)]:
            if not path.exists():
                continue
            try:
                return cls.load(path)
            except DamagedCheckpointError as error:
                damaged = f"; {path.name} {error}"
        raise InputError(f"{directory}: no parameters are saved{damaged}")


def _version(stored: Checkpoint) -> int:
    try:
        return msgspec.json.decode(stored.header, type=dict[str, int])["version"]
    except (msgspec.DecodeError, KeyError) as error:
        raise DamagedCheckpointError(f"has an unreadable header ({error})") from None
