"""A vector in shared memory: both sides see the same values, and nothing is left behind."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from cluster.sockets.connection import SocketConnection
from cluster.sockets.shared_memory import create_memory, shared_vector
from cluster.sockets.wire import VectorFormat, WireError
from tests.support.lines import Line, configure


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("dimension", [1, 512, 513, 100_000])
def test_both_sides_see_the_same_values(dimension: int, dtype: str) -> None:
    vectors = VectorFormat(dimension, dtype)
    descriptor = create_memory(vectors)
    one, other = shared_vector(descriptor, vectors), shared_vector(descriptor, vectors)
    os.close(descriptor)
    one[:] = 1.0
    assert (other == 1.0).all()
    other[:] = 2.0
    assert (one == 2.0).all()
    assert one.dtype == dtype


def test_shared_memory_cannot_be_resized() -> None:
    vectors = VectorFormat(1000)
    descriptor = create_memory(vectors)
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)


def test_memory_of_another_size_is_refused() -> None:
    descriptor = create_memory(VectorFormat(1000))
    with pytest.raises(WireError, match="wrong size"):
        shared_vector(descriptor, VectorFormat(2000))
    os.close(descriptor)


def test_shared_memory_is_not_offered_over_tcp() -> None:
    with Line(configure(1, updates=10), "tcp") as line:
        end = line.sockets.endpoint

        class Remote(SocketConnection):
            def _greet(self, endpoint, shared):  # type: ignore[no-untyped-def]
                return super()._greet(endpoint, True)

        with pytest.raises(WireError, match="shared memory needs the local socket"):
            line.meanwhile(lambda: Remote(end, 0))


def test_nothing_is_left_behind() -> None:
    def held() -> tuple[int, set[str]]:
        return len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))

    before = held()
    for _ in range(5):
        with Line(configure(2, updates=30), "shm") as line:
            line.work(0)
            line.work(1)
            line.finish(2)
    del line
    gc.collect()
    descriptors, files = held()
    assert descriptors <= before[0]
    assert files <= before[1] | {f for f in files if "asgd" not in f}
    assert "memfd:asgd" not in Path("/proc/self/maps").read_text()
