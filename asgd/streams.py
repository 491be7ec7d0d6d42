"""Named independent random streams from one seed.

Two kinds. `stream` is an ordinary generator for one purpose. `KeyedStream` is a generator for
every address (worker, number): what is drawn there depends on the seed and the address alone.
"""

from __future__ import annotations

import zlib

import numpy as np


def _seed_sequence(seed: int, name: str) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()),))


def stream(seed: int, name: str) -> np.random.Generator:
    """Return the generator called `name`, independent of every other name under the same seed."""
    return np.random.Generator(np.random.SFC64(_seed_sequence(seed, name)))


class KeyedStream:
    """Independent generators addressed by (worker, number, variant), counter-based.

    Philox maps (key, counter) to random bits. The key comes from the seed and the name; the upper
    three words of the 256-bit counter are (variant, number, worker), so each address owns 2**66
    words of 64 bits.
    """

    def __init__(self, seed: int, name: str) -> None:
        self._bits = np.random.Philox(_seed_sequence(seed, name))
        self._generator = np.random.Generator(self._bits)
        self._state = self._bits.state  # a copy, with nothing buffered: only its counter changes

    def at(self, worker: int, number: int, variant: int = 0) -> np.random.Generator:
        """Return the generator at the start of its draws for this address.

        The object returned is shared: it is valid until the next call.
        """
        self._state["state"]["counter"][:] = (0, variant, number, worker)
        self._bits.state = self._state
        return self._generator
