"""Speed of the SME simulators: python scripts/bench_sme.py [--updates N] [--repeats R].

One scalar SDE, f = x^2, 20 000 paths x 2 000 steps, statistics only, everything in one run. Peers
are timed where they can be imported (diffrax, sdeint); then one line for the prediction of a
digits run, as a share of the machine's matrix-product rate, and one for the closed forms.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from analysis.ensemble import block_sizes
from analysis.moments import asgd_moments
from analysis.sme import sme_asgd
from analysis.sme_law import sme_law
from asgd.problems.linear import digits
from asgd.problems.scalar import Quadratic
from asgd.staleness import Poisson
from asgd.streams import stream

PATHS, STEPS, ETA, MU = 20_000, 2_000, 0.02, 0.75


class Seconds(NamedTuple):
    """Wall-clock time, and processor time over all threads."""

    wall: float
    processor: float


def best_seconds(function: Callable[[], object], repeats: int) -> Seconds:
    """Return the shortest of several times; the first call is not counted."""
    function()
    wall, processor = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return Seconds(min(wall), min(processor))


def bare_normals(dtype: np.dtype) -> None:
    """Draw the normals of the simulation, and nothing else, in the same blocks and threads."""
    sizes = block_sizes(PATHS, 1)

    def draw(block: int) -> None:
        rng, out = stream(0, f"normals/{block}"), np.empty(sizes[block], dtype)
        for _ in range(STEPS):
            rng.standard_normal(out=out, dtype=dtype.type)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(draw, range(len(sizes))))


def ours(dtype: np.dtype, noise: str, every: int) -> None:
    """Simulate SME-ASGD, X, g and H, with mean, second moment and loss at every few updates."""
    record = np.arange(0, STEPS + 1, every)
    sme_asgd(
        Quadratic(),
        ETA,
        MU,
        STEPS,
        PATHS,
        0,
        noise=noise,  # type: ignore[arg-type]
        record=record,
        quantile_levels=(),
        dtype=dtype,
    )


def diffrax_euler(dtype: np.dtype) -> Callable[[], object]:
    """Return diffrax's Euler on dX = -2 X dt + 2 sqrt(eta) dB, batched state, moments saved."""
    import diffrax
    import jax
    import jax.numpy as jnp
    import lineax

    jax.config.update("jax_enable_x64", True)
    shape = jax.ShapeDtypeStruct((PATHS,), dtype)
    amplitude = jnp.full(PATHS, 2 * ETA**0.5, dtype)

    @jax.jit
    def solve(key: jax.Array) -> jax.Array:
        path = diffrax.UnsafeBrownianPath(shape=shape, key=key)
        drift = diffrax.ODETerm(lambda t, y, args: -2 * y)
        noise = diffrax.ControlTerm(
            lambda t, y, args: lineax.DiagonalLinearOperator(amplitude), path
        )
        solution = diffrax.diffeqsolve(
            diffrax.MultiTerm(drift, noise),
            diffrax.Euler(),
            t0=0.0,
            t1=STEPS * ETA,
            dt0=ETA,
            y0=jnp.ones(PATHS, dtype),
            max_steps=STEPS + 1,
            adjoint=diffrax.DirectAdjoint(),
            saveat=diffrax.SaveAt(
                steps=True, fn=lambda t, y, args: jnp.stack([y.mean(), (y * y).mean()])
            ),
        )
        return solution.ys

    return lambda: solve(jax.random.PRNGKey(0)).block_until_ready()


def jax_scan(dtype: np.dtype) -> Callable[[], object]:
    """Return the same SDE as a loop written by hand."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)

    @jax.jit
    def solve(key: jax.Array) -> jax.Array:
        def step(y: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = y - 2 * ETA * y + 2 * ETA * jax.random.normal(key, y.shape, dtype)
            return y, jnp.stack([y.mean(), (y * y).mean()])

        return jax.lax.scan(step, jnp.ones(PATHS, dtype), jax.random.split(key, STEPS))[1]

    return lambda: solve(jax.random.PRNGKey(0)).block_until_ready()


def sdeint_rate() -> float:
    """Return path-steps per second of sdeint's Euler, one path."""
    import sdeint

    times = np.arange(STEPS + 1) * ETA
    start = time.perf_counter()
    sdeint.itoEuler(lambda y, t: -2 * y, lambda y, t: 2 * ETA**0.5, 1.0, times)
    return STEPS / (time.perf_counter() - start)


def scalar_table(repeats: int) -> None:
    print(
        f"scalar SDE, {PATHS} paths x {STEPS} steps, best of {repeats}, in million path-steps "
        "per second and per processor-second (which a busy machine disturbs less)"
    )
    work = PATHS * STEPS / 1e6
    for dtype in (np.dtype(np.float64), np.dtype(np.float32)):
        rows: dict[str, Callable[[], object]] = {
            "bare normals of NumPy": lambda dtype=dtype: bare_normals(dtype),
            "SME-ASGD, Gaussian, every update": lambda dtype=dtype: ours(dtype, "matrix", 1),
            "SME-ASGD, Gaussian, every 20th": lambda dtype=dtype: ours(dtype, "matrix", 20),
            "SME-ASGD, two-point, every update": lambda dtype=dtype: ours(dtype, "two_point", 1),
            "SME-ASGD, two-point, every 20th": lambda dtype=dtype: ours(dtype, "two_point", 20),
        }
        if find_spec("diffrax"):
            rows["diffrax Euler, every update"] = diffrax_euler(dtype)
        if find_spec("jax"):
            rows["jax scan, every update"] = jax_scan(dtype)
        seconds = {name: best_seconds(run, repeats) for name, run in rows.items()}
        normals = seconds["bare normals of NumPy"]
        print(f"{dtype.name:38s} {'per s':>8s} {'ratio':>6s} {'per cpu-s':>10s} {'ratio':>6s}")
        for name, (wall, processor) in seconds.items():
            print(
                f"  {name:36s} {work / wall:8.1f} {normals.wall / wall:6.2f} "
                f"{work / processor:10.1f} {normals.processor / processor:6.2f}"
            )
    if find_spec("sdeint"):
        print(f"sdeint Euler, one path, float64        {sdeint_rate() / 1e6:8.3f}")


def matmul_rate(dtype: type) -> float:
    """Return floating-point operations per second of the products of a digits prediction."""
    a = np.ones((1_000, 65), dtype)
    b, out = np.ones((65, 1_797), dtype), np.empty((1_000, 1_797), dtype)
    seconds = best_seconds(lambda: [np.matmul(a, b, out=out) for _ in range(20)], 10).wall
    return 20 * 2 * out.size * 65 / seconds


def digits_line(updates: int, repeats: int) -> None:
    problem, paths, whole = digits(), 100, 5_000
    for dtype in (np.float32, np.float64):
        seconds = best_seconds(
            lambda dtype=dtype: sme_law(
                problem,
                0.1,
                Poisson(7.0),
                updates,
                paths,
                0,
                workers=8,
                batch_size=16,
                record=np.arange(0, updates + 1, 25),
                dtype=dtype,
            ),
            repeats,
        ).wall
        operations = updates * paths * 3 * 2 * problem.dim * problem.n_samples
        share = operations / seconds / matmul_rate(dtype)
        print(
            f"digits, pool, {paths} paths, {np.dtype(dtype).name}: {updates} updates "
            f"in {seconds:.2f} s, {whole} in {seconds * whole / updates:.0f} s; "
            f"{operations / seconds / 1e9:.0f} GFlop/s, {100 * share:.0f} % of the product rate"
        )


def closed_form_line(repeats: int) -> None:
    accuracy = 1e-3
    exact = best_seconds(lambda: asgd_moments(Quadratic(), ETA, MU, STEPS), repeats).wall
    sampled = best_seconds(lambda: ours(np.dtype(np.float64), "matrix", 1), repeats).wall
    # the relative standard error of E x^2 over N normal paths is sqrt(2/N)
    needed = sampled * (2 / accuracy**2) / PATHS
    print(
        f"closed form of E x, E x^2 over {STEPS} updates: {1e3 * exact:.2f} ms; Monte Carlo to "
        f"{accuracy:g}: {needed:.1f} s, {needed / exact:.0f} times as long"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=200, help="updates of the digits line")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    scalar_table(arguments.repeats)
    closed_form_line(arguments.repeats)
    digits_line(arguments.updates, min(arguments.repeats, 2))


if __name__ == "__main__":
    main()
