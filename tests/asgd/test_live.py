"""The live view: a view on a terminal, elsewhere lines on request, nothing when quiet."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from asgd.console.live import Importing, LiveRun, recent_events, sparkline
from asgd.progress import Progress


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def seen(
    update: int, speed: float, staleness: float, loss: float | None, workers: int, **others: Any
) -> Progress:
    """Return the state of a run of 100 updates."""
    return Progress(
        update=update,
        updates=100,
        updates_per_second=speed,
        mean_staleness=staleness,
        loss=loss,
        workers=workers,
        **others,
    )


def states() -> list[Progress]:
    """Return 21 states of a run of 100 updates, whose staleness doubles half-way."""
    early = [seen(k, 2.5, 3.0, 1.0 / (k + 1), 4) for k in range(0, 51, 5)]
    late = [seen(k, 2.5, (50 * 3 + (k - 50) * 6) / k, 0.01, 4) for k in range(55, 101, 5)]
    return early + late


def watched(
    terminal: bool, quiet: bool = False, lines: bool = False, path: Path | None = None
) -> str:
    clock, text = Clock(), io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120)
    options = {"quiet": quiet, "lines": lines}
    with LiveRun("train", path, **options, console=console, clock=clock) as live:
        for state in states():
            clock.now += 1.5
            live(state)
    return text.getvalue()


def test_a_pipe_gets_nothing() -> None:
    assert watched(terminal=False) == ""


def test_a_pipe_gets_a_line_every_ten_seconds_on_request() -> None:
    lines = watched(terminal=False, lines=True).splitlines()
    assert len(lines) == 3
    assert lines[0] == (
        "train 30/100, 2 updates/s, staleness 3.00, loss 0.03226, 4 workers, 0:28 left"
    )


def test_a_start_says_what_it_waits_for() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with LiveRun("train", console=console) as live:
        starting = live.line(seen(0, math.nan, math.nan, None, 2, joining=2))
    assert "none yet updates/s (waiting for 2 workers to start and import" in starting


def test_metrics_of_the_problem_stand_beside_the_loss() -> None:
    state = seen(30, 2.0, 3.0, 0.5, 4, metrics={"accuracy": 0.91234, "\x1b[1m": 2.0})
    text = LiveRun("train").line(state)
    assert "loss 0.5, accuracy 0.9123, " in text
    assert "\x1b" not in text


def test_the_line_of_a_run_that_waits_for_losses_says_so() -> None:
    state = seen(30, 0.25, 3.0, 0.5, 4, evaluating=True)
    assert LiveRun("train").line(state) == (
        "train 30/100, 0.25 updates/s (waiting for the evaluation of losses), staleness 3.00, "
        "loss 0.5, 4:40 left"
    )


def test_skipped_losses_are_counted() -> None:
    state = seen(30, 0.25, 3.0, 0.5, 4, skipped=12)
    assert "0.25 updates/s (12 losses skipped, no time), " in LiveRun("train").line(state)


def test_a_run_that_has_not_begun_has_no_staleness() -> None:
    text = io.StringIO()
    with LiveRun("train", console=Console(file=text, force_terminal=True, width=120)) as live:
        live(seen(0, 0.0, math.nan, None, 4))
    assert re.search(
        r"staleness +\S* *none yet\s*\n", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue())
    )


def test_an_import_is_announced_on_a_terminal_until_the_run_is_shown() -> None:
    shown = []
    for terminal, quiet in ((True, False), (True, True), (False, False)):
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=80)
        with Importing(quiet, console) as importing:
            importing.stop()
            with LiveRun("train", console=console, quiet=True):
                pass
        shown.append("importing the problem and trying it" in text.getvalue())
    assert shown == [True, False, False]


def test_quiet_shows_nothing() -> None:
    assert (
        watched(terminal=True, quiet=True) == watched(terminal=False, quiet=True, lines=True) == ""
    )


def test_a_terminal_gets_a_view(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(
        '{"event": "start"}\n{"event": "worker_lost", "time": 1.0, "worker": 2}\n{"ev',
        encoding="utf-8",
    )
    shown = watched(terminal=True, quiet=False, path=tmp_path)
    for part in ("100/100", "updates/s", "recent", "4 alive", "worker lost: worker 2", "█"):
        assert part in shown


def test_workers_that_left_after_the_last_update_are_still_counted() -> None:
    live = LiveRun("train", console=Console(file=io.StringIO()), clock=Clock())
    for update, alive in ((50, 4), (99, 3), (100, 0)):
        live(seen(update, 2.5, 3.0, 0.1, alive))
    assert "3 workers" in live.line(seen(100, 2.5, 3.0, 0.1, 0))


def test_recent_staleness_is_that_of_the_last_updates() -> None:
    clock = Clock()
    live = LiveRun("train", console=Console(file=io.StringIO()), clock=clock)
    for state in states():
        clock.now += 1.5
        live(state)
    assert live.recent_staleness(states()[-1]) == pytest.approx(6.0)


def test_sparkline_spans_its_values() -> None:
    assert sparkline([]) == ""
    assert sparkline([math.nan, 1.0]) == "▁"
    line = sparkline([1.0, 0.1, 0.01])
    assert (line[0], line[-1], len(line)) == ("█", "▁", 3)
    assert len(sparkline([1.0] * 1000, width=40)) == 40
    assert [sparkline([1.0] * many + [2.0])[-2:] for many in (40, 41, 79)] == ["▁█"] * 3


def test_no_events_without_a_run(tmp_path: Path) -> None:
    assert recent_events(None) == recent_events(tmp_path) == []
