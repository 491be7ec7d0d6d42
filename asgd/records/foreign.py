"""Reads columns of tables that other programs wrote, in batches of bounded size.

Numbers become float64, with nan for missing values; text becomes codes and names. The suffix of the
file tells its compression: .gz, .bz2, .zst, .lz4.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from asgd.arrays import Array
from asgd.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
TEXT = ("worker", "item")  # our columns that hold names

_ROWS = 65_536
_BLOCK_BYTES = 4 << 20
_MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "none"]
_DELIMITER = {".tsv": "\t"}


@dataclass(frozen=True)
class Names:
    """A column of text.

    Attributes
    ----------
    codes
        Index into the names, -1 where there is none, shape (rows,).
    names
        The distinct names.
    """

    codes: npt.NDArray[np.int64]
    names: Sequence[str]

    @classmethod
    def of(cls, values: Iterable[Any]) -> Names:
        """Return the column of these values; None has no name."""
        known: dict[str, int] = {}
        codes = [
            -1 if value is None else known.setdefault(str(value), len(known)) for value in values
        ]
        return cls(np.array(codes, dtype=np.int64), list(known))


Batch = dict[str, Array | Names]


def kind_of(path: Path) -> str:
    """Return the suffix of a file without that of its compression."""
    name = Path(path.stem) if path.suffix in COMPRESSED else path
    return name.suffix.lower()


def batches(path: Path, columns: Mapping[str, str]) -> Iterator[Batch]:
    """Read columns of a CSV, Parquet or JSON-lines file.

    Parameters
    ----------
    path
        The file; its name tells its format and its compression.
    columns
        The column of the file for each of our columns. In JSON and nested Parquet, `a.b` is b
        within a.

    Yields
    ------
    dict
        Our columns, each of shape (rows,), at most some 100 000 rows at once.

    Raises
    ------
    InputError
        The file cannot be read, or a column is missing or does not hold numbers.
    """
    read = {".parquet": _parquet, ".jsonl": _json_lines, ".ndjson": _json_lines}
    with _explained(path):
        yield from read.get(kind_of(path), _csv)(path, columns)


def header(path: Path) -> list[str]:
    """Return the columns of a table; of JSON lines, those of the first line.

    Raises
    ------
    InputError
        The file cannot be read.
    """
    with _explained(path):
        if kind_of(path) == ".parquet":
            import pyarrow.parquet as pq

            schema = pq.ParquetFile(path).schema
            return [schema.column(i).path for i in range(len(schema))]
        if kind_of(path) in (".jsonl", ".ndjson"):
            return list(flat(next(json_objects(path), {})))
        with opened(path) as file:
            line = file.readline(1 << 20).decode("utf-8-sig")
        return next(csv.reader([line], delimiter=_DELIMITER.get(kind_of(path), ",")), [])


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed."""
    with _stream(path) as stream:
        yield io.BufferedReader(stream, _BLOCK_BYTES)


def _stream(path: Path) -> Any:
    import pyarrow as pa

    raw = pa.OSFile(os.fsencode(path))  # bytes, as a str would have to be UTF-8
    codec = COMPRESSED.get(path.suffix)
    return raw if codec is None else pa.CompressedInputStream(raw, codec)


def json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON object of each line.

    Raises
    ------
    ValueError
        A line is not a JSON object, except a last one that is not finished.
    """
    yield from _decoded(path, json.loads, lambda value: isinstance(value, dict))


def flat(value: Mapping[str, Any], prefix: str = "", joint: str = ".") -> dict[str, Any]:
    """Return nested objects as one, with the names joined."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            found |= flat(inner, f"{prefix}{key}{joint}", joint)
        else:
            found[f"{prefix}{key}"] = inner
    return found


def _decoded(
    path: Path, decode: Callable[[bytes], Any], accepted: Callable[[Any], bool]
) -> Iterator[Any]:
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = decode(line)
                good = accepted(value)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):  # being written, or cut off
                    return
                raise ValueError(f"line {number}: {error}") from None
            if not good:
                raise ValueError(f"line {number} is not a JSON object")
            yield value


def _json_lines(path: Path, columns: Mapping[str, str]) -> Iterator[Batch]:
    shape, places = _shape(columns)
    typed = msgspec.json.Decoder(shape).decode

    def decode(line: bytes) -> Any:
        try:
            return typed(line)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:  # such as NaN, which Python writes and JSON forbids
            return msgspec.convert(json.loads(line), shape)

    lines, first = _decoded(path, decode, lambda _: True), True
    while some := list(itertools.islice(lines, _ROWS)):
        batch: Batch = {}
        for name, place in places.items():
            values = [_within(line, place) for line in some]
            if first and all(value is None for value in values):
                _check_columns({name: columns[name]}, header(path), path)
            batch[name] = Names.of(values) if name in TEXT else np.array(values, dtype=float)
        first = False
        yield batch


def _shape(columns: Mapping[str, str]) -> tuple[type[msgspec.Struct], dict[str, list[str]]]:
    """Return a type that decodes only these parts of a JSON object, and the place of each in it."""
    tree: dict[str, Any] = {}
    for name, theirs in columns.items():
        *above, last = theirs.split(".")
        place = tree
        for key in above:
            place = place.setdefault(key, {})
        place[last] = str | int | float | None if name in TEXT else float | None

    def struct(place: Mapping[str, Any]) -> type[msgspec.Struct]:
        fields = [
            (f"f{i}", struct(inner) | None if isinstance(inner, dict) else inner, None)
            for i, inner in enumerate(place.values())
        ]
        return msgspec.defstruct("Line", fields, rename=dict(_fields(place)))

    places: dict[str, list[str]] = {}
    for name, theirs in columns.items():
        place, path = tree, []
        for key in theirs.split("."):
            path.append(next(field for field, known in _fields(place) if known == key))
            place = place[key]
        places[name] = path
    return struct(tree), places


def _fields(place: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the attribute of each key."""
    return [(f"f{i}", key) for i, key in enumerate(place)]


def _within(line: Any, place: Sequence[str]) -> Any:
    for field in place:
        line = None if line is None else getattr(line, field)
    return line


def _csv(path: Path, columns: Mapping[str, str]) -> Iterator[Batch]:
    import pyarrow as pa
    from pyarrow.csv import ConvertOptions, ParseOptions, ReadOptions, open_csv

    _check_columns(columns, header(path), path)
    types = {
        theirs: pa.string() if name in TEXT else pa.float64() for name, theirs in columns.items()
    }
    with _stream(path) as stream:
        reader = open_csv(
            stream,
            ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            ParseOptions(delimiter=_DELIMITER.get(kind_of(path), ",")),
            ConvertOptions(
                include_columns=list(types),
                column_types=types,
                null_values=_MISSING,
                strings_can_be_null=True,
            ),
        )
        for batch in reader:
            yield _converted(batch, columns)


def _parquet(path: Path, columns: Mapping[str, str]) -> Iterator[Batch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check_columns(columns, header(path), path)
    with pa.OSFile(os.fsencode(path)) as source:
        file = pq.ParquetFile(source, pre_buffer=False)
        wanted = sorted(set(columns.values()))
        for batch in file.iter_batches(_ROWS, columns=wanted, use_threads=False):
            table = pa.Table.from_batches([batch])
            while any(pa.types.is_struct(kind) for kind in table.schema.types):
                table = table.flatten()
            yield _converted(table.combine_chunks(), columns)


def _converted(table: Any, columns: Mapping[str, str]) -> Batch:
    """Return columns of an Arrow table as arrays of NumPy."""
    found: Batch = {}
    for name, theirs in columns.items():
        column = table.column(theirs)
        found[name] = _names(column) if name in TEXT else _numbers(column, theirs)
    return found


def _names(column: pa.Array) -> Names:
    import pyarrow as pa

    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    coded = whole.cast(pa.string()).dictionary_encode()
    codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return Names(codes.astype(np.int64), coded.dictionary.to_pylist())


def _numbers(column: pa.Array, name: str) -> Array:
    import pyarrow as pa

    try:
        numbers = column.cast(pa.float64(), safe=False)
    except pa.ArrowException:
        raise ValueError(f"column {name}: {column.type}, expected numbers") from None
    return np.array(numbers.to_numpy(zero_copy_only=False), dtype=float)


def _check_columns(columns: Mapping[str, str], there: Sequence[str], path: Path) -> None:
    for name, theirs in columns.items():
        if theirs not in there:
            hint, shown = did_you_mean(theirs, there), ", ".join(there[:20])
            raise ValueError(f"no column {theirs} for {name}; {hint}it has {shown}")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn read errors into one line with the path and the reason."""
    import pyarrow as pa

    try:
        yield
    except InputError:
        raise
    except (OSError, EOFError, ValueError, csv.Error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["?"])[0]
        raise InputError(f"{path}: cannot be read ({reason})") from None
