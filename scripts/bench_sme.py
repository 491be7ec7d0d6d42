"""Speed of the SME simulators: python scripts/bench_sme.py [--updates N] [--repeats R].

One scalar SDE, f = x^2, 20 000 paths x 2 000 steps, statistics only, everything in one run. Peers
are timed where they can be imported: diffrax, jax and sdeint by `pip install -e .[bench]`, torchsde
if it is there. Then one line for the closed forms, and one for the prediction of a digits run, as
a share of the machine's matrix-product rate.
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
from analysis.noise import standard_increments
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
            standard_increments(out, rng, two_point=False)

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


def sdeint_euler() -> None:
    """Solve one path with sdeint's Euler, in float64: it has no batches."""
    import sdeint

    times = np.arange(STEPS + 1) * ETA
    sdeint.itoEuler(lambda y, t: -2 * y, lambda y, t: 2 * ETA**0.5, 1.0, times)


def torchsde_euler(dtype: np.dtype) -> Callable[[], object]:
    """Return torchsde's Euler on the same batch, moments from the paths it keeps."""
    import torch
    import torchsde

    class Equation(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return -2 * y

        def g(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.full_like(y, 2 * ETA**0.5)

    precision = getattr(torch, dtype.name)
    start = torch.ones((PATHS, 1), dtype=precision)
    times = torch.arange(STEPS + 1, dtype=precision) * ETA

    def solve() -> object:
        with torch.no_grad():
            y = torchsde.sdeint(Equation(), start, times, dt=ETA, method="euler")
            return y.mean(dim=1), (y * y).mean(dim=1)

    return solve


GAUSSIAN, TWO_POINT = "SME-ASGD, Gaussian", "SME-ASGD, two-point"


def scalar_table(repeats: int) -> None:
    print(
        f"scalar SDE, {PATHS} paths x {STEPS} steps, best of {repeats}, in million path-steps "
        "per second and per processor-second (which a busy machine disturbs less)"
    )
    for dtype in (np.dtype(np.float64), np.dtype(np.float32)):
        rows: dict[str, Callable[[], object]] = {
            "bare normals": lambda dtype=dtype: bare_normals(dtype),
            f"{GAUSSIAN}, every update": lambda dtype=dtype: ours(dtype, "matrix", 1),
            f"{GAUSSIAN}, every 20th": lambda dtype=dtype: ours(dtype, "matrix", 20),
            f"{TWO_POINT}, every update": lambda dtype=dtype: ours(dtype, "two_point", 1),
            f"{TWO_POINT}, every 20th": lambda dtype=dtype: ours(dtype, "two_point", 20),
        }
        if find_spec("diffrax"):
            rows["diffrax"] = diffrax_euler(dtype)
        if find_spec("jax"):
            rows["jax scan"] = jax_scan(dtype)
        if find_spec("torchsde"):
            rows["torchsde"] = torchsde_euler(dtype)
        work = dict.fromkeys(rows, PATHS * STEPS / 1e6)
        if find_spec("sdeint"):
            rows["sdeint"], work["sdeint"] = sdeint_euler, STEPS / 1e6
        rates = {}
        for name, run in rows.items():
            wall, processor = best_seconds(run, repeats)
            rates[name] = Seconds(work[name] / wall, work[name] / processor)
        print_rates(dtype, rates)


def print_rates(dtype: np.dtype, rates: dict[str, Seconds]) -> None:
    """Print the rates and the ratios between ours and the others; sdeint's is that of float64."""
    print(f"{dtype.name:38s} {'per s':>9s} {'per cpu-s':>10s}")
    for name, (wall, processor) in rates.items():
        print(f"  {name:36s} {wall:9.3f} {processor:10.3f}")
    for every in ("every update", "every 20th"):
        ours = rates[f"{GAUSSIAN}, {every}"]
        pairs = [
            (f"ours / {peer}", ours, rates[peer])
            for peer in ("bare normals", "diffrax", "jax scan", "torchsde", "sdeint")
            if peer in rates
        ]
        pairs.append(("two-point / Gaussian", rates[f"{TWO_POINT}, {every}"], ours))
        for label, one, other in pairs:
            label = f"{label}, {every}"
            print(f"  {label:36s} {one[0] / other[0]:9.2f} {one[1] / other[1]:10.2f}")


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
