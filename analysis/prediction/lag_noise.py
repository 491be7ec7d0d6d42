"""The noise of random lags around a mean path, from servers whose reads are drawn (ours).

Random lags do two things to a deviation from the mean path. They push it, because an update applies
the gradient of a random version:

    delta' = delta - eta (pull - E pull),   pull = A delta_r + grad f(mean path at r)           (F3)

with r the version read. And they amplify every push, because the response psi to it is itself
random: sum_k E psi_k^2 exceeds sum_k (E psi_k)^2. Both follow from reads alone, so they take a few
hundred drawn servers but no gradient beyond those of the mean path.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from analysis.exact.given_reads import Reads, independent_reads
from asgd.arrays import Array, Integers
from asgd.staleness.law import StalenessLaw
from asgd.streams import stream

SERVERS, _FEWEST = 400, 50  # servers drawn for a prediction; the fewest, for wide laws
_LARGEST_STATE = 2**19  # slots of all servers together; each holds a deviation by mode
WIDE_DIM = 10_000  # above this dimension fewer vectors are drawn and kept
# Gradients kept over a run; for its first versions a third as many are kept in addition.
_KEPT, _KEPT_WIDE = 128, 30
_LEAST_VARIANCE = 1e-10
_STEPS = 12  # steps at which the amplification is computed; it is smooth between them


@dataclass(frozen=True)
class DrawnReads:
    """The reads of a few servers, kept to be followed many times.

    Attributes
    ----------
    read, write
        The slot that each update reads, and the one that receives its new point; shape
        (updates, servers). All slots hold x_0 at first.
    slots
        Number of slots of a server.
    start_up
        Updates after which reads no longer depend on the start.
    """

    read: Integers
    write: Integers
    slots: int
    start_up: int

    @classmethod
    def of(cls, reads: Reads, updates: int, start_up: int) -> DrawnReads:
        """Draw the reads of `updates` updates and of as many after the start-up."""
        kept = np.empty((2, updates + start_up, reads.runs), np.min_scalar_type(reads.slots))
        for k, (read, write) in enumerate(islice(reads.turns, updates + start_up)):
            kept[0, k], kept[1, k] = read, write
        return cls(kept[0], kept[1], reads.slots, start_up)

    @classmethod
    def independent(cls, law: StalenessLaw, updates: int, seed: int) -> DrawnReads:
        """Draw independent lags of a law."""
        start_up = min(law.support_length(), updates)
        rng = stream(seed, "reads/iid")
        reads = independent_reads(law, updates + start_up, servers(start_up), rng)
        return cls.of(reads, updates, start_up)

    @property
    def servers(self) -> int:
        """Number of servers."""
        return int(self.read.shape[1])

    def deviations(self, step: Array, gradients: Array) -> Array:
        """Return the deviations of every server from the mean path, (F3), by mode.

        Parameters
        ----------
        step
            Learning rate times curvature of each mode, shape (n,).
        gradients
            Learning rate times grad f on the mean path, by version and mode, shape (k, n).

        Returns
        -------
        Array
            At version k, mean zero, shape (servers, n).
        """
        server = np.arange(self.servers)
        delta = np.zeros((self.servers, len(step)))
        held = np.zeros((self.servers, self.slots, len(step)))
        version = np.zeros((self.servers, self.slots), dtype=np.int64)
        for k in range(len(gradients)):
            read, write = self.read[k], self.write[k]
            pull = step * held[server, read] + gradients[version[server, read]]
            delta -= pull - pull.mean(axis=0)
            held[server, write], version[server, write] = delta, k + 1
        return delta

    def amplification(self, step: Array, lags: Integers) -> tuple[Array, Array]:
        """Return sum_{i<m} E psi_i^2 / sum_{i<m} (E psi_i)^2 and its standard error.

        One for constant lags; infinite, for large m, from the mean-square limit on.

        Parameters
        ----------
        step
            Learning rate times curvature, shape (...).
        lags
            Ascending m, shape (q,); the ratio is one at 0.

        Returns
        -------
        tuple of Array
            Shape (q, ...) each.
        """
        grid = np.linspace(min(0.0, step.min()), max(0.0, step.max()), _STEPS)
        ratio, error = self._amplification(grid, lags)
        columns = [[np.interp(step, grid, row) for row in table] for table in (ratio, error)]
        return np.array(columns[0]), np.array(columns[1])

    def _amplification(self, step: Array, lags: Integers) -> tuple[Array, Array]:
        server = np.arange(self.servers)
        psi = np.ones((self.servers, len(step)))
        held = np.zeros((self.servers, self.slots, len(step)))
        held[server, self.write[self.start_up - 1]] = 1.0
        squares, of_mean = np.zeros_like(psi), np.zeros(len(step))
        ratio, error = np.ones((len(lags), len(step))), np.zeros((len(lags), len(step)))
        row = 0
        for m in range(int(lags[-1]) + 1):
            while row < len(lags) and lags[row] == m:
                if m > 0:
                    ratio[row] = squares.mean(axis=0) / of_mean
                    error[row] = squares.std(axis=0) / np.sqrt(self.servers) / of_mean
                row += 1
            squares += psi**2
            of_mean += psi.mean(axis=0) ** 2
            k = self.start_up + m
            if k < len(self.read):
                psi = psi - step * held[server, self.read[k]]
                held[server, self.write[k]] = psi
        return ratio, error


def servers(slots: int) -> int:
    """Return the number of servers to draw, each with `slots` slots."""
    return int(np.clip(_LARGEST_STATE // slots, _FEWEST, SERVERS))


class GradientPath:
    """grad f along the mean path; versions between those kept are interpolated.

    Parameters
    ----------
    last
        The last version.
    dim
        d; if it is large, fewer gradients are kept.
    """

    def __init__(self, last: int, dim: int) -> None:
        kept = _KEPT if dim <= WIDE_DIM else _KEPT_WIDE
        spaced = np.geomspace(1, max(last, 1), kept).round().astype(np.int64)
        self._wanted = {*spaced.tolist(), *range(kept // 3)}
        self._versions: list[int] = []
        self._gradients: list[Array] = []

    def add(self, version: int, gradient: Array) -> None:
        """Take the gradient of the next version."""
        if version in self._wanted:
            self._versions.append(version)
            self._gradients.append(gradient)

    def components(self, vectors: Array, versions: int) -> Array:
        """Return the components along vectors (m, d) of versions 0, 1, ..., shape (versions, m)."""
        kept = np.array(self._gradients) @ vectors.T
        wanted = np.arange(versions)
        return np.stack([np.interp(wanted, self._versions, column) for column in kept.T], axis=1)

    def leading(self, count: int) -> Array:
        """Return up to `count` orthonormal directions in which the gradient varies most, (r, d)."""
        gradients = np.array(self._gradients)
        changes = gradients - gradients.mean(axis=0)
        variance, weights = np.linalg.eigh(changes @ changes.T)
        used = np.flatnonzero(variance > _LEAST_VARIANCE * variance[-1])[-count:]
        rows = weights[:, used].T @ changes
        return np.asarray(rows / np.linalg.norm(rows, axis=1)[:, None])
