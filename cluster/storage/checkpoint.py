"""Checkpoints of a server: its state as the content of a checkpoint file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from asgd.rundir import checkpoint
from asgd.rundir.checkpoint import Checkpoint, DamagedCheckpointError
from cluster.core.state import ServerCounts, State


def pack(state: State) -> bytes:
    """Return the content of a checkpoint file."""
    return _stored(state).pack()


def load(path: Path) -> State:
    """Read a checkpoint.

    Raises
    ------
    DamagedCheckpointError
        It cannot be read or is damaged.
    """
    return _restored(checkpoint.load(path))


def unpack(data: bytes) -> State:
    """Return the state in the content of a checkpoint file.

    Raises
    ------
    DamagedCheckpointError
        The content is damaged.
    """
    return _restored(Checkpoint.unpack(data))


def save(directory: Path, state: State) -> Path:
    """Write a checkpoint; see `asgd.rundir.checkpoint.save`."""
    return checkpoint.save(directory, state.version, _stored(state))


def _stored(state: State) -> Checkpoint:
    return Checkpoint(
        msgspec.json.encode(state.counts), (state.parameters, *state.rule, *state.reads)
    )


def _restored(stored: Checkpoint) -> State:
    try:
        counts = msgspec.json.decode(stored.header, type=ServerCounts)
    except (msgspec.DecodeError, ValueError) as error:
        raise DamagedCheckpointError(f"its content cannot be used ({error})") from None
    parameters, *others = stored.arrays
    rule = len(others) - len(counts.reads)
    if rule < 0:
        raise DamagedCheckpointError("its content cannot be used (snapshots are missing)")
    return State(counts, parameters, tuple(others[:rule]), tuple(others[rule:]))
