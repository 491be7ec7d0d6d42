"""How messages travel: nothing is changed on the way, late answers find their caller."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from cluster.messages import Snapshot, Stop
from cluster.transport import Waiting, decode, encode


@pytest.mark.parametrize("value", [[], [1.5], [np.pi, -0.0, 5e-324, 1.7e308]])
def test_vectors_arrive_as_they_were(value: list[float]) -> None:
    array = np.array(value, dtype=float)
    received = decode(encode(array))
    assert received.tobytes() == array.tobytes()
    assert not received.flags.writeable


def test_strided_vector() -> None:
    array = np.arange(10.0)[::3]
    np.testing.assert_array_equal(decode(encode(array)), array)


def test_snapshot_is_encoded_before_the_server_goes_on() -> None:
    async def scenario() -> bytes:
        waiting = Waiting()
        answer = waiting.expect(0)
        live = np.zeros(3)
        waiting.send([(0, Snapshot(live, 1, 0, 1, 16))])
        live += 1.0
        return bytes((await answer)[0])

    np.testing.assert_array_equal(decode(asyncio.run(scenario())), np.zeros(3))


def test_answer_may_come_long_after_and_to_another_worker() -> None:
    async def scenario() -> list[str]:
        waiting = Waiting()
        answers = [waiting.expect(worker) for worker in range(3)]
        waiting.send([])
        waiting.send([(2, Stop("c")), (0, Stop("a"))])
        waiting.send([(1, Stop("b")), (1, Stop("dropped: nobody waits"))])
        return [(await answer)[0] for answer in answers]

    assert asyncio.run(scenario()) == ["a", "b", "c"]


def test_second_call_of_a_worker_replaces_the_first() -> None:
    async def scenario() -> tuple[bool, str]:
        waiting = Waiting()
        older = waiting.expect(0)
        newer = waiting.expect(0)
        waiting.send([(0, Stop("answer"))])
        return older.cancelled(), (await newer)[0]

    assert asyncio.run(scenario()) == (True, "answer")
