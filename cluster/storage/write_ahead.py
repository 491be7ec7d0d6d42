"""The write-ahead log: each update is written to a file before the server answers.

If the process is killed, its writes survive in the page cache. A power failure may lose the last
seconds of updates; the log is then shorter, but not wrong. Checkpoints are flushed to the disk.

The log of a run consists of segments, each started by one incarnation of the server at a version:

    offset  bytes  field
         0     11  magic "ASGD log 1\\n"
        11     20  epoch, version, number of parameters d (u64, u64, u32)
        31      4  CRC-32 of the bytes before it
        35         records, then zeros

    record  bytes  field
         0      4  length of the content
         4      4  CRC-32 of number and content
         8      8  number of the record in its segment: 0, 1, ...
        16         content: an update as `_ROW`, its members, the drawn order, the discarded
                   gradients by their number if there are any, the position of each applied gradient
                   in its epoch, the gradient of d float64 or float32, by its length; or an incident
                   as JSON. The first byte is the kind, the second tells what follows.

All numbers are little-endian. A segment ends at the first record that is torn, damaged or out of
order. Space is allocated in advance, which makes writes cheaper and detects a full disk early.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from asgd.config.tables import LeaseKind, RunConfig
from asgd.rundir.claims import LeaseLostError
from cluster.core.state import OrderState
from cluster.core.update import Entry, Incident, Update
from cluster.storage.lease import LOG_FILES, Lease

LARGEST_DIMENSION = 1000  # durability = "auto" logs problems up to this dimension

_MAGIC = b"ASGD log 1\n"
_HEADER = struct.Struct("<QQI")
_CRC = struct.Struct("<I")
_HEADER_BYTES = len(_MAGIC) + _HEADER.size + _CRC.size
_RECORD = struct.Struct("<IIQ")
_NUMBER = struct.Struct("<Q")
_INCIDENT, _UPDATE, _AFTER_DISCARDED = 0, 1, 2
# An update: kind, which of order and positions follow, members, then the columns of the trace.
_ROW = struct.Struct("<BBIqiqqqiddd")
_MEMBER = struct.Struct("<qiqqid")
_ORDER = struct.Struct("<6Q")
_DISCARDED = struct.Struct("<qiqqqidd")
_COUNT = struct.Struct("<I")
_WITH_ORDER, _WITH_POSITIONS = 1, 2
_SEGMENT_BYTES = 1_000_000


def is_logged(config: RunConfig, dimension: int) -> bool:
    """Whether a run with `dimension` parameters has a log.

    "auto" logs up to 1000 parameters: the log costs the server 3 us per update for one parameter,
    8 us for 1000 (8 MB per 1000 updates) and 31 us for 10 000 (80 MB), as measured by
    `scripts/bench_durability.py`.
    """
    durability = config.run.durability
    return durability == "log" or (durability == "auto" and dimension <= LARGEST_DIMENSION)


class WriteAheadLog:
    """Writes the segments of one incarnation of the server.

    Parameters
    ----------
    directory
        Existing directory of the segments.
    epoch
        The incarnation.
    version
        Updates applied before the first logged one.
    dimension
        Number of parameters.
    checkpoint_every
        Updates between two checkpoints; a new segment begins only at a checkpoint.
    segment_bytes
        Smallest length of a segment before the next one begins.
    lease
        The kind of lease, see `Lease`.

    Raises
    ------
    OSError
        A write fails, or a newer incarnation has taken over when a segment is created; `append`
        raises it too. After a takeover, writes to the old segment are lost.
    """

    def __init__(
        self,
        directory: Path,
        epoch: int,
        version: int,
        dimension: int,
        checkpoint_every: int,
        segment_bytes: int = _SEGMENT_BYTES,
        lease: LeaseKind = "flock",
    ) -> None:
        self._directory = directory
        self._epoch = epoch
        self._dimension = dimension
        self._checkpoint_every = checkpoint_every
        self._segment_bytes = segment_bytes
        self._file = -1
        self._lease = Lease(directory, lease)
        self._begin(version)

    def append(self, entry: Entry) -> None:
        """Write an update or an incident."""
        if isinstance(entry, Incident):
            self._append(bytes([_INCIDENT]), memoryview(msgspec.json.encode(entry.event)))
            return
        number, order = entry.row[0], entry.order
        if self._end >= self._segment_bytes and number % self._checkpoint_every == 0:
            self._begin(number)
        kind = _AFTER_DISCARDED if entry.discarded else _UPDATE
        follows = _WITH_ORDER * (order is not None) | _WITH_POSITIONS * bool(entry.positions)
        fixed = _ROW.pack(kind, follows, len(entry.members), *entry.row)
        if entry.members:
            fixed += b"".join(_MEMBER.pack(*member) for member in entry.members)
        if order is not None:
            fixed += _ORDER.pack(*order.words, order.buffered, order.buffer)
        if entry.discarded:
            fixed += _COUNT.pack(len(entry.discarded))
            fixed += b"".join(_DISCARDED.pack(*row) for row in entry.discarded)
        if entry.positions:
            fixed += struct.pack(f"<{len(entry.positions)}q", *entry.positions)
        self._append(fixed, np.ascontiguousarray(entry.gradient).data.cast("B"))

    def close(self) -> None:
        """Close the segment."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _begin(self, version: int) -> None:
        self.close()
        head = _MAGIC + _HEADER.pack(self._epoch, version, self._dimension)
        path = self._directory / f"log-{self._epoch:06d}-{version:012d}.bin"
        try:
            with self._lease.held(self._epoch):
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except LeaseLostError:
            raise PermissionError("another server has taken over") from None
        self._end = self._allocated = self._number = 0
        self._write(head + _CRC.pack(zlib.crc32(head)))

    def _append(self, fixed: bytes, rest: memoryview) -> None:
        crc = zlib.crc32(rest, zlib.crc32(fixed, zlib.crc32(_NUMBER.pack(self._number))))
        length = len(fixed) + len(rest)
        self._write(_RECORD.pack(length, crc, self._number) + fixed, rest)
        self._number += 1

    def _write(self, *parts: bytes | memoryview) -> None:
        length = sum(map(len, parts))
        if self._end + length > self._allocated:
            size = max(length, self._segment_bytes)
            os.posix_fallocate(self._file, self._end, size)
            self._allocated = self._end + size
        written = os.writev(self._file, parts)
        if written < length:
            raise OSError(f"only {written} of {length} bytes of the log could be written")
        self._end += length


@dataclass(frozen=True)
class Segment:
    """A segment of the log.

    Attributes
    ----------
    path
        The file.
    epoch
        Incarnation that wrote it.
    version
        Updates applied before its first one.
    dimension
        Number of parameters.
    """

    path: Path
    epoch: int
    version: int
    dimension: int

    def entries(self) -> Iterator[Entry]:
        """Yield the entries in order, up to the first that is torn, damaged or out of order."""
        with self.path.open("rb") as file:
            file.seek(_HEADER_BYTES)
            number = 0
            while len(head := file.read(_RECORD.size)) == _RECORD.size:
                length, crc, found = _RECORD.unpack(head)
                if not length or found != number:
                    return
                content = file.read(length)
                if crc != zlib.crc32(content, zlib.crc32(_NUMBER.pack(number))):
                    return
                try:
                    entry = self._entry(content)
                except (struct.error, ValueError):  # msgspec's errors are ValueErrors
                    return
                yield entry
                number += 1

    def _entry(self, content: bytes) -> Entry:
        if content[0] == _INCIDENT:
            return Incident(msgspec.json.decode(content[1:]))
        kind, follows, several, *row = _ROW.unpack_from(content)
        end = _ROW.size + several * _MEMBER.size
        members = tuple(_MEMBER.iter_unpack(content[_ROW.size : end]))
        order = None
        if follows & _WITH_ORDER:
            *words, buffered, buffer = _ORDER.unpack_from(content, end)
            order = OrderState(words, buffered, buffer, None)
            end += _ORDER.size
        discarded: tuple[Any, ...] = ()
        if kind == _AFTER_DISCARDED:
            (count,) = _COUNT.unpack_from(content, end)
            start = end + _COUNT.size
            end = start + count * _DISCARDED.size
            discarded = tuple(_DISCARDED.iter_unpack(content[start:end]))
        positions: tuple[int, ...] = ()
        if follows & _WITH_POSITIONS:
            positions = struct.unpack_from(f"<{max(several, 1)}q", content, end)
            end += 8 * len(positions)
        size = len(content) - end
        if not self.dimension or size not in (4 * self.dimension, 8 * self.dimension):
            raise ValueError(f"{size} bytes for {self.dimension} numbers")
        gradient = np.frombuffer(content, f"<f{size // self.dimension}", self.dimension, end)
        return Update(tuple(row), members, gradient, order, discarded, positions)


def segments(directory: Path) -> list[Segment]:
    """Return the segments with intact headers in a directory, oldest first."""
    found = []
    for path in sorted(directory.glob(LOG_FILES)):
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
        known = head[: -_CRC.size]
        if head.startswith(_MAGIC) and head == known + _CRC.pack(zlib.crc32(known)):
            found.append(Segment(path, *_HEADER.unpack_from(head, len(_MAGIC))))
    return found


def read_log(directory: Path, version: int, end: int | None = None) -> Iterator[Entry]:
    """Yield the entries between two versions, up to the first gap.

    Each incarnation starts at the version it restored; entries of older incarnations after that
    version are ignored. An incident counts only if an update follows it; otherwise the number of
    its gradient is reused.
    """
    found = segments(directory)
    for number, segment in enumerate(found):
        ends = [later.version for later in found[number + 1 :]]
        last = min(ends if end is None else [*ends, end], default=None)
        here = segment.version
        if not number or segment.epoch != found[number - 1].epoch:
            incidents: list[Incident] = []
        for entry in segment.entries():
            if isinstance(entry, Incident):
                incidents.append(entry)
                continue
            if last is not None and here >= last:
                break
            if here == version:
                yield from incidents
                yield entry
                version += 1
            incidents.clear()
            here += 1


def cut_log(directory: Path, version: int) -> None:
    """Remove segments that end before a version."""
    found = segments(directory)
    for number, segment in enumerate(found):
        if any(later.version <= version for later in found[number + 1 :]):
            segment.path.unlink()


def remove_log(directory: Path) -> None:
    """Remove every segment."""
    for path in directory.glob(LOG_FILES):
        path.unlink()
