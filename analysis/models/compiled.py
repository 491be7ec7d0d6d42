"""Compiled inner loops: paths in one dimension, turns, moments given the reads.

The many short NumPy calls of an update make threads compete for the interpreter lock; these loops
run without it. The first call of one imports numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array, Integers
from asgd.compiled import READ, WRITTEN, compiled


@compiled(WRITTEN, *[READ] * 4, *["float64"] * 3)
def kick(
    x: Array,
    g: Array,
    gamma: Array,
    s: Array,
    z: Array,
    batch: float,
    eta: float,
    amplitude: float,
) -> None:
    """Move x to x - eta g + amplitude (Gamma + s/b)^{1/2} z."""
    kind = x.dtype.type
    step, size, share = kind(eta), kind(amplitude), kind(1 / batch)
    for i in range(x.size):
        variance = gamma[i] + share * s[i]
        if variance < 0:  # s is zero up to rounding
            variance = kind(0)
        x[i] += size * np.sqrt(variance) * z[i] - step * g[i]


@compiled(*[WRITTEN] * 2, READ, "float64", "boolean")
def relax(g: Array, gamma: Array, gradient: Array, retention: float, lag_noise: bool) -> None:
    """Move g to r g + (1-r) grad f and Gamma to r Gamma + r (1-r) (grad f - g)^2, by (S4)."""
    kind = g.dtype.type
    r, rest = kind(retention), kind(1 - retention)
    for i in range(g.size):
        distance = gradient[i] - g[i]
        change = rest * distance
        g[i] += change
        if lag_noise:
            gamma[i] = r * (gamma[i] + distance * change)


@compiled(WRITTEN, "Array(uint64, 1, 'C', readonly=True)")
def signs(out: Array, words: npt.NDArray[np.uint64]) -> None:
    """Fill `out` with +-1, one per bit of the words."""
    one = out.dtype.type(1)
    for j in range(words.size):
        word, start = words[j], 64 * j
        for i in range(min(64, out.size - start)):
            out[start + i] = one if (word >> np.uint64(i)) & np.uint64(1) else -one


@compiled(READ, READ, any_order=True)
def moments(x: Array, loss: Array) -> tuple[float, float, float, float]:
    """Return means of x, x^2 and the loss, and the variance of the loss, in float64."""
    total, squares, losses, deviations = 0.0, 0.0, 0.0, 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        total += value
        squares += value * value
        losses += np.float64(loss[i])
    mean = losses / x.size
    for i in range(x.size):
        deviation = np.float64(loss[i]) - mean
        deviations += deviation * deviation
    return total / x.size, squares / x.size, mean, deviations / x.size


@compiled("int64[:, ::1]", *["float64[:, ::1]"] * 2, "int64[:, ::1]")
def choose(ages: Integers, hazard: Array, uniform: Array, slot: Integers) -> None:
    """Choose snapshots of each path with probability proportional to the hazard of their age.

    ages (paths, P), which are updated in place, hazard (P, L), uniform numbers in [0, 1) (updates,
    paths) and the choices (paths, updates). If all hazards are zero, choose the oldest.
    """
    workers, last = hazard.shape[0], hazard.shape[1] - 1
    below = np.empty(workers)
    for path in range(len(ages)):
        for k in range(len(uniform)):
            total, oldest, age_of_oldest = 0.0, 0, ages[path, 0]
            for i in range(workers):
                age = ages[path, i]
                total += hazard[i, min(age, last)]
                below[i] = total
                if age > age_of_oldest:
                    oldest, age_of_oldest = i, age
                ages[path, i] = age + 1
            share, passed = uniform[k, path] * total, 0
            while passed < workers - 1 and below[passed] <= share:
                passed += 1
            slot[path, k] = passed if total > 0 else oldest
            ages[path, slot[path, k]] = 0


@compiled(
    *["float64[:, ::1]"] * 2,
    "Array(float64, 1, 'C', readonly=True)",
    "float64[::1]",
    "int64[::1]",
)
def first_due(due: Array, quantiles: Array, levels: Array, uniform: Array, slot: Integers) -> None:
    """Choose the worker of each path that is due first, and add its next time to its due time.

    due (paths, P), quantiles of the times (P, L) at the levels (L,), uniform numbers in [0, 1) and
    the choice (paths,). On a tie choose the first.
    """
    for path in range(len(due)):
        first = 0
        for i in range(1, due.shape[1]):
            if due[path, i] < due[path, first]:
                first = i
        slot[path] = first
        j = np.searchsorted(levels, uniform[path], side="right")
        share = (uniform[path] - levels[j - 1]) / (levels[j] - levels[j - 1])
        low, high = quantiles[first, j - 1], quantiles[first, j]
        due[path, first] += low + share * (high - low)


@compiled(*["int64[:, ::1]"] * 2, *["float64[:, ::1]"] * 2)
def tally(ages: Integers, slot: Integers, used: Array, visited: Array) -> None:
    """Count used snapshots and all snapshots by worker and age, shape (P, L) each.

    ages (paths, P) before the first of the choices, (paths, updates); they are updated in place.
    """
    last = used.shape[1] - 1
    for path in range(len(ages)):
        for k in range(slot.shape[1]):
            used[slot[path, k], min(ages[path, slot[path, k]], last)] += 1
            for i in range(used.shape[0]):
                visited[i, min(ages[path, i], last)] += 1
                ages[path, i] += 1
            ages[path, slot[path, k]] = 0


@compiled(
    "float64[:, :, ::1]",
    "float64[:, :, :, :, ::1]",
    *["int64[::1]"] * 2,
    *["float64[::1]"] * 2,
    "float64[:, :, ::1]",
)
def read_update(
    mean: Array, cov: Array, read: Integers, write: Integers, pull: Array, kick: Array, own: Array
) -> None:
    """Apply one update to the moments of x, slot 0, and of the snapshots, in place.

    mean (runs, slots, d), cov (runs, slots, slots, d, d); read and write are slots (runs,); pull
    and kick are eta times curvature and offset (d,). `own`, (runs, d, d), is the noise covariance
    of the update on entry and the covariance of the new x on return.
    """
    runs, slots, d = mean.shape
    row = np.empty((slots, d, d))
    for r in range(runs):
        s, w = read[r], write[r]
        for j in range(slots):
            for a in range(d):
                for b in range(d):
                    row[j, a, b] = cov[r, 0, j, a, b] - pull[a] * cov[r, s, j, a, b]
        for a in range(d):
            mean[r, 0, a] += kick[a] - pull[a] * mean[r, s, a]
            for b in range(d):
                own[r, a, b] += row[0, a, b] - row[s, a, b] * pull[b]
        # Rounding leaves an antisymmetric part, which can grow even if the covariance does not.
        for a in range(d):
            mean[r, w, a] = mean[r, 0, a]
            for b in range(a + 1):
                even = (own[r, a, b] + own[r, b, a]) / 2
                own[r, a, b] = own[r, b, a] = even
                row[0, a, b] = row[0, b, a] = row[w, a, b] = row[w, b, a] = even
        for j in range(slots):
            for a in range(d):
                for b in range(d):
                    cov[r, 0, j, a, b] = cov[r, w, j, a, b] = row[j, a, b]
                    cov[r, j, 0, b, a] = cov[r, j, w, b, a] = row[j, a, b]


@compiled("float64[:, ::1]", "int64[:, ::1]", "int64[::1]")
def first_come(arrival: Array, since: Integers, slot: Integers) -> None:
    """Choose the snapshot of each path whose gradient arrives first; on a tie the oldest.

    arrival and since (the update after which each snapshot was read), (paths, P); choice (paths,).
    """
    for path in range(len(arrival)):
        first = 0
        for i in range(1, arrival.shape[1]):
            if arrival[path, i] < arrival[path, first] or (
                arrival[path, i] == arrival[path, first] and since[path, i] < since[path, first]
            ):
                first = i
        slot[path] = first


@compiled(
    "int64[:, ::1]",
    "float64[:, ::1]",
    "int64[:, ::1]",
    "float64[::1]",
    "Array(float64, 1, 'C', readonly=True)",
    *["Array(int64, 1, 'C', readonly=True)"] * 2,
    "float64[:, ::1]",
    *["float64"] * 2,
    "int64",
    "int64[:, ::1]",
)
def serve(
    heap: Integers,
    arrival: Array,
    since: Integers,
    now: Array,
    times: Array,
    begin: Integers,
    size: Integers,
    drawn: Array,
    dead_time: float,
    service_time: float,
    turn: int,
    slot: Integers,
) -> None:
    """Serve the pushes of each path in order of arrival, on a tie the one that read first.

    heap (workers, the next one first), arrival and since (the update after which each snapshot was
    read), (paths, P), and now, the time until which the server is busy (paths,), are updated in
    place. A number drawn, (updates, paths), becomes the next seconds of worker i by `TimeTable`:
    times, begin and size. slot (paths, updates) receives the workers served.
    """
    workers = arrival.shape[1]
    for path in range(len(arrival)):
        for k in range(len(drawn)):
            i, number = heap[path, 0], drawn[k, path]
            slot[path, k] = i
            if size[i]:
                seconds = times[begin[i] + np.int64(number * size[i])]
            else:
                seconds = times[begin[i]] * number
            now[path] = max(now[path], arrival[path, i]) + service_time
            due = now[path] + seconds + dead_time
            arrival[path, i], since[path, i] = due, turn + k + 1
            place = 0
            while True:
                first, first_due, at = i, due, place
                for child in (2 * place + 1, 2 * place + 2):
                    if child < workers:
                        j = heap[path, child]
                        other = arrival[path, j]
                        if other < first_due or (
                            other == first_due and (since[path, j], j) < (since[path, first], first)
                        ):
                            first, first_due, at = j, other, child
                heap[path, place] = first
                if at == place:
                    break
                heap[path, at] = i
                place = at


@compiled(*["int64[:, ::1]"] * 3)
def use_ranks(order: Integers, rank: Integers, slot: Integers) -> None:
    """Choose the snapshots at ranks by age, 0 for the newest; each becomes the newest.

    order (paths, P), newest first, is updated in place; ranks and choices (paths, updates).
    """
    for path in range(len(order)):
        for k in range(rank.shape[1]):
            used = order[path, rank[path, k]]
            for i in range(rank[path, k], 0, -1):
                order[path, i] = order[path, i - 1]
            order[path, 0] = slot[path, k] = used


@compiled(
    *["Array(int64, 2, 'C', readonly=True)"] * 2,
    *["float64"] * 2,
    "boolean",
    "int64",
    *["float64[::1]"] * 2,
    "float64[:, ::1]",
    "int64[:, ::1]",
    "int64",
    "float64[:, ::1]",
)
def grow(
    read: Integers,
    write: Integers,
    step: float,
    momentum: float,
    aware: bool,
    first: int,
    x: Array,
    v: Array,
    s: Array,
    version: Integers,
    block: int,
    growth: Array,
) -> None:
    """Follow x' = x + v', v' = momentum v - step s_j on paths; log growth of each `block` updates.

    Update k of a path reads slot read[path, k] and writes its new point to slot write[path, k],
    (paths, updates); x and v (paths,), s and the versions held (paths, slots), in place. `aware`
    divides the step by one plus the staleness. Paths are rescaled to x^2 + v^2 + mean s^2 = 1;
    growth (paths, blocks).
    """
    slots, last = s.shape[1], block * growth.shape[1] - 1
    for path in range(len(read)):
        point, speed = x[path], v[path]
        for k in range(last + 1):
            j = read[path, k]
            pull = step * s[path, j]
            if aware:
                pull /= 1.0 + first + k - version[path, j]
            speed = momentum * speed - pull
            point += speed
            j = write[path, k]
            s[path, j] = point
            version[path, j] = first + k + 1
            ends = k % block == block - 1
            if ends or k % 32 == 31:
                squares = 0.0
                for i in range(slots):
                    squares += s[path, i] * s[path, i]
                norm = np.sqrt(point * point + speed * speed + squares / slots)
                if ends or not 1e-100 < norm < 1e100:
                    growth[path, k // block] += np.log(norm)
                    point /= norm
                    speed /= norm
                    for i in range(slots):
                        s[path, i] /= norm
        x[path], v[path] = point, speed


@compiled("Array(int64, 2, 'C', readonly=True)", "int64[:, ::1]", "int64[:, ::1]")
def ages_at_use(read: Integers, version: Integers, age: Integers) -> None:
    """Write the staleness of each update of each path, (paths, updates), versions (paths, P)."""
    for path in range(len(read)):
        for k in range(read.shape[1]):
            j = read[path, k]
            age[path, k] = k - version[path, j]
            version[path, j] = k + 1
