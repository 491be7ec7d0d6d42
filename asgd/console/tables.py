"""Runs on disk as tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asgd.console.live import sparkline
from asgd.rundir.columns import SHARED


def runs_table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the result of `list_runs` as a table of text, starting with the header."""
    heads = ("run", "state", "problem", "workers", "updates", "updates/s", "staleness", "loss")
    table: list[tuple[str, ...]] = [heads]
    for row in rows:
        if row["state"] == "unreadable":
            table.append((row["run"], "unreadable", *[""] * 6))
            continue
        of = row["of"]
        updates = str(row["updates"]) if of is None else f"{row['updates']}/{of}"
        numbers = (row["updates_per_second"], row["mean_staleness"], row["loss"])
        shown = tuple("" if number is None else f"{number:.4g}" for number in numbers)
        table.append(
            (row["run"], row["state"], row["problem"], str(row["workers"]), updates, *shown)
        )
    return table


def status_table(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the result of `status` as a table of names and values."""
    number = {
        name: "none yet" if value is None else f"{value:.4g}"
        for name, value in found.items()
        if value is None or isinstance(value, (int, float))
    }
    by_worker = found["by_worker"]
    known = "" if str(SHARED) in by_worker else f", {len(by_worker)} have contributed"
    recent = f" mean, {number['recent_staleness']} over the last tenth"
    return [
        ("run", f"{found['run']}, {found['problem']}"),
        ("state", found["state"] + (f": {found['detail']}" if found["detail"] else "")),
        ("updates", f"{found['updates']} of {found['of']}"),
        ("updates/s", number["updates_per_second"]),
        ("staleness", number["mean_staleness"] + (recent if found["updates"] else "")),
        ("loss", f"{number['loss']}  {sparkline(found['losses'])}"),
        ("workers", f"{found['workers']}{known}"),
        *(("event", text) for text in found["events"][-10:]),
    ]
