"""Verifies a run directory, including the server's checkpoints, log and lease."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from asgd.arrays import Array
from asgd.errors import InputError
from asgd.rundir.checkpoint import (
    CHECKPOINTS,
    PARAMETERS,
    DamagedCheckpointError,
    paths,
    version_of,
)
from asgd.rundir.parameters import Reached
from asgd.rundir.parts import reported_losses
from asgd.rundir.reader import Run
from asgd.verify import number_findings, record_findings, replay_findings
from cluster.storage.checkpoint import load
from cluster.storage.lease import LOG_FILES, check_lease
from cluster.storage.write_ahead import segments

_NO_ROWS = 'run.record = "counts" keeps no rows, so nothing was replayed'


@dataclass(frozen=True)
class Verdict:
    """The result of `verify`.

    Attributes
    ----------
    run
        The directory, as text.
    findings
        The faults, one line each.
    checked
        The checks, in words.
    """

    run: str
    findings: list[str]
    checked: str


def verify(
    run: Run, replayed: bool = True, progress: Callable[[float], None] | None = None
) -> Verdict:
    """Check digests, invariants and, optionally, that a replay gives the same parameters.

    Parameters
    ----------
    run
        The run.
    replayed
        Replay the updates, which takes about as long as all gradients of the run.
    progress
        Called with the completed fraction of the replay.
    """
    directory = run.path / CHECKPOINTS
    states, found = _states(directory)
    checkpoints = len(states)
    found += _last_state(run.path / PARAMETERS, states) + _others(directory)
    found += record_findings(run)
    if found:
        return Verdict(str(run.path), found, "")
    updates = run.recorded_updates
    ahead = [update for update in states if update > updates]
    if ahead:
        found.append(f"{run.path}: the parameters of update {ahead[0]} are ahead of the trace")
    checked = f"{updates} updates, {len(run.loss)} losses, {checkpoints} checkpoints"
    gaps = len(reported_losses(run.events))
    if gaps:
        checked += (
            f", {gaps} damaged or missing part{'s' * (gaps > 1)} of losses named in the events"
        )
    if not run.keeps_rows:
        sequences = _last_sequences(run, updates)
        if sequences is None:
            return Verdict(str(run.path), found, f"{checked}; {_NO_ROWS}")
        found += number_findings(run, sequences)
        return Verdict(
            str(run.path), found, f"{checked}; gradients were counted by worker; {_NO_ROWS}"
        )
    if not replayed:
        return Verdict(str(run.path), found, f"{checked}; not replayed")
    try:
        found += replay_findings(run, states, progress)
    except InputError as error:
        return Verdict(str(run.path), found, f"{checked}; not replayed ({error})")
    return Verdict(str(run.path), found, f"{checked}; a replay agrees")


def _last_sequences(run: Run, updates: int) -> dict[int, int] | None:
    """Return each worker's number of gradients in the last state; None if it cannot be compared.

    It can in mode async, if the state is of the last update.
    """
    last = paths(run.path / CHECKPOINTS)[:1]
    if run.config.cluster.mode != "async" or not last or version_of(last[0]) != updates:
        return None
    return load(last[0]).counts.sequence


def _states(directory: Path) -> tuple[dict[int, Array], list[str]]:
    """Return the parameters of each checkpoint, and the faults of unusable ones."""
    states, found = {}, []
    for path in paths(directory):
        try:
            state = load(path)
        except DamagedCheckpointError as error:
            found.append(f"{path}: {error}")
        else:
            states[state.version] = state.parameters
    return states, found


def _last_state(path: Path, states: dict[int, Array]) -> list[str]:
    """Add the last state of a simulated run to the states; return its fault if it is unusable."""
    if not path.exists():
        return []
    try:
        reached = Reached.load(path)
    except DamagedCheckpointError as error:
        return [f"{path}: {error}"]
    states[reached.update] = reached.parameters
    return []


def _others(directory: Path) -> list[str]:
    """Return the faults of the server's other files."""
    if not directory.is_dir():
        return []
    known = {segment.path for segment in segments(directory)}
    found = [
        f"{path}: is not a log: its header is damaged"
        for path in sorted(directory.glob(LOG_FILES))
        if path not in known
    ]
    try:
        check_lease(directory)
    except InputError as error:
        found.append(str(error))
    return found
