"""Ensembles of paths: runs a model in blocks of paths and keeps statistics instead of paths.

    heun = PathModel(partial(Heun, problem, ...), "heun")          # see `analysis.models.blocks`
    (ensemble,) = run_ensembles([heun], problem, updates, paths, seed)

Several models advance together and share the calls of the problem where that costs less. The blocks
depend only on the number of paths, d and the memory of the models, and each block of a model has
its own random stream. So results do not depend on the number of threads, nor on the other models as
long as one block of all models fits into memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from analysis.models.blocks import Block, BlockMaker, PathModel, Together, shared
from analysis.models.memory import Footprint, block_sizes, blocks_in_flight, threads_that_fit
from analysis.models.statistics import PathStatistics
from asgd.arguments import count, number, shown
from asgd.arrays import Array, Integers
from asgd.errors import InputError, did_you_mean
from asgd.problems.base import Problem, starting_point
from asgd.streams import Seed, as_seed, stream

PerUpdate = float | Sequence[float] | npt.NDArray[Any]

QUANTILE_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
# Paths whose losses are kept for the quantiles. A quantile of level q then has a standard error of
# sqrt(q (1 - q) / 4096) in level, 0.8 % at the median.
QUANTILE_PATHS = 4096

# Options of single models, to suggest corrections of misspelt ones.
_OF_MODELS = ("batch_size", "closure", "noise", "substeps", "turns", "updates", "workers")


@dataclass(frozen=True, repr=False, kw_only=True)
class Ensemble:
    """Statistics of simulated paths at the recorded updates.

    Diverged paths are included: their statistics become inf or nan.

    Attributes
    ----------
    update
        Recorded updates, shape (m,), as numbers of applied updates. Update 0 is x_0.
    mean
        E x, shape (m, d); (0, d) if left out.
    second_moment
        E x^2, element by element, shape (m, d); (0, d) if left out.
    loss_mean, loss_std
        Mean and standard deviation of f(x) over the paths, shape (m,).
    quantile_levels
        Shape (q,).
    loss_quantiles
        Quantiles of f(x), shape (m, q), over at most `QUANTILE_PATHS` paths, spread evenly. All
        other statistics are over all paths.
    paths
        Number of paths.
    final
        x after the last update, shape (paths, d).
    """

    update: Integers
    mean: Array
    second_moment: Array
    loss_mean: Array
    loss_std: Array
    quantile_levels: Array
    loss_quantiles: Array
    paths: int
    final: Array

    def __repr__(self) -> str:
        return (
            f"Ensemble({self.paths} paths, d = {self.mean.shape[1]}, {len(self.update)} records of "
            f"updates {self.update[0]} to {self.update[-1]}; loss {self.loss_mean[0]:.4g} to "
            f"{self.loss_mean[-1]:.4g}, standard deviation {self.loss_std[-1]:.2g})"
        )


class PathOptions(TypedDict, total=False):
    """Keyword arguments that every model function passes on to `run_ensemble`."""

    initial: npt.ArrayLike | None
    record: npt.ArrayLike | None
    quantile_levels: Sequence[float]
    threads: int | None
    dtype: npt.DTypeLike
    progress: Callable[[int, int], None] | None
    moments: bool


def per_update(value: PerUpdate, updates: int, key: str, *, fractional: bool = False) -> Array:
    """Return a constant or a schedule as one positive number per update, shape (updates,).

    A block takes `.tolist()` of it, because NumPy scalars would promote float32 paths to float64.

    Raises
    ------
    InputError
        If a schedule has the wrong length or a value is not positive and finite. Batch sizes must
        be whole numbers unless `fractional`, as for moments.
    """
    updates = count(updates, "updates")
    try:
        values = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise InputError(f"{key} = {shown(value)}: expected positive finite numbers") from None
    if values.ndim == 0:
        values = np.broadcast_to(values, (updates,))
    if values.shape != (updates,):
        raise InputError(
            f"{key}.shape = {values.shape}: expected a number, or one for each of {updates} updates"
        )
    wrong = ~(np.isfinite(values) & (values > 0))
    whole = key == "batch_size" and not fractional
    if whole:
        wrong |= values != np.floor(values)
    if wrong.any():
        at = "" if np.ndim(value) == 0 else f"[{int(np.argmax(wrong))}]"
        accepted = "whole numbers >= 1" if whole else "positive finite numbers"
        raise InputError(f"{key}{at} = {values[np.argmax(wrong)]:g}: expected {accepted}")
    return values


def run_ensemble(
    make_block: BlockMaker,
    problem: Problem,
    updates: int,
    paths: int,
    seed: Seed,
    name: str,
    state_copies: int = 4,
    **options: Unpack[PathOptions],
) -> Ensemble:
    """Simulate one model, with the attributes of `PathModel`, as `run_ensembles` does."""
    model = PathModel(make_block, name, state_copies)
    return run_ensembles([model], problem, updates, paths, seed, **options)[0]


def run_ensembles(
    models: Sequence[PathModel],
    problem: Problem,
    updates: int,
    paths: int,
    seed: Seed,
    **options: Unpack[PathOptions],
) -> list[Ensemble]:
    """Simulate `paths` paths of each model over `updates` updates and return their statistics.

    Memory for m records and each model: 2 m d moments per running or unmerged block, the state of
    one block per thread, m min(paths, `QUANTILE_PATHS`) losses if quantiles are asked for, and the
    final points. Only the last grows with the number of paths. A total above
    `memory.ANNOUNCED_BYTES` is logged as a warning beforehand. Memory of the problem's own methods
    is extra.

    Parameters
    ----------
    models
        Models that advance together.
    initial
        x_0, shape (d,), or several in equal shares, shape (k, d): path i of n starts at row
        i k // n, and a replay of k runs gives it the staleness of run i k // n. Default: the
        problem's initial point under this seed.
    record
        Updates to record. Default: all, including 0 and `updates`.
    quantile_levels
        Levels of the loss quantiles; an empty tuple saves memory.
    threads
        Threads for the blocks. Default: the processors this process may use.
    dtype
        float64 or float32, the precision of the paths. Statistics are float64.
    progress
        Called as progress(done, total) about a hundred times, from any thread; the numbers are
        updates, summed over the blocks.
    moments
        False leaves out `mean` and `second_moment`, which then have no rows: they take 2 m d
        numbers.

    Raises
    ------
    InputError
        If an option is invalid, or the statistics would need more than 4 GB.
    """
    updates, paths, seed = count(updates, "updates"), count(paths, "paths"), as_seed(seed)
    _check_options(problem, options)
    at = _recorded_updates(options.get("record"), updates)
    levels = np.asarray(options.get("quantile_levels", QUANTILE_LEVELS), dtype=float)
    dtype = np.dtype(options.get("dtype", np.float64))
    starts = _starts(models, problem, options.get("initial"), seed).astype(dtype, copy=False)
    copies = sum(model.state_copies for model in models)
    sizes = block_sizes(paths, problem.dim, copies, problem.points_at_once)
    moments = len(at) if options.get("moments", True) else 0
    offsets = np.cumsum([0, *sizes])
    kept = _quantile_paths(paths if len(levels) else 0)
    footprint = Footprint(
        name=", ".join(model.name for model in models),
        models=len(models),
        dim=problem.dim,
        itemsize=dtype.itemsize,
        records=len(at),
        moments=moments,
        sizes=sizes,
        state_copies=copies,
        kept=len(kept),
    )
    threads = threads_that_fit(footprint, options.get("threads"))
    losses = [np.empty((len(at), len(kept))) for _ in models]
    final = [np.empty((paths, problem.dim), dtype) for _ in models]
    watch = _Watch(len(sizes) * updates, options.get("progress"))

    def run(i: int) -> list[PathStatistics]:
        rows = slice(int(offsets[i]), int(offsets[i + 1]))
        first, last = np.searchsorted(kept, [rows.start, rows.stop])
        chosen = kept[first:last] - rows.start
        statistics = [
            PathStatistics(problem, sizes[i], chosen, one[:, first:last], moments) for one in losses
        ]
        blocks: list[Block] = []
        for model in models:
            x = starts[shared(rows, paths, len(starts))]
            run = [shared(rows, paths, model.runs)] if model.runs > 1 else []
            blocks.append(model.make_block(x, stream(seed, f"{model.name}/{i}"), *run))
        # Diverged paths are reported as inf or nan.
        with problem.in_one_thread(), np.errstate(over="ignore", invalid="ignore"):
            _run_blocks(blocks, updates, at, statistics, watch)
        for one, block in zip(final, blocks, strict=True):
            one[rows] = block.position()
        return statistics

    merged = _over_blocks(run, len(sizes), threads, watch)
    return [_ensemble(at, levels, *each) for each in zip(merged, losses, final, strict=True)]


def _ensemble(
    at: Integers, levels: Array, statistics: PathStatistics, losses: Array, final: Array
) -> Ensemble:
    return Ensemble(
        update=at,
        mean=statistics.mean,
        second_moment=statistics.second_moment,
        loss_mean=statistics.loss_mean,
        loss_std=np.sqrt(statistics.loss_variance),
        quantile_levels=levels,
        loss_quantiles=_loss_quantiles(losses, levels),
        paths=len(final),
        final=final,
    )


def _check_options(problem: Problem, options: Mapping[str, Any]) -> None:
    """Raise if `problem` is not a problem, an option is unknown, or a value has the wrong type."""
    if not isinstance(getattr(problem, "dim", None), int):
        raise InputError(f"problem = {shown(problem)}: expected one from make_problem")
    known = PathOptions.__annotations__
    for key in options:
        if key not in known:
            hint = did_you_mean(key, [*known, *_OF_MODELS])
            raise InputError(f"{key}: unknown option; {hint}expected {', '.join(known)}")
    if options.get("threads") is not None:
        count(options["threads"], "threads")
    if options.get("dtype", "float64") not in ("float64", "float32", np.float64, np.float32):
        raise InputError(f"dtype = {shown(options['dtype'])}: expected float64 or float32")
    levels = options.get("quantile_levels", ())
    if np.ndim(levels) != 1:
        raise InputError(f"quantile_levels = {shown(levels)}: expected numbers from 0 to 1")
    for level in levels:
        number(level, "quantile_levels", least=0.0, below=np.nextafter(1.0, 2.0))


class _Watch:
    """Counts updates over all blocks, reports progress, and stops every block when one fails."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.stopped = False
        self.interval = max(total // 100, 1)
        self._total, self._done, self._progress = total, 0, progress
        self._lock = threading.Lock()

    def add(self, updates: int) -> None:
        with self._lock:
            self._done += updates
            if self._progress is not None:
                self._progress(self._done, self._total)


def _run_blocks(
    blocks: Sequence[Block],
    updates: int,
    at: Integers,
    statistics: Sequence[PathStatistics],
    watch: _Watch,
) -> None:
    together = Together(blocks)
    wanted = iter(enumerate(at.tolist()))
    row, following = next(wanted)
    unreported = 0
    for k in range(updates + 1):
        if k == following:
            for one, block in zip(statistics, blocks, strict=True):
                one.record(row, block.position())
            row, following = next(wanted, (row, -1))
        if k == updates or watch.stopped:
            break
        together.step(k)
        unreported += 1
        if unreported == watch.interval:
            watch.add(unreported)
            unreported = 0
    watch.add(unreported)


def _over_blocks(
    run: Callable[[int], list[PathStatistics]], blocks: int, threads: int, watch: _Watch
) -> list[PathStatistics]:
    # One BLAS thread per block: otherwise blocks compete, and rounding depends on their number. A
    # single block would gain little by more threads, because they busy-wait: on a busy machine for
    # ten times as long as one thread computes.
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(threads) as pool,
    ):
        try:
            # Merge in the order of the blocks: the sums then round the same way every time.
            left = iter(range(blocks))
            waiting = deque(pool.submit(run, i) for i in islice(left, blocks_in_flight(threads)))
            merged: list[PathStatistics] = []
            while waiting:
                found = waiting.popleft().result()
                with np.errstate(over="ignore", invalid="ignore"):
                    for one, other in zip(merged, found, strict=False):  # none at first
                        one.merge(other)
                merged = merged or found
                waiting.extend(pool.submit(run, i) for i in islice(left, 1))
            return merged
        except BaseException:
            watch.stopped = True
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _quantile_paths(paths: int) -> Integers:
    """Return the paths whose losses are kept, spread evenly; depends only on their number."""
    kept = min(paths, QUANTILE_PATHS)
    return np.arange(kept, dtype=np.int64) * paths // max(kept, 1)


def _loss_quantiles(losses: Array, levels: Array) -> Array:
    if not len(levels):
        return np.empty((len(losses), 0))
    # The k-th of n paths has level k/(n+1), the probability that one more path is below it. The
    # default puts the extremes at 0 and 1, which makes bands of few paths too narrow.
    with np.errstate(invalid="ignore"):
        return np.quantile(losses, levels, axis=1, overwrite_input=True, method="weibull").T


def initial_point(problem: Problem, initial: npt.ArrayLike | None, seed: int) -> Array:
    """Return x_0, shape (d,): `initial`, or the problem's initial point under this seed."""
    x = _initial_points(problem, initial, seed)
    if x.ndim > 1:
        raise InputError(f"initial.shape = {x.shape}: expected ({problem.dim},)")
    return x


def _starts(
    models: Sequence[PathModel], problem: Problem, initial: npt.ArrayLike | None, seed: int
) -> Array:
    """Return the points where the paths of models start, shape (k, d)."""
    starts = np.atleast_2d(_initial_points(problem, initial, seed))
    for model in models:
        if len(starts) > 1 and model.runs not in (1, len(starts)):
            raise InputError(
                f"len(initial) = {len(starts)}: expected one point, or one for each of "
                f"{model.runs} runs"
            )
    return starts


def _initial_points(problem: Problem, initial: npt.ArrayLike | None, seed: int) -> Array:
    """Return the points where paths start, shape (d,) or (k, d)."""
    if initial is None:
        return starting_point(problem, seed)
    try:
        x = np.asarray(initial, dtype=float)
    except (TypeError, ValueError):
        raise InputError(f"initial = {shown(initial)}: expected {problem.dim} numbers") from None
    if x.ndim not in (1, 2) or x.shape[-1] != problem.dim or not len(x):
        raise InputError(f"initial.shape = {x.shape}: expected ({problem.dim},)")
    if not np.all(np.isfinite(x)):
        raise InputError(f"initial = {shown(initial)}: expected finite numbers")
    return x


def _recorded_updates(record: npt.ArrayLike | None, updates: int) -> Integers:
    if record is None:
        return np.arange(updates + 1, dtype=np.int64)
    given = np.asarray(record)
    fits = given.dtype.kind in "iuf" and np.all((given >= 0) & (given <= updates))
    if given.size == 0 or not fits or np.any(given != np.floor(given)):
        raise InputError(f"record = {shown(record)}: expected updates from 0 to {updates}")
    return np.unique(given.astype(np.int64))
