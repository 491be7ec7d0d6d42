"""Metrics for dashboards: TensorBoard event files, and Prometheus through Ray's metrics.

The recorder writes both, off the server's critical path. Each evaluation of the loss yields a
`Reading` of the updates since the previous one.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from asgd.config.tables import MetricsConfig
from asgd.errors import InputError

TENSORBOARD = "tensorboard"  # directory of the event files in a run directory
STALENESS_BUCKETS = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0]

_INSTALL = 'run `pip install ".[{}]"` in a clone of asgd'


class Evaluated(NamedTuple):
    """The loss after `update` updates, `seconds` from the start, and the problem's metrics."""

    update: int
    seconds: float
    loss: float
    metrics: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The metrics of a run at an evaluation of the loss.

    Attributes
    ----------
    update
        Updates applied so far.
    seconds
        Since the start of the run.
    loss
        After `update` updates.
    staleness_mean
        Over all updates seen by this recorder, nan before the first.
    staleness_recent, gradient_norm, updates_per_second
        Over the updates since the previous evaluation, nan without any.
    metrics
        Of the problem, by name.
    """

    update: int
    seconds: float
    loss: float
    staleness_mean: float
    staleness_recent: float
    gradient_norm: float
    updates_per_second: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class Readings:
    """Computes readings from a trace that arrives in pieces."""

    def __init__(self) -> None:
        self._staleness = np.empty(0)
        self._norm = np.empty(0)
        self._first: int | None = None  # update of the first row not yet in a reading
        self._seconds = math.nan
        self._sum = 0.0
        self._seen = 0

    def take(
        self, trace: Mapping[str, npt.NDArray[Any]], losses: Sequence[Evaluated]
    ) -> list[Reading]:
        """Take the next piece of the run and return its readings.

        Parameters
        ----------
        trace
            The next rows, columns `asgd.rundir.columns.TRACE_COLUMNS`.
        losses
            The next evaluations; the rows before them must be known.
        """
        if self._first is None and len(trace["update"]):
            self._first = int(trace["update"][0])
        self._staleness = np.concatenate([self._staleness, trace["staleness"]])
        self._norm = np.concatenate([self._norm, trace["gradient_norm"]])
        return [self._reading(*evaluated) for evaluated in losses]

    def _reading(
        self, update: int, seconds: float, loss: float, metrics: Mapping[str, float]
    ) -> Reading:
        first = update if self._first is None else self._first
        count = max(update - first, 0)
        staleness, norm = self._staleness[:count], self._norm[:count]
        self._staleness, self._norm = self._staleness[count:], self._norm[count:]
        self._first = first + count
        self._sum += float(staleness.sum())
        self._seen += count
        elapsed, self._seconds = seconds - self._seconds, seconds
        return Reading(
            update=update,
            seconds=seconds,
            loss=loss,
            staleness_mean=self._sum / self._seen if self._seen else math.nan,
            staleness_recent=float(staleness.mean()) if count else math.nan,
            gradient_norm=float(norm.mean()) if count else math.nan,
            updates_per_second=count / elapsed if count and elapsed > 0 else math.nan,
            metrics=metrics,
        )


class Board(Protocol):
    """A dashboard."""

    def show(self, readings: Sequence[Reading], staleness: npt.NDArray[Any]) -> None:
        """Show new readings, and the staleness of the updates since the last call, shape (n,)."""


class TensorBoard:
    """TensorBoard event files, values over update numbers.

    Parameters
    ----------
    directory
        Directory of the event files, created if missing.
    epoch
        Incarnation of the server; each writes its own file.
    known
        Updates kept from the earlier incarnations; TensorBoard hides their later points.
    """

    def __init__(self, directory: Path, epoch: int = 0, known: int = 0) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._summary, self._event = summary, Event
        self._update = known
        directory.mkdir(exist_ok=True)
        # Synchronous, without the writer thread of tensorboardX: an error must end the run.
        self._file = EventsWriter(str(directory / "events"), f".{epoch}")
        if known:
            begin = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(step=known + 1, wall_time=time.time(), session_log=begin))
        self._file.flush()  # no buffered data may be written after the lease is lost

    def show(self, readings: Sequence[Reading], staleness: npt.NDArray[Any]) -> None:
        """Add a point of each quantity per reading, and a histogram of the staleness."""
        now = time.time()
        for reading in readings:
            # Readings keep their distance in run time, even if written together.
            moment = now - (readings[-1].seconds - reading.seconds)
            metrics = {f"metrics/{name}": value for name, value in reading.metrics.items()}
            for name, value in (_quantities(reading) | metrics).items():
                if math.isfinite(value):
                    self._write(reading.update, moment, self._summary.scalar(name, value))
        self._update += len(staleness)
        if len(staleness):
            self._write(self._update, now, self._histogram(staleness))
        self._file.flush()

    def _write(self, update: int, moment: float, summary: Any) -> None:
        self._file.write_event(self._event(step=update, wall_time=moment, summary=summary))

    def _histogram(self, staleness: npt.NDArray[Any]) -> Any:
        low, high = int(staleness.min()), int(staleness.max())
        width = max(1, -(-(high - low + 1) // 100))
        edges = np.arange(low, high + width + 1, width) - 0.5
        counts, _ = np.histogram(staleness, edges)
        total, squares = float(staleness.sum()), float((staleness.astype(float) ** 2).sum())
        # A bucket is given by its upper edge; an empty first bucket sets the lowest edge.
        buckets = [0, *counts.tolist()]
        return self._summary.histogram_raw(
            "staleness", low, high, len(staleness), total, squares, edges.tolist(), buckets
        )


class Prometheus:
    """Ray metrics `ray_asgd_*` for Prometheus, with the name of the run directory as tag `run`."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        tags: dict[str, Any] = {"tag_keys": ("run",)}
        self._gauges = {
            "loss": Gauge("asgd_loss", "Loss at the last evaluation.", **tags),
            "staleness/mean": Gauge(
                "asgd_staleness_mean", "Mean staleness of all updates.", **tags
            ),
            "staleness/recent": Gauge(
                "asgd_staleness_recent", "Mean staleness since the evaluation before.", **tags
            ),
            "gradient_norm": Gauge(
                "asgd_gradient_norm", "Mean gradient norm since the evaluation before.", **tags
            ),
            "updates_per_second": Gauge(
                "asgd_updates_per_second", "Updates per second since the evaluation before.", **tags
            ),
        }
        self._metric = Gauge("asgd_metric", "A metric of the problem.", tag_keys=("run", "metric"))
        self._updates = Counter("asgd_updates", "Updates applied.", **tags)
        self._staleness = Histogram(
            "asgd_staleness", "Staleness of an update.", STALENESS_BUCKETS, **tags
        )
        for metric in (*self._gauges.values(), self._metric, self._updates, self._staleness):
            metric.set_default_tags({"run": run})

    def show(self, readings: Sequence[Reading], staleness: npt.NDArray[Any]) -> None:
        """Count the updates, observe their staleness, set the gauges to the last reading."""
        if len(staleness):
            self._updates.inc(len(staleness))
        for value in staleness.tolist():
            self._staleness.observe(value)
        for reading in readings[-1:]:
            for name, number in _quantities(reading).items():
                if math.isfinite(number):
                    self._gauges[name].set(number)
            for name, number in reading.metrics.items():
                if math.isfinite(number):
                    self._metric.set(number, {"metric": name})


def _quantities(reading: Reading) -> dict[str, float]:
    return {
        "loss": reading.loss,
        "staleness/mean": reading.staleness_mean,
        "staleness/recent": reading.staleness_recent,
        "gradient_norm": reading.gradient_norm,
        "updates_per_second": reading.updates_per_second,
    }


class Metrics:
    """The configured dashboards; none by default."""

    def __init__(self, boards: Sequence[Board] = ()) -> None:
        self._boards = boards
        self._readings = Readings()

    @classmethod
    def open(cls, config: MetricsConfig, run: Path, epoch: int, known: int) -> Metrics:
        """Open the dashboards of a run directory with `known` updates."""
        boards: list[Board] = []
        if config.tensorboard:
            boards.append(TensorBoard(run / TENSORBOARD, epoch, known))
        if config.prometheus:
            boards.append(Prometheus(run.name))
        return cls(boards)

    def show(self, trace: Mapping[str, npt.NDArray[Any]], losses: Sequence[Evaluated]) -> None:
        """Show the next rows of the trace and the next evaluations.

        Raises
        ------
        OSError
            An event file cannot be written.
        """
        if not self._boards:
            return
        readings = self._readings.take(trace, losses)
        for board in self._boards:
            board.show(readings, trace["staleness"])


def check_metrics(config: MetricsConfig) -> None:
    """Refuse metrics whose packages are not installed.

    Raises
    ------
    InputError
        One is missing; the message contains the pip command.
    """
    needs = {"tensorboard": ("tensorboardX",), "prometheus": ("aiohttp_cors", "opencensus")}
    for name, modules in needs.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if getattr(config, name) and missing:
            install = _INSTALL.format(name)
            raise InputError(
                f"metrics.{name} = true: expected {missing[0]} to be installed; {install}"
            )
