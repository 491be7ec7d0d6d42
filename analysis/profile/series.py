"""Prepares staleness for a fit: checks it, removes stragglers and the start-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from analysis.profile.dependence import start_up as start_up_of
from analysis.profile.dependence import start_up_of_steps
from analysis.profile.stragglers import stragglers, taking_part
from asgd.arrays import Integers
from asgd.errors import InputError
from asgd.local_steps import not_a_gradient
from asgd.rundir.events import team_sizes
from asgd.rundir.reader import Run
from asgd.shards import dependence
from asgd.staleness.values import staleness_of, whole_numbers

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Nouns:
    """Words of the sentences on a fit.

    Attributes
    ----------
    rows
        The items with a staleness, in the plural.
    unit
        Unit of the staleness, in the plural; "" if it is clear.
    use
        Phrase before the selected law.
    longer
        Phrase for a source of more rows.
    replayed
        Feature of the run that no model with a law covers, so only a replay predicts it; or None.
    """

    rows: str = "updates"
    unit: str = ""
    use: str = "predict with"
    longer: str = "a longer run (run.updates)"
    replayed: str | None = None

    @classmethod
    def of_run(cls, run: Run) -> Nouns:
        """Return the words for a run."""
        what = _not_by_law(run)
        return cls() if what is None else cls(use=DESCRIBED, replayed=what)


DESCRIBED = "the staleness is best described by"  # where no law predicts the run


@dataclass(frozen=True, kw_only=True)
class Series:
    """The input of a fit.

    Attributes
    ----------
    staleness
        In order of update, shape (m,).
    worker
        Worker of each update, shape (m,), or None.
    team
        Number of workers without stragglers, averaged if it changed; or None.
    start_up
        Updates dropped at the start.
    left_out
        Deliveries of each straggler, see `analysis.profile.stragglers`.
    step
        Step of each update, shape (m,), not decreasing, if steps have several; else None.
    nouns
        Words for sentences on the values.
    """

    staleness: Integers
    worker: npt.NDArray[Any] | None
    team: float | None
    start_up: int
    left_out: Mapping[Any, int] = field(default_factory=dict)
    step: Integers | None = None
    nouns: Nouns = field(default_factory=Nouns)

    @classmethod
    def of(
        cls,
        staleness: npt.ArrayLike,
        workers: npt.ArrayLike | None,
        worker_ids: npt.ArrayLike | None,
        update: npt.ArrayLike | None,
        start_up: int | None,
    ) -> Series:
        """Check and convert the arguments of `fit_staleness`; raises its errors."""
        values = whole_numbers(staleness, "staleness")
        ids = None if worker_ids is None else _as_long("worker_ids", worker_ids, values)
        number = np.arange(len(values)) if update is None else _numbers(update, values)
        sizes = None if workers is None else _sizes(workers, values)
        left_out: dict[Any, int] = {}
        if ids is not None:
            if sizes is None:
                sizes = np.broadcast_to(len(np.unique(ids)), values.shape)
            if sizes.min() == sizes.max():
                left_out = stragglers(ids, int(sizes[0]))
        if ids is not None and sizes is not None and left_out:
            kept = taking_part(ids, left_out)
            values, ids, number = values[kept], ids[kept], number[kept]
            sizes = sizes[kept] - len(left_out)
        if start_up is None:
            start_up = start_up_of(values, number)
        elif not _is_index(start_up, len(values)):
            raise InputError(f"start_up = {start_up!r}: expected 0 to {len(values) - 1}")
        return cls(
            staleness=values[start_up:],
            worker=None if ids is None else ids[start_up:],
            team=None if sizes is None else whole_number(float(sizes[start_up:].mean())),
            start_up=start_up,
            left_out=left_out,
        )

    @classmethod
    def of_run(cls, run: Run) -> Series:
        """Take the updates of a run, or the gradients if an update is the mean of several.

        The mean staleness is compared with P - 1 only if every snapshot was used once.

        Raises
        ------
        InputError
            The run recorded no update.
        """
        trace, cluster = run.trace, run.config.cluster
        if trace.empty:
            raise InputError(f"{run.path}: recorded no update to fit")
        nouns = Nouns.of_run(run)
        if cluster.gradients_per_update is not None and not run.members.empty:
            return cls._of_gradients(run.members, replace(nouns, rows="gradients", use=DESCRIBED))
        update = trace["update"].to_numpy()
        series = cls.of(
            staleness_of(update, trace["read_version"].to_numpy()),
            team_sizes(run.events, run.config.cluster.workers, len(trace)),
            trace["worker"].to_numpy(),
            update,
            None,
        )
        return replace(series, team=series.team if run.discarded.empty else None, nouns=nouns)

    @classmethod
    def _of_gradients(cls, members: pd.DataFrame, nouns: Nouns) -> Series:
        update = members["update"].to_numpy()
        staleness = staleness_of(update, members["read_version"].to_numpy())
        first = start_up_of_steps(staleness, update)
        worker = members["worker"].to_numpy()[first:]
        return cls(
            staleness=staleness[first:],
            worker=worker,
            team=None,
            start_up=first,
            step=update[first:],
            nouns=nouns,
        )

    @classmethod
    def joined(cls, several: Sequence[Series]) -> Series:
        """Concatenate the series of repeats."""
        sizes = [len(series.staleness) for series in several]
        workers = [series.worker for series in several if series.worker is not None]
        teams = [series.team for series in several if series.team is not None]
        left_out: dict[Any, int] = {}
        for series in several:
            for name, times in series.left_out.items():
                left_out[name] = left_out.get(name, 0) + times
        steps = [series.step for series in several if series.step is not None]
        ends = np.cumsum([0, *(int(step[-1]) + 1 for step in steps[:-1])]).tolist()
        return cls(
            staleness=np.concatenate([series.staleness for series in several]),
            worker=np.concatenate(workers) if len(workers) == len(several) else None,
            team=whole_number(float(np.average(teams, weights=sizes)))
            if len(teams) == len(several)
            else None,
            start_up=sum(series.start_up for series in several),
            left_out=left_out,
            step=np.concatenate([step + end for step, end in zip(steps, ends, strict=True)])
            if len(steps) == len(several)
            else None,
            nouns=several[0].nouns,
        )


def _not_by_law(run: Run) -> str | None:
    """Return the feature of a run that no model with a law covers, as a phrase; or None."""
    optimizer = run.config.optimizer
    if feature := not_a_gradient(run.config):
        return feature
    if optimizer.rule != "sgd":
        return f"optimizer.rule = {optimizer.rule!r}"
    if optimizer.clip_norm is not None:
        return f"optimizer.clip_norm = {optimizer.clip_norm:g}"
    stale = run.trace["staleness"].any() if run.keeps_rows else run.outline.mean_staleness
    if stale:
        if run.has_discarded:
            return "discarded gradients"
        if run.config.cluster.gradients_per_update is not None:
            return f"cluster.gradients_per_update = {run.config.cluster.gradients_per_update}"
    return dependence(run.config)


def _as_long(name: str, given: npt.ArrayLike, values: Integers) -> npt.NDArray[Any]:
    array = np.asarray(given)
    if array.shape != values.shape:
        raise InputError(f"{name}.shape = {array.shape}: expected {values.shape}")
    if array.dtype.kind in "fO" and np.any(array != array):
        raise InputError(f"{name}[{int(np.argmax(array != array))}] = nan: expected a value")
    return array


def _numbers(update: npt.ArrayLike, values: Integers) -> Integers:
    numbers = _as_long("update", whole_numbers(update, "update"), values)
    if np.any(np.diff(numbers) <= 0):
        at = int(np.argmax(np.diff(numbers) <= 0)) + 1
        raise InputError(f"update[{at}] = {numbers[at]}: expected ascending numbers")
    return numbers


def _sizes(workers: npt.ArrayLike, values: Integers) -> Integers:
    """Return the number of workers at each update, shape (m,)."""
    given = np.asarray(workers)
    sizes = whole_numbers(given.reshape(-1) if given.ndim == 0 else given, "workers")
    if given.ndim and sizes.shape != values.shape:
        raise InputError(f"workers.shape = {sizes.shape}: expected a number or {values.shape}")
    if sizes.min() < 1:
        raise InputError(f"workers = {sizes.min()}: expected at least 1")
    return np.broadcast_to(sizes, values.shape)


def whole_number(number: float) -> float:
    """Return the same number, as an integer if it is whole."""
    return int(number) if number.is_integer() else number


def _is_index(value: object, length: int) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and 0 <= value < length  # type: ignore[operator]
