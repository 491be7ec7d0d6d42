"""Going back to the newest checkpoint that can be trusted, and on as far as the log goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from asgd.arrays import Array
from asgd.config import RunConfig
from asgd.errors import RunFailedError
from asgd.rundir.reader import read_run
from asgd.rundir.repair import cut_back, recorded_updates
from asgd.rundir.writer import RunWriter
from cluster.core.server import ParameterServer
from cluster.core.state import State
from cluster.core.update import Incident
from cluster.storage.checkpoint import CHECKPOINTS, DamagedCheckpointError, load, paths, version_of
from cluster.storage.write_ahead import WriteAheadLog, is_logged, read_log


@dataclass(frozen=True, eq=False)
class Restored:
    """Where a run can go on.

    Attributes
    ----------
    state
        The checkpoint; None if none was saved yet.
    version
        How far the log goes from there; that of the checkpoint where it does not.
    """

    state: State | None
    version: int

    @property
    def checkpoint(self) -> int:
        """Updates applied at the checkpoint."""
        return self.state.version if self.state is not None else 0


def start_server(
    config: RunConfig, initial: Array, path: Path, epoch: int, restored: Restored | None
) -> ParameterServer:
    """Return the server of a run, with its log if it keeps one.

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
        Where to go on; default: at the start.
    """
    server = ParameterServer(config, initial, epoch, restored.state if restored else None)
    directory = path / CHECKPOINTS
    if restored is not None and restored.version > restored.checkpoint:
        recorded = {
            (event["time"], event["worker"], event["sequence"])
            for event in read_run(path).events
            if "sequence" in event
        }
        server.replay(read_log(directory, server.version, restored.version), recorded)
    if is_logged(config, len(initial)):
        every = config.run.checkpoint_every
        try:
            server.log = WriteAheadLog(directory, epoch, server.version, len(initial), every)
        except OSError as error:
            server.stop(f"the log cannot be written ({error.strerror or error})")
    return server


def restore(writer: RunWriter, epoch: int, reason: str, reached: int = 0) -> Restored:
    """Cut a run directory back to its newest good checkpoint and report what is lost.

    What the log holds beyond the checkpoint is not lost: the server puts it on record again. The
    event `server_restored` tells the versions and, by worker, the number of the gradient it is
    to compute next: what older events say of such a gradient or a later one no longer counts.

    Parameters
    ----------
    writer
        Of the run; no recorder of it writes any more.
    epoch
        Incarnation of the server that is to go on.
    reason
        Why, for the event.
    reached
        Updates the run is known to have made: it may have made more that nobody saw, so
        `updates_lost` is a lower bound.

    Returns
    -------
    Restored
        Where to go on.

    Raises
    ------
    RunFailedError
        There are checkpoints, not only the first one, and none of them can be used; the record is
        left as it was.
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
    # Before anything is cut: else nobody would know of it if this were interrupted.
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
    """Return the newest state that can be used and the files that cannot."""
    rejected: list[Path] = []
    for path in paths(writer.path / CHECKPOINTS):
        try:
            state = load(path)
            if state.version > recorded:
                raise DamagedCheckpointError(
                    f"is of update {state.version}, the record ends at update {recorded}"
                )
        except DamagedCheckpointError as error:
            rejected.append(path)
            writer.event("checkpoint_damaged", file=path.name, reason=str(error))
        else:
            return state, rejected
    # A run that has just begun can begin again; a long one must not be thrown away.
    every = read_run(writer.path).config.run.checkpoint_every
    if any(version_of(path) > every for path in rejected):
        raise RunFailedError(
            f"{writer.path}: none of its {len(rejected)} checkpoints can be used; its trace and "
            f"members are whole up to update {recorded}; see `asgd verify {writer.path}`"
        )
    return None, rejected
