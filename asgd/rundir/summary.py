"""Runs on disk at a glance: their state, headline numbers, and tables of these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asgd.console.live import sparkline
from asgd.errors import AsgdError, InputError
from asgd.rundir.alive import look_for_life
from asgd.rundir.events import in_words, incidents
from asgd.rundir.outline import Outline, outline
from asgd.rundir.parts import LOSS
from asgd.rundir.reader import Run, read_run
from asgd.stored_json import read_json


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


def standing(run: Run) -> tuple[str, str]:
    """Return the state of a run, and what is behind it in words.

    "finished", "interrupted" and "failed" are what the run recorded of its end, "running" has
    lately given a sign of life, "stopped" never said so but its process is gone, and "unknown"
    has given none for long, from a host that cannot be looked into.
    """
    recorded, sign = run.state, look_for_life(run.path)
    alive = sign is not None and sign.presence in ("here", "elsewhere")
    if recorded == "finished" or (recorded != "unfinished" and not alive):
        return recorded, run.failure or ""
    if sign is None:
        return recorded, "gives no sign of life"
    heard = f"process {sign.pid} on {sign.host}, last sign of life {_ago(sign.age)} ago"
    if sign.presence == "gone":
        return "stopped", f"without saying so, the process is gone: {heard}"
    if sign.presence != "here":
        heard = f"{heard}; more cannot be known from this host"
    return "running" if alive else "unknown", heard


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def summary(run: Run) -> dict[str, Any]:
    """Return the state and the headline numbers of a run as JSON values.

    Keys: `run`, `state` and `detail` (see `standing`), `problem`, `workers`, `updates` (applied so
    far), `of` (updates asked for), `updates_per_second`, `mean_staleness`, `loss` (evaluated last)
    and `grade`, how well the geometric law holds according to the stored profile; None where
    unknown.
    """
    return _summary(run, outline(run))


def _summary(run: Run, found: Outline) -> dict[str, Any]:
    config, loss = run.config, run.last_row(LOSS)
    problem = config.problem
    state, detail = standing(run)
    return {
        "run": str(run.path),
        "state": state,
        "detail": detail,
        "problem": problem.kind if problem.dataset is None else problem.dataset,
        "workers": _workers(run),
        "updates": found.updates,
        "of": config.run.updates,
        "updates_per_second": found.updates / found.seconds if found.seconds else None,
        "mean_staleness": found.mean_staleness,
        "loss": None if loss is None else float(loss["loss"]),
        "grade": _grade(run),
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
    found = outline(run)
    return {
        **_summary(run, found),
        "recent_staleness": found.recent_staleness,
        "seconds": found.seconds,
        "by_worker": {str(worker): count for worker, count in found.by_worker.items()},
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


def runs_table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return what `list_runs` found as a table of text, heads first."""
    heads = ("run", "state", "problem", "workers", "updates", "updates/s", "staleness", "loss")
    table: list[tuple[str, ...]] = [heads]
    for row in rows:
        if row["state"] == "unreadable":
            table.append((row["run"], "unreadable", *[""] * 6))
            continue
        updates = f"{row['updates']}/{row['of']}"
        numbers = (row["updates_per_second"], row["mean_staleness"], row["loss"])
        shown = tuple("" if number is None else f"{number:.4g}" for number in numbers)
        table.append(
            (row["run"], row["state"], row["problem"], str(row["workers"]), updates, *shown)
        )
    return table


def status_table(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what `status` found as a table of text: names and values."""
    number = {
        name: "none yet" if value is None else f"{value:.4g}"
        for name, value in found.items()
        if value is None or isinstance(value, (int, float))
    }
    recent = f" mean, {number['recent_staleness']} over the last tenth"
    return [
        ("run", f"{found['run']}, {found['problem']}"),
        ("state", found["state"] + (f": {found['detail']}" if found["detail"] else "")),
        ("updates", f"{found['updates']} of {found['of']}"),
        ("updates/s", number["updates_per_second"]),
        ("staleness", number["mean_staleness"] + (recent if found["updates"] else "")),
        ("loss", f"{number['loss']}  {sparkline(found['losses'])}"),
        ("workers", f"{found['workers']}, {len(found['by_worker'])} have contributed"),
        *(("event", text) for text in found["events"][-10:]),
    ]


def _workers(run: Run) -> int:
    """Return how many workers a run has since the last change of their number."""
    changes = [event for event in run.events if event.get("event") == "workers_changed"]
    return int(changes[-1]["after"]) if changes else run.config.cluster.workers


def _grade(run: Run) -> str | None:
    """Return the grade in the stored profile, None where there is none that can be read."""
    try:
        grade = read_json(run.path / "profile.json").get("grade")
    except InputError:
        return None
    return grade if isinstance(grade, str) else None
