"""Logs of other systems, written from a series of known staleness."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from asgd.arrays import Integers

COLUMNS = {"worker": "client_id", "update": "total_agg", "read_version": "version"}
EACH = 8  # items of a step of prime-rl


def frame(staleness: Integers, workers: int = 4) -> pd.DataFrame:
    """Return a table with a row per update and with another system's column names."""
    update = 1000 + np.arange(len(staleness))
    names = [f"client {i % workers}" for i in range(len(staleness))]
    loss = 1.0 / (1 + np.arange(len(staleness)))
    read = update - staleness
    return pd.DataFrame(
        {"total_agg": update, "version": read, "client_id": names, "objective": loss}
    )


def csv(path: Path, staleness: Integers) -> Path:
    frame(staleness).to_csv(path / "log.csv", index=False)
    return path / "log.csv"


def csv_parts(path: Path, staleness: Integers) -> Path:
    """Write compressed parts whose names sort wrongly as text."""
    table = frame(staleness)
    (path / "parts").mkdir()
    for number in range(11):
        rows = table.iloc[number * len(table) // 11 : (number + 1) * len(table) // 11]
        rows.to_csv(path / "parts" / f"part-{number}.csv.gz", index=False)
    return path / "parts"


def parquet(path: Path, staleness: Integers) -> Path:
    frame(staleness).to_parquet(path / "log.parquet")
    return path / "log.parquet"


def json_lines(path: Path, staleness: Integers) -> Path:
    frame(staleness).to_json(path / "log.jsonl", orient="records", lines=True)
    return path / "log.jsonl"


def prime_rl(path: Path, staleness: Integers) -> Path:
    """Write the items of steps; half of the staleness arises in flight."""
    for first in range(0, len(staleness), EACH):
        step = 1001 + first // EACH
        place = path / "outputs" / "rollouts" / f"step_{step}" / "train" / "effective"
        place.mkdir(parents=True)
        lines = [
            _trace(step - 1 - int(stale), step - 1 - int(stale) // 2)
            for stale in staleness[first : first + EACH]
        ]
        for name, some in (("traces.jsonl", lines[:6]), ("traces_1.jsonl", lines[6:])):
            (place / name).write_text("".join(some), encoding="utf-8")
    return path / "outputs"


def _trace(start: int, end: int) -> str:
    policy = {"start": start, "end": end}
    run = {"id": "x", "work": {"policy": policy, "tokens": [1, 2, 3]}}
    return json.dumps({"reward": 1.0, "run": run, "messages": [{"role": "user"}]}) + "\n"


def rollouts(path: Path, staleness: Integers) -> Path:
    lines = [
        json.dumps({"head_version": 7 + i, "tail_version": 7 + i + int(stale), "ids": [0, 1]})
        for i, stale in enumerate(staleness)
    ]
    (path / "rollouts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path / "rollouts.jsonl"


# By format: the function that writes the log, and the columns to name.
ITEMS: dict[str, tuple[Callable[[Path, Integers], Path], dict[str, str]]] = {
    "csv": (csv, COLUMNS | {"loss": "objective"}),
    "csv parts": (csv_parts, COLUMNS),
    "parquet": (parquet, COLUMNS),
    "jsonl": (json_lines, COLUMNS),
    "prime-rl": (prime_rl, {}),
    "rollouts": (rollouts, {}),
}


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def verl(path: Path, steps: int = 60) -> Path:
    name = "training/off_policy/trajectory_staleness"
    return _lines(
        path / "verl.jsonl",
        [
            {
                "step": step,
                "data": {
                    f"{name}/mean": 1.5 + 0.1 * (-1) ** step,
                    f"{name}/max": 3,
                    f"{name}/min": 0,
                    "actor/pg_loss": float("nan") if step == 3 else 1 / (1 + step),
                },
            }
            for step in range(steps)
        ],
    )


def prime_rl_metrics(path: Path, steps: int = 60) -> Path:
    rows: list[dict[str, Any]] = []
    for step in range(steps):  # in several rows, as trackers write it
        rows.append({"step": step, "off_policy/mean": 1.5 + 0.1 * (-1) ** step})
        rows.append({"step": step, "off_policy/max": 3, "time": 2.0})
    return _lines(path / "metrics.jsonl", rows)


def rllib_json(path: Path, steps: int = 60) -> Path:
    key = "diff_num_grad_updates_vs_sampler_policy"
    return _lines(
        path / "result.json",
        [
            {
                "training_iteration": step,
                "learners": {"default_policy": {key: 1.5 + 0.1 * (-1) ** step, "total_loss": 1.0}},
            }
            for step in range(steps)
        ],
    )


def rllib_csv(path: Path, steps: int = 60) -> Path:
    key = "learners/default_policy/diff_num_grad_updates_vs_sampler_policy"
    step = np.arange(steps)
    table = pd.DataFrame({"training_iteration": step, key: 1.5 + 0.1 * (-1.0) ** step})
    table.to_csv(path / "progress.csv", index=False)
    return path / "progress.csv"


MEANS: dict[str, Callable[[Path], Path]] = {
    "verl": verl,
    "prime-rl metrics": prime_rl_metrics,
    "RLlib json": rllib_json,
    "RLlib csv": rllib_csv,
}
