"""Verifies a run directory: undamaged files, consistent tables, and equal results of a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from asgd.arrays import Array
from asgd.errors import AsgdError, InputError, message_of
from asgd.policy import Policy
from asgd.problems.make import make_problem
from asgd.rundir.columns import COUNTS, DISCARDED, LOSS, MEMBERS, POSITIONS, SHARED, TABLES, TRACE
from asgd.rundir.parts import most_rows, parts_of
from asgd.rundir.problem_record import problem_changes
from asgd.rundir.reader import Run
from asgd.rundir.repair import recorded_updates
from asgd.rundir.tables import check_digests, read_pieces
from asgd.seals import is_sealed
from asgd.shards import has_own_parts
from asgd.simulation.replay import Gradients, replay
from asgd.stored_json import parse_json, read_json

_TOLERANCE = 1e-6  # relative and absolute; another machine may sum in another order


def record_findings(run: Run) -> list[str]:
    """Return the faults in the files and tables of a run, one line each.

    Without rows of updates, gradients are not checked one by one.
    """
    found = _file_findings(run)
    damaged = [
        finding
        for table in TABLES
        for path in parts_of(run.path / table)
        for finding in _refusal(lambda: _read_through(run, path))  # noqa: B023
    ]
    rows: list[Callable[[], object]] = [
        lambda: run.trace,
        lambda: run.members,
        lambda: run.discarded,
        lambda: run.positions,
    ]
    tables: list[Callable[[], object]] = [
        *(rows if run.keeps_rows else [lambda: run.staleness_counts]),
        lambda: run.loss,
        lambda: run.metrics,
        lambda: run.skipped,
    ]
    if not damaged:  # otherwise these checks would repeat the damage of a part
        # Reading the losses also reads the skipped ones; report a fault of these only once.
        damaged = list(dict.fromkeys(finding for read in tables for finding in _refusal(read)))
    if not damaged and not found and run.keeps_rows:
        found = [*_gradient_findings(run), *_policy_findings(run), *_clock_findings(run)]
        if run.config.data.sampling == "epoch":
            found += _position_findings(run)
    if not damaged and not found and not run.keeps_rows:
        complete, updates = recorded_updates(run.path), run.recorded_updates
        if complete < updates:
            found.append(f"{run.path}: gradients of update {complete} are missing; a part was lost")
    return [*found, *damaged]


def replay_findings(
    run: Run, states: Mapping[int, Array], progress: Callable[[float], None] | None = None
) -> list[str]:
    """Return the differences between a replay of the updates and the record.

    Parameters
    ----------
    run
        A run without other findings.
    states
        Parameters of the checkpoints, by version.
    progress
        Called with the completed fraction.

    Raises
    ------
    InputError
        The problem cannot be created, or its code raises.
    """
    problem = make_problem(run.config)
    changes = problem_changes(run, problem)
    if changes:
        return [f"{run.path}: the problem has changed since the run began: {changes}"]
    norms = run.trace["gradient_norm"].to_numpy()
    losses = dict(zip(run.loss["update"].tolist(), run.loss["loss"].tolist(), strict=True))
    found: dict[str, str] = {}

    tolerance = max(_TOLERANCE, 10 * problem.rounding)

    def compare(what: str, update: int, recorded: object, replayed: object) -> None:
        if not np.allclose(recorded, replayed, tolerance, tolerance, equal_nan=True):  # type: ignore[arg-type]
            finding = f"{run.path}: after update {update} the {what} of a replay differ"
            if what != "parameters":
                finding += f"s: {replayed:.6g}, on record is {recorded:.6g}"
            found.setdefault(what, finding)

    update = 0
    with (
        np.errstate(over="ignore", invalid="ignore"),
        threadpool_limits(run.config.cluster.threads_per_worker, user_api="blas"),
        _user_code(lambda: f"update {update}"),
    ):
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


@contextmanager
def _user_code(place: Callable[[], str]) -> Iterator[None]:
    """Turn an exception of the user's problem or rule into an InputError."""
    try:
        yield
    except AsgdError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {message_of(error)}"
        raise InputError(f"the user's code raised after {place()}: {reason}") from error


def _file_findings(run: Run) -> list[str]:
    """Return the faults in files other than tables."""
    stored = [
        run.path / name
        for name in ("profile.json", "prediction.json")
        if (run.path / name).exists()
    ]
    digested = [
        path for name in ("prediction.parquet", COUNTS) if (path := run.path / name).exists()
    ]
    found = [finding for path in stored for finding in _refusal(lambda: read_json(path))]  # noqa: B023
    found += [finding for path in digested for finding in _refusal(lambda: check_digests(path))]  # noqa: B023
    for path in stored if not found else ():
        if not is_sealed(path.read_bytes()):
            found.append(f"{path}: has no digest")
    found += (unusable := _refusal(lambda: run.environment))
    refused = _refusal(lambda: run.events)
    if refused:
        return [*found, *refused]
    events = run.path / "events.jsonl"
    lines = enumerate(events.read_bytes().splitlines(), start=1)
    found += [f"{events}: line {n} has no check" for n, line in lines if not _is_checked(line)]
    known: dict[str, set[str]] = {}
    for event in run.events:
        digests = event.get("sha256") if event["event"] in ("start", "settings_changed") else None
        for name, digest in digests.items() if isinstance(digests, dict) else ():
            known.setdefault(name, set()).add(str(digest))
    for name in ("config.json", *(() if unusable else ("environment.json",))):
        path = run.path / name
        if not known or not path.is_file():
            continue
        if sha256(path.read_bytes()).hexdigest() not in known.get(name, ()):
            found.append(f"{path}: has changed since the run began")
    return found


def _read_through(run: Run, part: Path) -> None:
    table = part.parent.name
    for _ in read_pieces(part, TABLES[table], most_rows(run.config, table)):
        pass


def _is_checked(line: bytes) -> bool:
    """Whether a line of the events has its check, or is torn before it."""
    try:
        parse_json(line)
    except ValueError:
        return b'"check"' not in line
    return is_sealed(line)


def _gradient_findings(run: Run) -> list[str]:
    """Return the first gradient on record twice or not at all, and the first fault of a mean.

    A fault is a mean without members, or the reverse.

    Each gradient was applied or discarded, or an event reports it as lost or refused. A restored
    server reuses sequence numbers, which voids the older events about them. Gradients after the
    last recorded update are ignored, because the tables may not contain them yet.
    """
    trace, members, found = run.trace, run.members, []
    shared = trace["update"][trace["worker"] == SHARED]
    alone = np.setxor1d(shared, members["update"])
    if len(alone):
        found.append(f"{run.path / MEMBERS}: update {alone[0]} is a mean here or in the trace only")
    unused = _unused_gradients(run, len(trace))
    discarded = run.discarded[run.discarded["update"] < len(trace)]
    tables = (trace[trace["worker"] != SHARED], members, discarded)
    worker = np.concatenate([*(table["worker"] for table in tables), [w for w, _ in unused]])
    sequence = np.concatenate([*(table["sequence"] for table in tables), [s for _, s in unused]])
    order = np.lexsort((sequence, worker))
    worker, sequence = worker[order], sequence[order]
    starts = np.searchsorted(worker, worker)
    wrong = np.flatnonzero(sequence != np.arange(len(worker)) - starts)
    if len(wrong):
        row = wrong[0]
        found.append(
            f"{run.path / TRACE}: gradient {row - starts[row]} of "
            f"worker {worker[row]:.0f} was applied, discarded or reported twice, or never"
        )
    return found


def _unused_gradients(run: Run, updates: int) -> list[tuple[int, int]]:
    """Return worker and sequence of each gradient reported as lost or refused before an update."""
    unused: list[tuple[int, int]] = []
    for event in run.events:
        if event["event"] in ("gradient_lost", "gradient_rejected", "state_reset"):
            if event.get("update", -1) >= updates:
                continue
            unused.append((event.get("worker", -1), event.get("sequence", -1)))
        elif event["event"] == "server_restored":
            again = event.get("sequences", {})
            unused = [(w, s) for w, s in unused if s < again.get(str(w), 0)]
    return unused


def number_findings(run: Run, sequences: Mapping[int, int]) -> list[str]:
    """Return the first worker whose gradients in the counts are more or fewer than it delivered.

    Parameters
    ----------
    run
        A run in mode async.
    sequences
        Number of gradients that each worker had delivered or lost at the last update.
    """
    counts = run.staleness_counts
    unused = [worker for worker, _ in _unused_gradients(run, counts.updates)]
    for worker, delivered in sequences.items():
        own = counts.columns["worker"] == worker
        found = sum(int(counts.columns[name][own].sum()) for name in ("updates", "discarded"))
        if found != delivered - unused.count(worker):
            return [
                f"{run.path / COUNTS}: {found} gradients of worker {worker}, expected "
                f"{delivered - unused.count(worker)}"
            ]
    return []


def _policy_findings(run: Run) -> list[str]:
    """Return the first gradient applied although too stale, and the first discarded wrongly."""
    if run.config.cluster.mode == "bounded":
        return []
    oldest, end = Policy.of(run.config.cluster).oldest, len(run.trace)
    applied, discarded = run.trace, run.discarded
    kinds = (
        (TRACE, applied, "applied", applied["staleness"] > oldest),
        # At its end, a run discards the gradients that wait for an update.
        (
            DISCARDED,
            discarded,
            "discarded",
            (discarded["staleness"] <= oldest) & (discarded["update"] < end),
        ),
    )
    found = []
    for name, table, what, wrong in kinds:
        if wrong.any():
            row = table[wrong].iloc[0]
            found.append(
                f"{run.path / name}: update {row['update']:.0f}: a gradient of staleness "
                f"{row['staleness']:.0f} was {what}, but those above {oldest:g} are discarded"
            )
    return found


def _position_findings(run: Run) -> list[str]:
    """Return the first position of an epoch that was used twice, if any."""
    try:
        gradients = Gradients.of(run)
    except InputError as error:
        return [str(error)]
    parts = run.config.cluster.workers if has_own_parts(run.config.data) else 1
    part, first = gradients.worker % parts, gradients.position
    order = np.lexsort((first, part))
    part, first, size = part[order], first[order], gradients.batch_size[order]
    again = np.flatnonzero((np.diff(part) == 0) & (np.diff(first) < size[:-1]))
    if not len(again):
        return []
    row = again[0] + 1
    return [f"{run.path / POSITIONS}: position {first[row]} of part {part[row]} was used twice"]


def _clock_findings(run: Run) -> list[str]:
    """Return the first loss whose time differs from that of its update, if any."""
    update, seconds = run.loss["update"].to_numpy(), run.loss["seconds"].to_numpy()
    applied = np.concatenate([[0.0], run.trace["applied_seconds"].to_numpy()])
    there = update < len(applied)  # a running run may have written more losses meanwhile
    wrong = np.flatnonzero(seconds[there] != applied[update[there]])
    if not len(wrong):
        return []
    first = update[wrong[0]]
    return [f"{run.path / LOSS}: the loss after update {first} has another time than the update"]


def _refusal(read: Callable[[], object]) -> list[str]:
    """Return the reason if a read fails, else nothing."""
    try:
        read()
    except AsgdError as error:
        return [str(error)]
    return []
