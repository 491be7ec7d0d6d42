"""Parquet files with digests that detect damage to any byte.

The footer of a file contains two SHA-256 digests in hexadecimal: `asgd.pages` covers everything
before the footer; `asgd.footer` covers the rest of the file, with zeros in place of itself. The
files are valid Parquet for any reader.

Reading a whole file checks both digests. Reading a few columns checks the digest of the footer and
the checksums of the pages.

Arrow's threads may outlive a call and free memory while the interpreter exits. Freeing Python's
memory then would abort the process, so they read from buffers allocated by Arrow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from asgd.arrays import Columns
from asgd.errors import InputError
from asgd.rundir.files import replacing

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

Types = Mapping[str, type]  # columns and their types: a NumPy number or str

_NO_DIGEST = b"0" * 64
_PAGES, _FOOTER = "asgd.pages", "asgd.footer"
_NOTE = b"asgd.note"
_END = b"PAR1"
_LENGTH_BYTES = 4  # size of the field before `_END`, the length of the footer
_LONGEST_FOOTER = 1_000_000
_BLOCK_BYTES = 1 << 20
_GROUP_ROWS = 1 << 17


class DamagedTableError(InputError):
    """A table file is damaged, or is a different table."""


def write_table(
    path: Path,
    columns: Mapping[str, Any],
    types: Types,
    repetitive: tuple[str, ...] = (),
    *,
    note: bytes | None = None,
    flush: bool = False,
) -> None:
    """Write columns of equal length, as `write_pieces` does."""
    noted = None if note is None else lambda: note
    write_pieces(path, [columns], types, repetitive, note=noted, flush=flush)


def write_pieces(
    path: Path,
    pieces: Iterable[Mapping[str, Any]],
    types: Types,
    repetitive: tuple[str, ...] = (),
    *,
    note: Callable[[], bytes] | None = None,
    flush: bool = False,
) -> None:
    """Write a table from pieces; only a few are in memory at a time.

    Parameters
    ----------
    path
        The file.
    pieces
        The rows in order: columns of equal length by name.
    types
        The columns and their types.
    repetitive
        The columns that get a dictionary, which costs time.
    note
        Called after the last piece; its result is stored as `Table.note`.
    flush
        As in `replacing`.
    """
    import pyarrow.parquet as pq

    schema = _schema(types)
    with (
        replacing(path, flush=flush) as file,
        pq.ParquetWriter(
            file,
            schema,
            use_dictionary=list(repetitive),
            write_page_checksum=True,
            store_schema=False,
        ) as writer,
    ):
        for group in _groups(pieces, types, schema):
            writer.write_table(group)
        metadata = dict.fromkeys((_PAGES, _FOOTER), _NO_DIGEST)
        writer.add_key_value_metadata(metadata | ({_NOTE: note()} if note is not None else {}))
        writer.close()
        _seal(file)


def read_table(path: Path, types: Types, most_rows: int) -> Columns:
    """Read all of a table.

    Parameters
    ----------
    path
        The file.
    types
        Its columns and their types, in order.
    most_rows
        Largest accepted number of rows.

    Returns
    -------
    dict
        Each column by name, shape (rows,).

    Raises
    ------
    DamagedTableError
        It cannot be read, is damaged, or has other columns or too many rows.
    """
    pieces = [_empty(types), *read_pieces(path, types, most_rows)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in types}


def read_pieces(path: Path, types: Types, most_rows: int) -> Iterator[Columns]:
    """Read all of a table piece by piece, after checking its digests; as `read_table`."""
    import pyarrow as pa

    with _explained(path), pa.OSFile(os.fsencode(path)) as source:
        _check_whole(source)
        file = _opened(source, types, most_rows)
        for group in range(file.num_row_groups):
            yield _columns(file.read_row_group(group, use_threads=False), types, list(types))


def check_digests(path: Path) -> None:
    """Check the digests of a table, whatever its columns.

    Raises
    ------
    DamagedTableError
        It cannot be read or is damaged.
    """
    import pyarrow as pa

    with _explained(path), pa.OSFile(os.fsencode(path)) as source:
        _check_whole(source)


class Table:
    """A table for reading a few columns without the others.

    Parameters
    ----------
    path, types, most_rows
        As for `read_table`.

    Attributes
    ----------
    path
        The file.
    rows
        Number of rows.
    note
        The note of `write_pieces`, or None.

    Raises
    ------
    DamagedTableError
        As for `read_table`.
    """

    def __init__(self, path: Path, types: Types, most_rows: int) -> None:
        import pyarrow as pa

        self.path, self._types = path, types
        with _explained(path):
            source = pa.OSFile(os.fsencode(path))  # bytes, as a str would have to be UTF-8
            _checked_footer(source)
            self._file = _opened(source, types, most_rows)
        self.rows: int = self._file.metadata.num_rows
        self.note: bytes | None = (self._file.metadata.metadata or {}).get(_NOTE)

    def columns(self, *names: str) -> Columns:
        """Return columns by name, each of shape (rows,)."""
        with _explained(self.path):
            table = self._file.read(list(names), use_threads=False, use_pandas_metadata=False)
            return _columns(table, self._types, list(names))

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close(force=True)


def _check_whole(source: pa.NativeFile) -> None:
    """Check the digests of a file."""
    start, pages = _checked_footer(source)
    source.seek(0)
    if _digest(source, start) != pages:
        raise ValueError("its digest does not match its content")


def _digest(file: BinaryIO | pa.NativeFile, size: int) -> bytes:
    """Return the digest of the next `size` bytes of a file, without reading them all at once."""
    digest = sha256()
    while size and (block := file.read(min(size, _BLOCK_BYTES))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest().encode()


def _groups(
    pieces: Iterable[Mapping[str, Any]], types: Types, schema: pa.Schema
) -> Iterator[pa.Table]:
    """Join small pieces, because each row group costs space in the footer and time to read."""
    import pyarrow as pa

    waiting: list[pa.Table] = []
    for piece in pieces:
        arrays = [
            pa.array(piece[field.name], field.type)
            if types[field.name] is str
            else pa.array(np.asarray(piece[field.name], types[field.name]))
            for field in schema
        ]
        waiting.append(pa.Table.from_arrays(arrays, schema=schema))
        if sum(map(len, waiting)) >= _GROUP_ROWS:
            yield pa.concat_tables(waiting)
            waiting.clear()
    if waiting:
        yield pa.concat_tables(waiting)


def _empty(types: Types) -> Columns:
    return {name: np.empty(0, object if kind is str else kind) for name, kind in types.items()}


def _schema(types: Types) -> pa.Schema:
    import pyarrow as pa

    kinds = {
        name: pa.string() if kind is str else pa.from_numpy_dtype(kind)
        for name, kind in types.items()
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])


def _seal(file: BinaryIO) -> None:
    """Fill in the digests of a complete file."""
    tail = _LENGTH_BYTES + len(_END)
    end = file.seek(-tail, os.SEEK_END)
    start = end - int.from_bytes(file.read(_LENGTH_BYTES), "little")
    file.seek(0)
    pages = _digest(file, start)
    file.seek(start)
    footer = file.read()
    footer = _with_digest(footer, _PAGES, pages)
    footer = _with_digest(footer, _FOOTER, sha256(footer).hexdigest().encode())
    file.seek(start)
    file.write(footer)


def _with_digest(footer: bytes, name: str, digest: bytes) -> bytes:
    place = _place(footer, name)
    return footer[:place] + digest + footer[place + len(digest) :]


def _place(footer: bytes, name: str) -> int:
    """Return the offset of a digest in a footer: its name, two bytes (text, length 64), digest."""
    key = name.encode() + b"\x18\x40"
    place = footer.find(key)
    if place < 0:
        raise ValueError("it has no digest")
    return place + len(key)


def _checked_footer(source: pa.NativeFile) -> tuple[int, bytes]:
    """Check the footer; return its offset and the digest of the pages before it."""
    size, tail = source.size(), len(_END) + _LENGTH_BYTES
    end = source.read_at(tail, size - tail) if size > tail else b""
    length = int.from_bytes(end[:_LENGTH_BYTES], "little")
    start = size - tail - length
    if not end.endswith(_END) or length > _LONGEST_FOOTER or start < len(_END):
        raise ValueError("it has no Parquet footer")
    footer = source.read_at(size - start, start)
    place = _place(footer, _FOOTER)
    stored = footer[place : place + len(_NO_DIGEST)]
    covered = _with_digest(footer, _FOOTER, _NO_DIGEST)
    if sha256(covered).hexdigest().encode() != stored:
        raise ValueError("its digest does not match its footer")
    place = _place(footer, _PAGES)
    return start, footer[place : place + len(_NO_DIGEST)]


def _opened(source: pa.NativeFile, types: Types, most_rows: int) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
    if not file.schema_arrow.equals(_schema(types)):
        raise ValueError(f"expected the columns {', '.join(types)} with their types")
    if file.metadata.num_rows > most_rows:
        raise ValueError(f"{file.metadata.num_rows} rows, expected at most {most_rows}")
    return file


def _columns(table: pa.Table, types: Types, names: list[str]) -> Columns:
    return {
        name: table[name].combine_chunks().to_numpy(zero_copy_only=types[name] is not str)
        for name in names
    }


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn read errors into DamagedTableError with the path and the reason."""
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:  # UnicodeDecodeError is a ValueError
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["?"])[0]
        raise DamagedTableError(f"{path}: cannot be read as part of a run ({reason})") from None
