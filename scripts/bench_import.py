#!/usr/bin/env python3
"""Time and memory to import and inspect logs of millions of rows.

.venv/bin/python scripts/bench_import.py [--rows 10000000] [--profiled 5000000]

Writes the log of a system with 64 workers, four items to a step, in parts: CSV, compressed CSV,
Parquet and JSON lines. Then runs, each in its own process, `asgd import` of each, and `asgd
status`, `profile`, `whatif --cap 2` and `verify` of a record of `--profiled` rows. Prints seconds,
processor seconds and peak memory.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
from bench_long import measure

ROWS = 500_000  # in a part
WORKERS, EACH = 64, 4
COLUMNS = "update=step,read_version=version,worker=client,loss=loss"


def parts(rows: int) -> Iterator[pa.Table]:
    """Yield the log in parts: lags of a negative binomial law."""
    rng = np.random.default_rng(0)
    names = np.array([f"client-{i}" for i in range(WORKERS)])
    for first in range(0, rows, ROWS):
        count = min(ROWS, rows - first)
        step = 1000 + (first + np.arange(count)) // EACH
        version = step - rng.negative_binomial(2, 0.3, count)
        columns = {
            "step": step,
            "version": np.maximum(version, 0),
            "client": names[rng.integers(WORKERS, size=count)],
            "loss": np.round(rng.exponential(1.0, count), 6),
        }
        yield pa.table(columns)


def write(place: Path, kind: str, rows: int) -> Path:
    """Write the log in one format and return its folder."""
    folder = place / kind
    folder.mkdir()
    # In another process, because children would inherit this memory in their peak.
    writer = get_context("spawn").Process(target=write_parts, args=(folder, kind, rows))
    writer.start()
    writer.join()
    return folder


def write_parts(folder: Path, kind: str, rows: int) -> None:
    """Write the parts of the log."""
    for number, table in enumerate(parts(rows)):
        path = folder / f"part-{number}.{kind}"
        if kind == "parquet":
            pq.write_table(table, path)
        elif kind == "jsonl":
            table.to_pandas().to_json(path, orient="records", lines=True)
        elif kind == "csv.gz":
            with gzip.open(path, "wb", compresslevel=1) as file:
                csv.write_csv(table, file)
        else:
            csv.write_csv(table, path)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--profiled", type=int, default=5_000_000)
    options = parser.parse_args()
    asgd = str(Path(sys.executable).with_name("asgd"))
    with tempfile.TemporaryDirectory() as place:
        for kind in ("csv", "csv.gz", "parquet", "jsonl"):
            folder = write(Path(place), kind, options.rows)
            size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            print(f"{options.rows} rows as {kind}: {size:.0f} MB", flush=True)
            out = str(Path(place) / f"from-{kind}")
            words = (asgd, "import", str(folder), "--columns", COLUMNS, "--unit", "steps")
            measure(f"asgd import {kind}", *words, "--out", out)
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
        folder = write(Path(place), "parquet", options.profiled)
        record = str(Path(place) / "record")
        words = (asgd, "import", str(folder), "--columns", COLUMNS, "--unit", "steps")
        measure(f"asgd import of {options.profiled}", *words, "--out", record)
        measure("asgd status", asgd, "status", record)
        measure("asgd profile", asgd, "profile", record)
        measure("asgd whatif --cap 2", asgd, "whatif", record, "--cap", "2")
        measure("asgd verify", asgd, "verify", record)


if __name__ == "__main__":
    main()
