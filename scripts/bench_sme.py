"""Speed of the SME simulators: python scripts/bench_sme.py [scalar] [closed] [prediction].

scalar: one SDE, f = x^2, 20 000 paths x 2 000 steps, statistics only, against diffrax, our own JAX
loop, torchsde, sdeint and the cost of the same normals alone. Install them with
`pip install -e .[bench]` and `pip install torch torchsde`; missing ones are skipped and named.
closed: exact moments against Monte Carlo of the same accuracy. prediction: the loss curve of a
finished digits run, as a share of the machine's matrix-product rate. All parts, which is the
default, take less than four minutes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from analysis.exact.moments import asgd_moments
from analysis.models.memory import block_sizes
from analysis.models.noise import standard_increments
from analysis.models.sme_asgd import sme_asgd
from analysis.prediction.predict import Prediction, predict
from asgd.config.make import make_config
from asgd.problems.scalar import Quadratic
from asgd.rundir.reader import Run, read_run
from asgd.simulation.simulate import simulate
from asgd.streams import stream

PATHS, STEPS, ETA, MU = 20_000, 2_000, 0.02, 0.75
DIGITS_DIM, DIGITS_SAMPLES = 650, 1_797
LONGEST = 4.0  # seconds after which a row is not repeated again


class Seconds(NamedTuple):
    """Wall-clock time, and processor time over all threads."""

    wall: float
    processor: float


def best_seconds(function: Callable[[], object], repeats: int) -> Seconds:
    """Return the shortest of several times; the first call is not counted."""
    function()
    wall, processor = [], []
    while len(wall) < repeats and sum(wall) < LONGEST:
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


def sdeint_euler(dtype: np.dtype) -> Callable[[], object]:
    """Return sdeint's Euler on one path, in float64: it has no batches."""
    import sdeint

    times = np.arange(STEPS + 1) * ETA
    drift, amplitude = (lambda y, t: -2 * y), (lambda y, t: 2 * ETA**0.5)
    return lambda: sdeint.itoEuler(drift, amplitude, 1.0, times)


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


# What has to be importable for a row, its builder, and how many paths it computes.
PEERS: dict[str, tuple[str, Callable[[np.dtype], Callable[[], object]], int]] = {
    "diffrax": ("diffrax", diffrax_euler, PATHS),
    "jax, loop by hand": ("jax", jax_scan, PATHS),
    "torchsde": ("torchsde", torchsde_euler, PATHS),
    "sdeint (float64, one path)": ("sdeint", sdeint_euler, 1),
}


def scalar_table(repeats: int) -> None:
    print(
        f"scalar SDE, {PATHS} paths x {STEPS} steps: million path-steps per second and per "
        "processor-second, which a busy machine disturbs less.\nLast two columns: our Gaussian "
        "rate over that of the row. Moments at every update, except where it says every 20th."
    )
    for dtype in (np.dtype(np.float64), np.dtype(np.float32)):
        print(f"{dtype.name:40s} {'per s':>9s} {'per cpu-s':>9s} {'ours/it':>8s} {'per cpu':>8s}")
        for every in (1, 20):
            label = "every update" if every == 1 else "every 20th"
            gaussian = rate(partial(ours, dtype, "matrix", every), PATHS, repeats)
            print_row(f"SME-ASGD, Gaussian, {label}", gaussian, gaussian)
            signs = rate(partial(ours, dtype, "two_point", every), PATHS, repeats)
            print_row(f"SME-ASGD, two-point, {label}", signs, gaussian)
            print_ratio("  two-point / Gaussian", signs, gaussian)
            if every == 1:
                reference = gaussian
        normals = rate(partial(bare_normals, dtype), PATHS, repeats)
        print_row("the normals alone", normals, reference)
        for name, (module, build, paths) in PEERS.items():
            if find_spec(module):
                print_row(name, rate(build(dtype), paths, repeats), reference)
            else:
                print(f"  {name:38s} not installed")


def rate(function: Callable[[], object], paths: int, repeats: int) -> Seconds:
    """Return million path-steps per second and per processor-second."""
    wall, processor = best_seconds(function, repeats)
    return Seconds(paths * STEPS / wall / 1e6, paths * STEPS / processor / 1e6)


def print_row(name: str, row: Seconds, ours: Seconds) -> None:
    ratios = f"{ours.wall / row.wall:8.2f} {ours.processor / row.processor:8.2f}"
    print(f"  {name:38s} {row.wall:9.2f} {row.processor:9.2f} {ratios}", flush=True)


def print_ratio(name: str, row: Seconds, other: Seconds) -> None:
    print(f"  {name:38s} {row.wall / other.wall:9.2f} {row.processor / other.processor:9.2f}")


def closed_form_line(repeats: int) -> None:
    accuracy = 1e-3
    exact = best_seconds(lambda: asgd_moments(Quadratic(), ETA, MU, STEPS), repeats)
    sampled = best_seconds(lambda: ours(np.dtype(np.float64), "matrix", 1), repeats)
    # the relative standard error of E x^2 over N normal paths is sqrt(2/N)
    wall, processor = (2 / accuracy**2 / PATHS * seconds for seconds in sampled)
    print(
        f"closed form of E x, E x^2 over {STEPS} updates: {1e3 * exact.wall:.2f} ms; Monte Carlo "
        f"to {accuracy:g}: {wall:.1f} s, {wall / exact.wall:.0f} times as long "
        f"({processor / exact.processor:.0f} times the processor time)"
    )


def finished_run(directory: Path, updates: int, kind: str, learning_rate: float) -> Run:
    """Simulate a run of 8 workers with lognormal compute times of variation 0.3."""
    config = {
        "problem": {"kind": kind},
        "optimizer": {"learning_rate": learning_rate, "batch_size": 16},
        "cluster": {
            "workers": 8,
            "compute_time": {"law": "lognormal", "mean": 1.0, "variation": 0.3},
        },
        "run": {"updates": updates, "eval_every": 25},
    }
    return read_run(simulate(make_config(config), directory / kind))


def matmul_rate(dtype: type, rows: int, inner: int, columns: int) -> float:
    """Return floating-point operations per processor-second of a matrix product on one core."""
    a, b = np.ones((rows, inner), dtype), np.ones((inner, columns), dtype)
    out = np.empty((rows, columns), dtype)
    count = max(1, round(2e10 / (2 * rows * inner * columns)))
    with threadpool_limits(1, user_api="blas"):
        seconds = best_seconds(lambda: [np.matmul(a, b, out=out) for _ in range(count)], 5)
    return count * 2 * out.size * inner / seconds.processor


def prediction_lines(updates: int, paths: int) -> None:
    print(f"prediction of finished runs of {updates} updates, 8 workers, batch 16, measured law")
    with tempfile.TemporaryDirectory() as directory:
        digits = finished_run(Path(directory), updates, "softmax", 0.1)
        squares = finished_run(Path(directory), updates, "least_squares", 0.02)
        options = {"models": ["sme_law"], "seed": 1}
        simulation = partial(predict, digits, method="simulate", paths=paths, **options)
        simulated, seconds = timed(simulation)
        fast, fast_seconds = timed(partial(predict, digits, method="fast", **options))
        _, closed_seconds = timed(partial(predict, squares, **options))
    operations = updates * paths * 3 * 2 * DIGITS_DIM * DIGITS_SAMPLES
    rate = operations / seconds.processor
    print(
        f"  digits, {DIGITS_DIM} parameters, {paths} paths: {seconds.wall:.1f} s "
        f"({seconds.processor:.1f} cpu-s), {operations / seconds.wall / 1e9:.0f} GFlop/s, "
        f"{rate / 1e9:.0f} per processor; of the rate of matrix products on one processor"
    )
    for dtype in (np.float32, np.float64):
        large = matmul_rate(dtype, 2_000, 2_000, 2_000)
        own = matmul_rate(dtype, 160, 65, DIGITS_SAMPLES)
        print(
            f"    {100 * rate / large:.0f} % of {dtype.__name__}, large ({large / 1e9:.0f} "
            f"GFlop/s), {100 * rate / own:.0f} % of {dtype.__name__}, shapes of the prediction "
            f"({own / 1e9:.0f} GFlop/s)"
        )
    mean, computed = (p.curve("sme_law")["loss_mean"] for p in (simulated, fast))
    print(
        f"  digits, fast mode: {fast_seconds.wall:.2f} s ({fast_seconds.processor:.2f} cpu-s), "
        f"{100 * np.abs(computed - mean).mean() / mean.mean():.2f} % from the simulated mean loss"
    )
    print(
        f"  diabetes, least squares, closed form: {closed_seconds.wall:.2f} s "
        f"({closed_seconds.processor:.2f} cpu-s)"
    )


def timed(function: Callable[[], Prediction]) -> tuple[Prediction, Seconds]:
    """Call a function once; return its result and the time."""
    start = time.perf_counter(), time.process_time()
    result = function()
    return result, Seconds(time.perf_counter() - start[0], time.process_time() - start[1])


def main() -> None:
    parts = ("scalar", "closed", "prediction")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; or all")
    parser.add_argument("--repeats", type=int, default=5, help="most repeats of a timing")
    parser.add_argument("--updates", type=int, default=5_000, help="updates of the predicted runs")
    parser.add_argument("--paths", type=int, default=100, help="paths of the prediction")
    arguments = parser.parse_args()
    chosen = arguments.parts or parts
    if unknown := set(chosen) - set(parts):
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(parts)}")
    if "scalar" in chosen:
        scalar_table(arguments.repeats)
    if "closed" in chosen:
        closed_form_line(arguments.repeats)
    if "prediction" in chosen:
        prediction_lines(arguments.updates, arguments.paths)


if __name__ == "__main__":
    main()
