"""Frames: packed values are read back, and other bytes are refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cluster.core.messages import Gradient, Snapshot
from cluster.sockets import wire
from cluster.sockets.wire import HEADER, VectorFormat, WireError

int64 = st.integers(-(2**63), 2**63 - 1)
uint32 = st.integers(0, 2**32 - 1)


def test_layout_is_the_documented_one() -> None:
    buffer = bytearray(HEADER.size)
    wire.pack_push(buffer, wire.push_start(7, 16), Gradient(7, 11, 13, 17, np.zeros(2), 0.25))
    expected = b"ASGD" + bytes([2, 6, 0, 0]) + struct.pack("<II", 7, 0)
    expected += struct.pack("<Qqqqd", 16, 11, 13, 17, 0.25) + bytes(8)
    assert bytes(buffer) == expected
    assert len(expected) == 64


@given(uint32, int64, int64, int64, st.floats(allow_nan=False))
def test_the_header_of_a_gradient_is_read_back(
    worker: int, sequence: int, version: int, epoch: int, seconds: float
) -> None:
    buffer = bytearray(HEADER.size)
    gradient = Gradient(worker, sequence, version, epoch, np.zeros(3), seconds)
    wire.pack_push(buffer, wire.push_start(worker, 24), gradient)
    start, *fields = wire.PUSH_FIELDS.unpack_from(buffer)
    assert start == wire.push_start(worker, 24)
    assert fields == [sequence, version, epoch, seconds]
    frame = wire.parse(buffer)
    assert (frame.kind, frame.length, frame.worker) == (wire.PUSH, 24, worker)
    assert (frame.sequence, frame.version, frame.epoch) == (sequence, version, epoch)
    assert frame.compute_seconds == seconds


@given(uint32, uint32, int64, int64, int64, st.integers(0, 2**64 - 1))
def test_the_header_of_a_snapshot_is_read_back(
    worker: int, batch_size: int, sequence: int, version: int, epoch: int, position: int
) -> None:
    buffer = bytearray(HEADER.size)
    snapshot = Snapshot(np.zeros(3), version, epoch, sequence, batch_size, position)
    wire.pack_snapshot(buffer, wire.snapshot_start(worker), 24, snapshot)
    start, *fields = wire.SNAPSHOT_FIELDS.unpack_from(buffer)
    assert start == wire.snapshot_start(worker)
    assert fields == [batch_size, 24, sequence, version, epoch, position]
    frame = wire.parse(buffer)
    assert (frame.kind, frame.length, frame.worker) == (wire.SNAPSHOT, 24, worker)
    assert (frame.sequence, frame.version, frame.epoch) == (sequence, version, epoch)
    assert (frame.batch_size, frame.position) == (batch_size, position)


@given(st.binary(min_size=64, max_size=200))
def test_other_bytes_are_refused(data: bytes) -> None:
    assume(data[:5] != b"ASGD\x02")
    with pytest.raises(WireError):
        wire.parse(bytearray(data))


def test_another_version_is_named() -> None:
    frame = bytearray(wire.pack(wire.JOIN))
    frame[4] = 1
    with pytest.raises(WireError, match="protocol version 1, expected 2"):
        wire.parse(frame)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0, 4), (1,) * 32])
def test_the_shape_of_a_misfit_is_read_back(shape: tuple[int, ...]) -> None:
    frame = wire.pack_misfit(Gradient(1, 2, 3, 4, np.zeros(shape), 0.5))
    header = wire.parse(bytearray(frame))
    assert (header.kind, header.sequence, header.length) == (wire.MISFIT, 2, len(frame) - 64)
    assert wire.misfit(memoryview(frame)[64:]).shape == shape


def test_huge_misfit_takes_no_memory() -> None:
    assert wire.misfit(memoryview(struct.pack("<Q", 2**50))).strides == (0,)
    for impossible in ((2**62, 2**62), (2**64 - 1,)):
        with pytest.raises(WireError, match="impossible shape"):
            wire.misfit(memoryview(struct.pack(f"<{len(impossible)}Q", *impossible)))


def test_long_text_is_cut() -> None:
    frame = wire.pack_text(wire.STOP, "long " * 1000)
    assert wire.parse(bytearray(frame)).length == wire.LONGEST_TEXT
    assert wire.text(wire.pack_text(wire.STOP, "\u00fc" * 1000)[64:]).startswith("\u00fc")


def test_proofs_depend_on_everything() -> None:
    base = (b"secret", b"worker", b"hello", b"nonce")
    proofs = {wire.proof(*base)}
    for place in range(4):
        changed = list(base)
        changed[place] += b"!"
        proofs.add(wire.proof(*changed))
    assert len(proofs) == 5
    assert {len(p) for p in proofs} == {wire.PROOF_BYTES}


def test_numbers_in_a_frame() -> None:
    buffer = memoryview(bytearray(HEADER.size + 12))
    VectorFormat(3, "float32").view(buffer)[:] = [1.0, 2.0, 3.0]
    assert bytes(buffer[HEADER.size :]) == struct.pack("<3f", 1.0, 2.0, 3.0)


def test_conversion_overflows_to_infinity_silently() -> None:
    narrow = np.empty(2, np.float32)
    wire.copy_vector(narrow, np.array([1e300, 0.1]))
    np.testing.assert_array_equal(narrow, np.array([np.inf, 0.1], np.float32))
