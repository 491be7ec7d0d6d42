"""Tables on disk: they are read as written, and no flipped bit changes a value."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from asgd.rundir.tables import DamagedTableError, Table, Types, read_table, write_table

TYPES: Types = {"update": np.int64, "worker": np.int32, "seconds": np.float64, "model": str}
ROWS = 2000
FLIPS = 600


@pytest.fixture
def columns() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "update": np.arange(ROWS),
        "worker": rng.integers(8, size=ROWS).astype(np.int32),
        "seconds": rng.random(ROWS),
        "model": np.array(["a", "é"], object)[rng.integers(2, size=ROWS)],
    }


@pytest.fixture
def path(tmp_path: Path, columns: dict[str, np.ndarray]) -> Path:
    write_table(tmp_path / "table.parquet", columns, TYPES, ("worker", "model"))
    return tmp_path / "table.parquet"


def test_a_table_is_read_as_it_was_written(path: Path, columns: dict[str, np.ndarray]) -> None:
    found = read_table(path, TYPES, ROWS)
    assert list(found) == list(TYPES)
    for name, column in columns.items():
        np.testing.assert_array_equal(found[name], column)
    with Table(path, TYPES, ROWS) as table:
        assert table.rows == ROWS
        assert list(table.columns("seconds", "worker")) == ["seconds", "worker"]
        np.testing.assert_array_equal(table.columns("worker")["worker"], columns["worker"])
    pd.testing.assert_frame_equal(pd.read_parquet(path), pd.DataFrame(columns))


def test_no_flipped_bit_changes_a_value(path: Path) -> None:
    """Reading the whole file always fails; reading columns fails unless they are unaffected."""
    good, rng = path.read_bytes(), np.random.default_rng(1)
    known = read_table(path, TYPES, ROWS)
    for place in rng.choice(8 * len(good), FLIPS, replace=False).tolist():
        data = bytearray(good)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(DamagedTableError, match=r"table\.parquet: cannot be read"):
            read_table(path, TYPES, ROWS)
        try:
            with Table(path, TYPES, ROWS) as table:
                found = table.columns("update", "worker")
        except DamagedTableError:
            continue
        for name, column in found.items():
            np.testing.assert_array_equal(column, known[name])


@pytest.mark.parametrize("cut", [0, 1, 8, 300])
def test_a_short_file_is_damaged(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:cut])
    for read in (read_table, Table):
        with pytest.raises(DamagedTableError, match="it has no Parquet footer"):
            read(path, TYPES, ROWS)


def test_too_many_rows_are_refused(path: Path) -> None:
    for read in (read_table, Table):
        with pytest.raises(DamagedTableError, match=f"{ROWS} rows, expected at most {ROWS - 1}"):
            read(path, TYPES, ROWS - 1)


@pytest.mark.parametrize("kind", [np.float64, np.int32, str])
def test_a_column_of_another_type_is_refused(path: Path, kind: type) -> None:
    with pytest.raises(DamagedTableError, match="with their types"):
        read_table(path, {**TYPES, "update": kind}, ROWS)


def test_a_table_without_a_digest_is_refused(path: Path, columns: dict[str, np.ndarray]) -> None:
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DamagedTableError, match="it has no digest"):
        read_table(path, TYPES, ROWS)


def test_a_file_name_may_be_invalid_text(tmp_path: Path, columns: dict[str, np.ndarray]) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.parquet"))
    write_table(path, columns, TYPES)
    assert len(read_table(path, TYPES, ROWS)["update"]) == ROWS
    with Table(path, TYPES, ROWS) as table:
        assert table.rows == ROWS
