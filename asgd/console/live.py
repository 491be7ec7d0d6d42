"""The live view of a run on a terminal; elsewhere nothing, or lines on request."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from asgd.errors import InputError
from asgd.printable import printable
from asgd.progress import Progress
from asgd.rundir.events import in_words, incidents, read_events

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

IMPORTING = "importing the problem and trying it"
_LINE_SECONDS = 10.0  # between two lines without a terminal
_RECENT_SECONDS = 5.0  # window of the recent staleness
_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 40  # characters of the sparkline


class LiveRun:
    """The live view of one run; call it with every `Progress`.

    Parameters
    ----------
    task
        Name of the task, one word.
    path
        The run directory whose events are shown; None shows no events.
    quiet
        Show nothing.
    lines
        Print a line every 10 s if there is no terminal.
    first
        Text shown before the first progress.
    console
        Output; standard error by default.
    clock
        A monotonic clock, in seconds.
    """

    def __init__(
        self,
        task: str,
        path: Path | None = None,
        *,
        quiet: bool = False,
        lines: bool = False,
        first: str = "starting",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        self._task = task
        self._path = path
        self._first = first
        self._clock = clock
        self._console = console or Console(file=sys.stderr)
        terminal = self._console.is_terminal and not quiet
        self._quiet, self._lines = quiet, lines
        self._live = Live(console=self._console, transient=True, refresh_per_second=4)
        self._terminal = terminal
        self._started = self._said = clock()
        self._past: deque[tuple[float, int, float]] = deque()
        self._losses: list[float] = []
        self._alive: int | None = None

    def __enter__(self) -> LiveRun:
        if self._terminal:
            self._live.update(f"{self._task}: {self._first}", refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Show the new progress."""
        if self._quiet:
            return
        now = self._clock()
        self._remember(progress, now)
        if self._terminal:
            self._live.update(self._view(progress, now))
        elif self._lines and now - self._said >= _LINE_SECONDS:
            self._said = now
            self._console.print(self.line(progress), highlight=False, soft_wrap=True)

    def line(self, progress: Progress) -> str:
        """Return the progress as one line."""
        parts = [
            f"{self._task} {progress.update}/{progress.updates}",
            f"{_rate(progress)} updates/s{_wait(progress)}",
            f"staleness {_number(progress.mean_staleness, '.2f')}",
            "loss " + ("none yet" if progress.loss is None else f"{progress.loss:.4g}"),
            *(f"{printable(name)} {value:.4g}" for name, value in progress.metrics.items()),
        ]
        if self._alive is not None:
            parts.append(f"{self._alive} workers")
        parts.append(f"{_left(progress)} left")
        return ", ".join(parts)

    def recent_staleness(self, progress: Progress) -> float:
        """Return the mean staleness of the updates in the last 5 s; nan without updates."""
        _, update, mean = self._past[0]
        applied = progress.update - update
        if applied <= 0 or math.isnan(progress.mean_staleness):
            return math.nan
        before = 0.0 if math.isnan(mean) else update * mean
        return (progress.update * progress.mean_staleness - before) / applied

    def _remember(self, progress: Progress, now: float) -> None:
        # After the last update the workers exit, which is not a loss of workers.
        if progress.update < progress.updates or self._alive is None:
            self._alive = progress.workers
        self._past.append((now, progress.update, progress.mean_staleness))
        while len(self._past) > 2 and self._past[1][0] < now - _RECENT_SECONDS:
            self._past.popleft()
        if progress.loss is not None and self._losses[-1:] != [progress.loss]:
            self._losses.append(progress.loss)

    def _view(self, progress: Progress, now: float) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        share = progress.update / progress.updates
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self._task, style="bold"),
            ProgressBar(total=1.0, completed=share, width=_WIDTH),
            Text(f"{progress.update:,}/{progress.updates:,}"),
            Text(f"{now - self._started:.0f} s, {_left(progress)} left"),
        )
        body = Table.grid(padding=(0, 2))
        recent = self.recent_staleness(progress)
        loss = "none yet" if progress.loss is None else f"{progress.loss:.4g}"
        rows = [
            ("updates/s", _rate(progress) + _wait(progress)),
            ("staleness", _both(progress.mean_staleness, recent)),
            ("loss", f"{loss}  {sparkline(self._losses)}"),
            *((name, f"{value:.4g}") for name, value in progress.metrics.items()),
        ]
        if self._alive is not None:
            rows.append(("workers", f"{self._alive} alive"))
        rows += [("event", text) for text in recent_events(self._path)]
        for name, text in rows:
            body.add_row(Text(printable(name), style="dim"), Text(printable(text)))
        return Group(head, body)


class Importing:
    """Shows on a terminal that the problem is being imported; elsewhere nothing.

    Parameters
    ----------
    quiet
        Show nothing.
    console
        Output; standard error by default.
    """

    def __init__(self, quiet: bool, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.status import Status

        console = console or Console(file=sys.stderr)
        shown = console.is_terminal and not quiet
        self._status = Status(IMPORTING, console=console) if shown else None

    def __enter__(self) -> Importing:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove the message."""
        if self._status is not None:
            self._status.stop()


class Bar:
    """A progress bar with several parts on a terminal; elsewhere nothing.

    Parameters
    ----------
    task
        Name of the task, one word.
    parts
        Number of parts.
    quiet
        Show nothing.
    """

    def __init__(self, task: str, parts: int, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bars

        console = Console(stderr=True)
        hidden = quiet or not console.is_terminal
        self._bar = Bars(console=console, transient=True, disable=hidden)
        self._task, self._name = self._bar.add_task(task, total=parts), task

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def shown(self) -> bool:
        """Whether the bar is shown."""
        return not self._bar.disable

    def say(self, text: str) -> None:
        """Print a line above the bar, if it is shown."""
        self._bar.print(text)

    def whole(self, name: str, done: float) -> None:
        """Show the current part, and the number of completed parts."""
        description = f"{self._name} {name}"
        self._bar.update(self._task, completed=done, description=description)


def sparkline(values: list[float], width: int = _WIDTH) -> str:
    """Return values as a row of bars, on a logarithmic scale if all are positive.

    Of more values than the width, it shows the newest and others at equal distances.
    """
    step = max(1, -(-len(values) // width))
    shown = [value for value in values[::-step][::-1] if math.isfinite(value)]
    if not shown:
        return ""
    heights = [math.log(value) for value in shown] if min(shown) > 0 else shown
    low, high = min(heights), max(heights)
    top = len(_BARS) - 1
    scale = (top - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[1 + round((height - low) * scale)] for height in heights)


def recent_events(path: Path | None, count: int = 3) -> list[str]:
    """Return the latest incidents of a run, in words."""
    if path is None:
        return []
    try:
        events = read_events(path / "events.jsonl")
    except InputError as error:  # must not end the run
        return [str(error)]
    return [in_words(event) for event in incidents(events)][-count:]


def _left(progress: Progress) -> str:
    speed = progress.updates_per_second
    if math.isnan(speed) or speed <= 0:
        return "unknown time"
    seconds = round((progress.updates - progress.update) / speed)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _rate(progress: Progress) -> str:
    speed = progress.updates_per_second
    return _number(speed, ",.0f" if speed >= 1 or speed == 0 else ".2g")


def _wait(progress: Progress) -> str:
    if progress.homeless:
        return f" ({progress.homeless} workers wait for a node of the cluster)"
    if progress.joining:
        return f" (waiting for {progress.joining} workers to start and import the problem)"
    if progress.evaluating:
        return " (waiting for the evaluation of losses)"
    return f" ({progress.skipped} losses skipped, no time)" if progress.skipped else ""


def _both(mean: float, recent: float) -> str:
    shown = ((mean, "mean"), (recent, "recent"))
    known = [f"{value:.2f} {name}" for value, name in shown if not math.isnan(value)]
    return ", ".join(known) or "none yet"


def _number(value: float, form: str) -> str:
    return "none yet" if math.isnan(value) else format(value, form)
