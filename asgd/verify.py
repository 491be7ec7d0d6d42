"""Whether the record of a run is what was written, and can be what happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256

import numpy as np

from asgd.arrays import Array
from asgd.errors import AsgdError
from asgd.problems import make_problem
from asgd.rundir.columns import LOSS, MEMBERS, SHARED, TABLES, TRACE
from asgd.rundir.parts import most_rows, parts_of
from asgd.rundir.reader import Run
from asgd.rundir.tables import check_digests, read_table
from asgd.simulation.replay import replay
from asgd.stored_json import read_json

_TOLERANCE = 1e-6  # of a replay: another machine may add up in another order


def record_findings(run: Run) -> list[str]:
    """Return what is wrong with the files of a run, and with what they say, a line each."""
    found = _file_findings(run)
    damaged = [
        finding
        for table in TABLES
        for path in parts_of(run.path / table)
        for finding in _refusal(
            lambda: read_table(path, TABLES[table], most_rows(run.config, table))  # noqa: B023
        )
    ]
    tables = [lambda: run.trace, lambda: run.members, lambda: run.loss]
    if not damaged:  # each of them would say of one part again what is said of all
        damaged = [finding for read in tables for finding in _refusal(read)]
    if not damaged and not found:
        found = [*_end_findings(run), *_gradient_findings(run), *_clock_findings(run)]
    return [*found, *damaged]


def replay_findings(
    run: Run, states: Mapping[int, Array], progress: Callable[[float], None] | None = None
) -> list[str]:
    """Return where a replay of the updates gives something else than a run has on record.

    Parameters
    ----------
    run
        The run, whose record has no other fault.
    states
        Parameters of checkpoints, by the updates applied.
    progress
        Called with the share that is done.

    Raises
    ------
    InputError
        The problem cannot be made.
    """
    problem = make_problem(run.config)
    norms = run.trace["gradient_norm"].to_numpy()
    losses = dict(zip(run.loss["update"].tolist(), run.loss["loss"].tolist(), strict=True))
    found: dict[str, str] = {}

    def compare(what: str, update: int, recorded: object, replayed: object) -> None:
        if not np.allclose(recorded, replayed, _TOLERANCE, _TOLERANCE, equal_nan=True):  # type: ignore[arg-type]
            finding = f"{run.path}: after update {update} the {what} of a replay differ"
            if what != "parameters":
                finding += f"s: {replayed:.6g}, on record is {recorded:.6g}"
            found.setdefault(what, finding)

    with np.errstate(over="ignore", invalid="ignore"):
        for step in replay(run, problem):
            update = step.update
            if update:
                compare("norm of the gradient", update, norms[update - 1], step.gradient_norm)
            if update in losses:
                compare("loss", update, losses[update], float(problem.loss(step.parameters)))
            if update in states:
                compare("parameters", update, states[update], step.parameters)
            if progress is not None and not update % 100:
                progress(update / max(len(norms), 1))
    return list(found.values())


def _file_findings(run: Run) -> list[str]:
    """Return what is wrong with the files that are no tables of the run."""
    stored = [
        run.path / name
        for name in ("profile.json", "prediction.json")
        if (run.path / name).exists()
    ]
    prediction = run.path / "prediction.parquet"
    found = [finding for path in stored for finding in _refusal(lambda: read_json(path))]  # noqa: B023
    if prediction.exists():
        found += _refusal(lambda: check_digests(prediction))
    found += _refusal(lambda: run.environment)
    refused = _refusal(lambda: run.events)
    if refused:
        return [*found, *refused]
    start = next((event for event in run.events if event["event"] == "start"), {})
    digests = start.get("sha256")
    if not isinstance(digests, dict):
        return found
    for name in ("config.json", "environment.json"):
        path = run.path / name
        if path.is_file() and sha256(path.read_bytes()).hexdigest() != digests.get(name):
            found.append(f"{path}: is not what the run began with")
    return found


def _end_findings(run: Run) -> list[str]:
    """Return whether a run that says it is finished ends where it should."""
    reached, updates = len(run.trace), run.config.run.updates
    if run.state != "finished" or reached == updates:
        return []
    return [f"{run.path / TRACE}: finished, but {reached} of {updates} updates are on record"]


def _gradient_findings(run: Run) -> list[str]:
    """Return of which worker a gradient was applied twice, or never and nothing says so.

    A restored server hands numbers out again: from these on, what older events say does not count.
    """
    trace, members, found = run.trace, run.members, []
    shared = trace["update"][trace["worker"] == SHARED]
    alone = np.setxor1d(shared, members["update"])
    if len(alone):
        found.append(f"{run.path / MEMBERS}: update {alone[0]} is a mean here or in the trace only")
    unused: list[tuple[int, int]] = []
    for event in run.events:
        if event["event"] in ("gradient_lost", "gradient_rejected"):
            unused.append((event.get("worker", -1), event.get("sequence", -1)))
        elif event["event"] == "server_restored":
            again = event.get("sequences", {})
            unused = [(w, s) for w, s in unused if s < again.get(str(w), 0)]
    tables = (trace[trace["worker"] != SHARED], members)
    worker = np.concatenate([*(table["worker"] for table in tables), [w for w, _ in unused]])
    sequence = np.concatenate([*(table["sequence"] for table in tables), [s for _, s in unused]])
    order = np.lexsort((sequence, worker))
    worker, sequence = worker[order], sequence[order]
    starts = np.searchsorted(worker, worker)
    wrong = np.flatnonzero(sequence != np.arange(len(worker)) - starts)
    if len(wrong):
        row = wrong[0]
        found.append(
            f"{run.path / TRACE}: of worker {worker[row]:.0f}, gradient "
            f"{row - starts[row]} was applied or reported twice, or never"
        )
    return found


def _clock_findings(run: Run) -> list[str]:
    """Return where a loss has another time than the update it is of."""
    update, seconds = run.loss["update"].to_numpy(), run.loss["seconds"].to_numpy()
    applied = np.concatenate([[0.0], run.trace["applied_seconds"].to_numpy()])
    there = update < len(applied)  # a run at work may have gone on meanwhile
    wrong = np.flatnonzero(seconds[there] != applied[update[there]])
    if not len(wrong):
        return []
    return [f"{run.path / LOSS}: the loss after update {update[wrong[0]]} has another time than it"]


def _refusal(read: Callable[[], object]) -> list[str]:
    """Return why something cannot be read."""
    try:
        read()
    except AsgdError as error:
        return [str(error)]
    return []
