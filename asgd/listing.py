"""Runs on disk at a glance: their state and headline numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from asgd.errors import AsgdError, InputError
from asgd.events import in_words, incidents
from asgd.trace import Run, read_run


def find_runs(directory: str | Path) -> list[Path]:
    """Return the run directories in a directory, repeats of one among them, by name.

    Raises
    ------
    InputError
        There is no such directory.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; `asgd run` makes runs under runs/")
    found = sorted(path.parent for path in directory.rglob("config.json"))
    return [path for path in found if (path / "events.jsonl").is_file()]


def summary(run: Run) -> dict[str, Any]:
    """Return the state and the headline numbers of a run as JSON values.

    Keys: `run`, `state`, `problem`, `workers`, `updates` (applied so far), `of` (updates asked
    for), `updates_per_second`, `mean_staleness`, `loss` (evaluated last) and `grade`, how well the
    geometric law holds according to the stored profile; None where unknown.
    """
    config, trace, loss = run.config, run.trace, run.loss
    problem = config.problem
    seconds = 0.0 if trace.empty else float(trace["applied_seconds"].iloc[-1])
    return {
        "run": str(run.path),
        "state": run.state,
        "problem": problem.kind if problem.dataset is None else problem.dataset,
        "workers": config.cluster.workers,
        "updates": len(trace),
        "of": config.run.updates,
        "updates_per_second": len(trace) / seconds if seconds else None,
        "mean_staleness": None if trace.empty else float(trace["staleness"].mean()),
        "loss": None if loss.empty else float(loss["loss"].iloc[-1]),
        "grade": _stored(run.path / "profile.json", "grade"),
    }


def in_a_line(run: Run) -> str:
    """Return the headline of a run in words; of one that cannot be read, why."""
    try:
        facts = summary(run)
    except AsgdError as error:
        return f"{run.path}: unreadable, {error}"
    words = (
        f"{facts['run']}: {facts['problem']}, {facts['workers']} workers, {facts['state']}, "
        f"{facts['updates']} of {facts['of']} updates"
    )
    numbers = (("mean staleness", facts["mean_staleness"]), ("loss", facts["loss"]))
    return ", ".join(
        [words, *(f"{name} {value:.4g}" for name, value in numbers if value is not None)]
    )


def status(run: Run) -> dict[str, Any]:
    """Return `summary` and more of one run: recent staleness, workers, events.

    Keys beside those of `summary`: `recent_staleness` (the last tenth of the updates),
    `seconds`, `by_worker` (updates of each worker), `losses`, and `events` out of
    the ordinary, in words.
    """
    trace = run.trace
    last = trace.iloc[-max(1, len(trace) // 10) :]
    return {
        **summary(run),
        "recent_staleness": None if trace.empty else float(last["staleness"].mean()),
        "seconds": None if trace.empty else float(trace["applied_seconds"].iloc[-1]),
        "by_worker": {
            str(worker): int(count) for worker, count in trace.groupby("worker").size().items()
        },
        "losses": run.loss["loss"].tolist(),
        "events": [in_words(event) for event in incidents(run.events)],
    }


def list_runs(directory: str | Path) -> list[dict[str, Any]]:
    """Return the summary of each run in a directory; of one that cannot be read, why."""
    rows = []
    for path in find_runs(directory):
        try:
            rows.append(summary(read_run(path)))
        except AsgdError as error:
            rows.append({"run": str(path), "state": "unreadable", "reason": str(error)})
    return rows


def _stored(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError):
        return None
