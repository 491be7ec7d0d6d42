"""Restores a run from its newest good checkpoint and the write-ahead log."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from asgd.arrays import Array
from asgd.config.tables import RunConfig
from asgd.errors import RunFailedError
from asgd.rules.base import Rule, check_saved
from asgd.rundir.checkpoint import CHECKPOINTS, DamagedCheckpointError, paths, version_of
from asgd.rundir.reader import read_run
from asgd.rundir.repair import cut_back, recorded_updates
from asgd.rundir.writer import RunWriter
from cluster.core.reads import readers
from cluster.core.server import ParameterServer
from cluster.core.state import State
from cluster.core.update import Incident
from cluster.storage.checkpoint import load
from cluster.storage.write_ahead import WriteAheadLog, is_logged, read_log


@dataclass(frozen=True, eq=False)
class Restored:
    """The point from which a run can continue.

    Attributes
    ----------
    state
        State of the checkpoint; None if there is no checkpoint yet.
    version
        The last version in the log, or that of the checkpoint if the log has no later updates.
    """

    state: State | None
    version: int

    @property
    def checkpoint(self) -> int:
        """Version of the checkpoint."""
        return self.state.version if self.state is not None else 0


def start_server(
    config: RunConfig,
    initial: Array,
    path: Path,
    epoch: int,
    restored: Restored | None,
    n_samples: int = 0,
) -> ParameterServer:
    """Return the server of a run, with its write-ahead log if it has one.

    Parameters
    ----------
    config
        The run.
    initial
        x_0, shape (d,).
    path
        The run directory.
    epoch
        Incarnation of the server.
    restored
        The point to continue from; default: the start.
    n_samples
        As for the server.
    """
    state = restored.state if restored else None
    server = ParameterServer(config, initial, epoch, state, n_samples)
    directory = path / CHECKPOINTS
    if restored is not None and restored.version > restored.checkpoint:
        recorded = {
            (event["time"], event["worker"], event["sequence"])
            for event in read_run(path).events
            if "sequence" in event
        }
        log = partial(read_log, directory, server.version, restored.version)
        server.replay(log(), recorded, readers(log()) if server.keeps_reads else {})
    if is_logged(config, len(initial)):
        every = config.run.checkpoint_every
        try:
            server.log = WriteAheadLog(
                directory, epoch, server.version, len(initial), every, lease=config.cluster.lease
            )
        except OSError as error:
            server.stop(f"the log cannot be written ({error.strerror or error})")
    return server


def reached_version(path: Path) -> int:
    """Return the number of updates of a run that are recorded or in its log."""
    recorded = recorded_updates(path)
    for checkpoint in paths(path / CHECKPOINTS):
        try:
            version = load(checkpoint).version
        except DamagedCheckpointError:
            continue
        logged = read_log(path / CHECKPOINTS, version)
        return max(recorded, version + sum(not isinstance(one, Incident) for one in logged))
    return recorded


def check_rule(path: Path, rule: Rule) -> None:
    """Refuse a rule that cannot continue from the newest good checkpoint of a run.

    Raises
    ------
    InputError
        The rule keeps another state.
    """
    for checkpoint in paths(path / CHECKPOINTS):
        try:
            state = load(checkpoint)
        except DamagedCheckpointError:
            continue
        check_saved(rule, rule.init(state.parameters), state.rule, state.counts.rule)
        return


def restore(writer: RunWriter, epoch: int, reason: str, reached: int = 0) -> Restored:
    """Truncate a run directory to its newest good checkpoint and write `server_restored`.

    The new server records the logged updates after the checkpoint again. The event has the versions
    and, for each worker, the number of its next gradient; older events about this gradient or later
    ones are void.

    Parameters
    ----------
    writer
        Writer of the run; all its recorders must have stopped.
    epoch
        Incarnation of the new server.
    reason
        Reason for the restore, for the event.
    reached
        Updates last seen by the launcher. It polls every 0.25 s, so `updates_lost` is a lower
        bound.

    Returns
    -------
    Restored
        The point to continue from.

    Raises
    ------
    RunFailedError
        There are checkpoints after the first, and none can be used. The record is unchanged.
    """
    recorded = recorded_updates(writer.path)
    state, rejected = _newest(writer, recorded)
    sequences = dict(state.counts.sequence) if state is not None else {}
    version = checkpoint = state.version if state is not None else 0
    for entry in read_log(writer.path / CHECKPOINTS, checkpoint):
        version += not isinstance(entry, Incident)
        for worker, sequence in entry.numbers():
            sequences[worker] = max(sequences.get(worker, 0), sequence + 1)
    reached = max(reached, recorded, version)
    # Write the event before the cut, so that an interruption in between is on record.
    writer.event(
        "server_restored",
        reason=reason,
        epoch=epoch,
        from_version=reached,
        to_version=version,
        updates_lost=reached - version,
        updates_from_log=version - checkpoint,
        sequences=sequences,
    )
    cut_back(writer.path, checkpoint if state is not None else -1)
    for path in rejected:
        path.unlink(missing_ok=True)
    writer.sync()
    return Restored(state, version)


def _newest(writer: RunWriter, recorded: int) -> tuple[State | None, list[Path]]:
    """Return the newest usable state, and the unusable checkpoint files."""
    rejected: list[Path] = []
    for path in paths(writer.path / CHECKPOINTS):
        try:
            state = load(path)
            if state.version > recorded:
                raise DamagedCheckpointError(
                    f"is ahead: of update {state.version}, but the record ends at update {recorded}"
                )
        except DamagedCheckpointError as error:
            rejected.append(path)
            writer.event("checkpoint_damaged", file=path.name, reason=str(error))
        else:
            return state, rejected
    # Only a run before its first regular checkpoint may start over.
    every = read_run(writer.path).config.run.checkpoint_every
    if any(version_of(path) > every for path in rejected):
        raise RunFailedError(
            f"{writer.path}: none of its {len(rejected)} checkpoints can be used; its trace and "
            f"members are intact up to update {recorded}; see `asgd verify {writer.path}`"
        )
    return None, rejected
