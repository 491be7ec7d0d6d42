"""Going back to the newest checkpoint that can be trusted, with the whole record."""

from __future__ import annotations

from pathlib import Path

from asgd.errors import RunFailedError
from asgd.trace import RunWriter
from cluster.checkpoint import CHECKPOINTS, DamagedCheckpointError, State, load, paths


def restore(writer: RunWriter, epoch: int, reason: str, reached: int = 0) -> State | None:
    """Cut a run directory back to its newest good checkpoint and report what is lost.

    The event `server_restored` tells the versions and, by worker, the number of the gradient it
    is to compute next: what older events say of such a gradient or a later one no longer counts.

    Parameters
    ----------
    writer
        Of the run; no recorder of it writes any more.
    epoch
        Incarnation of the server that is to go on.
    reason
        Why, for the event.
    reached
        Updates the run is known to have made.

    Returns
    -------
    State or None
        Where to go on; None if the run had not begun.

    Raises
    ------
    RunFailedError
        There are checkpoints and none of them can be used; the record is left as it was.
    """
    recorded = writer.recorded_updates()
    state, rejected = _newest(writer, recorded)
    version = state.version if state is not None else 0
    writer.cut(version if state is not None else -1)
    for path in rejected:
        path.unlink()
    reached = max(reached, recorded)
    writer.event(
        "server_restored",
        reason=reason,
        epoch=epoch,
        from_version=reached,
        to_version=version,
        updates_lost=reached - version,
        sequences=state.counts.sequence if state is not None else {},
    )
    return state


def _newest(writer: RunWriter, recorded: int) -> tuple[State | None, list[Path]]:
    """Return the newest state that can be used and the files that cannot."""
    rejected: list[Path] = []
    for path in paths(writer.path / CHECKPOINTS):
        try:
            state = load(path)
            if state.version > recorded:
                raise DamagedCheckpointError(
                    f"is of update {state.version}, the trace ends at update {recorded}"
                )
        except DamagedCheckpointError as error:
            rejected.append(path)
            writer.event("checkpoint_damaged", file=path.name, reason=str(error))
        else:
            return state, rejected
    if rejected:
        raise RunFailedError(f"{writer.path}: none of its {len(rejected)} checkpoints can be used")
    return None, rejected
