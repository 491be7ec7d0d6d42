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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from asgd.errors import InputError
from asgd.rundir.files import replace_file

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

Types = Mapping[str, type]  # columns and their types: a NumPy number or str
Columns = dict[str, npt.NDArray[Any]]

_NO_DIGEST = b"0" * 64
_PAGES, _FOOTER = "asgd.pages", "asgd.footer"
_END = b"PAR1"
_LENGTH_BYTES = 4  # size of the field before `_END`, the length of the footer
_LONGEST_FOOTER = 1_000_000


class DamagedTableError(InputError):
    """A table file is damaged, or is a different table."""


def write_table(
    path: Path,
    columns: Mapping[str, Any],
    types: Types,
    repetitive: tuple[str, ...] = (),
    *,
    flush: bool = False,
) -> None:
    """Write columns of equal length; only `repetitive` ones get a dictionary, which costs time.

    `flush` is as in `replace_file`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(types)
    arrays = [
        pa.array(columns[field.name], field.type)
        if types[field.name] is str
        else pa.array(np.asarray(columns[field.name], types[field.name]))
        for field in schema
    ]
    content = pa.BufferOutputStream()
    with pq.ParquetWriter(
        content,
        schema,
        use_dictionary=list(repetitive),
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
        writer.add_key_value_metadata(dict.fromkeys((_PAGES, _FOOTER), _NO_DIGEST.decode()))
    replace_file(path, _sealed(bytearray(content.getvalue())), flush=flush)


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
    with _explained(path):
        return _columns(_opened(_whole(path), types, most_rows), list(types), types)


def check_digests(path: Path) -> None:
    """Check the digests of a table, whatever its columns.

    Raises
    ------
    DamagedTableError
        It cannot be read or is damaged.
    """
    with _explained(path):
        _whole(path)


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

    def columns(self, *names: str) -> Columns:
        """Return columns by name, each of shape (rows,)."""
        with _explained(self.path):
            return _columns(self._file, list(names), self._types)

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close(force=True)


def _whole(path: Path) -> pa.NativeFile:
    """Return the content of a file after checking its digests."""
    import pyarrow as pa

    with pa.OSFile(os.fsencode(path)) as file:
        _checked_footer(file)  # of a file of any size, before memory for all of it
    with path.open("rb", buffering=0) as file:
        content = pa.allocate_buffer(os.fstat(file.fileno()).st_size)
        if file.readinto(content) != content.size:
            raise ValueError("it changed while it was read")
    source = pa.BufferReader(content)
    start, pages = _checked_footer(source)
    if sha256(memoryview(content)[:start]).hexdigest().encode() != pages:
        raise ValueError("its digest does not match its content")
    return source


def _schema(types: Types) -> pa.Schema:
    import pyarrow as pa

    kinds = {
        name: pa.string() if kind is str else pa.from_numpy_dtype(kind)
        for name, kind in types.items()
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])


def _sealed(content: bytearray) -> bytes:
    """Fill in the digests."""
    length = int.from_bytes(content[-_LENGTH_BYTES - len(_END) : -len(_END)], "little")
    start = len(content) - len(_END) - _LENGTH_BYTES - length
    for name, covered in ((_PAGES, slice(0, start)), (_FOOTER, slice(start, None))):
        digest = sha256(memoryview(content)[covered]).hexdigest().encode()
        place = start + _place(bytes(content[start:]), name)
        content[place : place + len(digest)] = digest
    return bytes(content)


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
    covered = footer[:place] + _NO_DIGEST + footer[place + len(_NO_DIGEST) :]
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


def _columns(file: pq.ParquetFile, names: list[str], types: Types) -> Columns:
    table = file.read(columns=names, use_threads=False, use_pandas_metadata=False)
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
