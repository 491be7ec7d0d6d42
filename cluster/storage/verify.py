"""Whether everything in a run directory is what was written, and can be what happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from asgd.arrays import Array
from asgd.errors import InputError
from asgd.rundir.parts import told_losses
from asgd.rundir.reader import Run
from asgd.verify import record_findings, replay_findings
from cluster.storage.checkpoint import CHECKPOINTS, DamagedCheckpointError, load, paths
from cluster.storage.lease import LOG_FILES, check_lease
from cluster.storage.write_ahead import segments


@dataclass(frozen=True)
class Verdict:
    """What was found in a run directory.

    Attributes
    ----------
    run
        The directory, as text.
    findings
        What is wrong, a line each; none where all is right.
    checked
        What was looked at, in words.
    """

    run: str
    findings: list[str]
    checked: str


def verify(
    run: Run, replayed: bool = True, progress: Callable[[float], None] | None = None
) -> Verdict:
    """Check digests, invariants and, if wanted, that a replay comes to the same parameters.

    Parameters
    ----------
    run
        The run.
    replayed
        Whether its updates are made again, which takes about as long as it did to compute them.
    progress
        Called with the share of the replay that is done.
    """
    directory = run.path / CHECKPOINTS
    states, found = _states(directory)
    found += _others(directory)
    found += record_findings(run)
    if found:
        return Verdict(str(run.path), found, "")
    ahead = [update for update in states if update > len(run.trace)]
    if ahead:
        found.append(f"{directory}: a checkpoint is of update {ahead[0]}, which is not on record")
    checked = f"{len(run.trace)} updates, {len(run.loss)} losses, {len(states)} checkpoints"
    gaps = len(told_losses(run.events))
    if gaps:
        checked += (
            f", {gaps} damaged or missing part{'s' * (gaps > 1)} of losses named in the events"
        )
    if not replayed:
        return Verdict(str(run.path), found, f"{checked}; not replayed")
    try:
        found += replay_findings(run, states, progress)
    except InputError as error:
        return Verdict(str(run.path), found, f"{checked}; not replayed ({error})")
    return Verdict(str(run.path), found, f"{checked}, and a replay comes to the same")


def _states(directory: Path) -> tuple[dict[int, Array], list[str]]:
    """Return the parameters of each checkpoint, and which cannot be used."""
    states, found = {}, []
    for path in paths(directory):
        try:
            state = load(path)
        except DamagedCheckpointError as error:
            found.append(f"{path}: {error}")
        else:
            states[state.version] = state.parameters
    return states, found


def _others(directory: Path) -> list[str]:
    """Return which other files of a server cannot be used."""
    if not directory.is_dir():
        return []
    known = {segment.path for segment in segments(directory)}
    found = [
        f"{path}: does not begin like a log"
        for path in sorted(directory.glob(LOG_FILES))
        if path not in known
    ]
    try:
        check_lease(directory)
    except InputError as error:
        found.append(str(error))
    return found
