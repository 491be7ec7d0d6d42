#!/usr/bin/env python3
"""Counts the flipped bits in the tables of a run that go undetected.

.venv/bin/python scripts/bench_flips.py [--flips 600]

Simulates a run of 20 000 updates. Flips one random bit in each copy of a part of its trace and of
its losses, and reads the copy in three ways: as plain Parquet, with page checksums, and with
digests, as a run is read. Prints how many flips gave wrong values without an error ("silent"), and
the right values without an error ("harmless"). Exit status 1 if a flip is silent with digests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from asgd.config.make import make_config
from asgd.errors import InputError
from asgd.rundir.columns import LOSS_COLUMNS, TRACE_COLUMNS
from asgd.rundir.tables import read_table
from asgd.simulation.simulate import simulate

UPDATES = 20_000
Frame = Callable[[], pd.DataFrame]


def outcome(read: Frame, known: pd.DataFrame) -> str:
    try:
        found = read()
    except (InputError, OSError, ValueError, MemoryError, pa.ArrowException):
        return "noticed"
    return "harmless" if found.equals(known) else "silent"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=600)
    flips = parser.parse_args().flips
    rng, silent = np.random.default_rng(0), 0
    with tempfile.TemporaryDirectory() as place:
        tables = {"problem": {"kind": "quadratic"}, "run": {"updates": UPDATES, "eval_every": 4}}
        run = simulate(make_config(tables), Path(place) / "run")
        for name, types in (("trace", TRACE_COLUMNS), ("loss.parquet", LOSS_COLUMNS)):
            path = next((run / name).glob("part-*"))
            good, known = path.read_bytes(), pd.DataFrame(read_table(path, types, UPDATES))
            ways: dict[str, Frame] = {
                "any reader": lambda path=path: pd.read_parquet(path),
                "checksums": lambda path=path: pd.read_parquet(
                    path, page_checksum_verification=True
                ),
                "digests": lambda path=path, types=types: pd.DataFrame(
                    read_table(path, types, UPDATES)
                ),
            }
            found: dict[str, Counter[str]] = {way: Counter() for way in ways}
            for bit in rng.choice(8 * len(good), flips, replace=False).tolist():
                data = bytearray(good)
                data[bit // 8] ^= 1 << bit % 8
                path.write_bytes(data)
                for way, read in ways.items():
                    found[way][outcome(read, known)] += 1
            for way, counts in found.items():
                print(f"{name}, {flips} flips, {way}: {dict(counts)}")
            silent += found["digests"]["silent"]
    sys.exit(silent > 0)


if __name__ == "__main__":
    main()
