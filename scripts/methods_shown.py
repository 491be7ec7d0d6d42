"""Shows the results of `bench_methods` as tables, as a figure and as verdicts on claims."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from asgd.arrays import Array

TICKS = (10, 30, 100, 300, 1000)  # virtual seconds
LOOKS = (("o", "#0072b2"), ("X", "#d55e00"), ("^", "#009e73"), ("s", "#cc79a7"))
HEADER = ("problem", "data", "times", "method", "rate", "edge", "seconds")


@dataclass(frozen=True)
class Place:
    """A problem with the loss to reach, the data of its workers, and the law of their times."""

    problem: str
    data: str
    times: str


@dataclass(frozen=True)
class Result:
    """The seconds of a method at a place, one for each seed, and its learning rate.

    Attributes
    ----------
    at_edge
        Whether the rate is at an end of its grid.
    seconds
        inf where the loss was not reached by `longest`.
    """

    place: Place
    method: str
    rate: float
    at_edge: bool
    seconds: tuple[float, ...]
    longest: float

    def __str__(self) -> str:
        median = float(np.median(self.seconds))
        number = f"{median:.3g}" if math.isfinite(median) else f"> {self.longest:.0f}"
        return f"{number}{'*' if self.at_edge and math.isfinite(median) else ''}"

    @property
    def logs(self) -> Array:
        """Logarithms of the seconds, at most `longest`."""
        return np.log(np.minimum(self.seconds, self.longest))

    @property
    def reached(self) -> bool:
        """Whether every seed reached the loss."""
        return all(map(math.isfinite, self.seconds))


class Store:
    """The results in a CSV file."""

    def __init__(self, path: Path, longest: float) -> None:
        self._path, self._longest = path, longest
        self.results: dict[tuple[Place, str], Result] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self._append(HEADER)
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                self._take(
                    Result(
                        Place(row["problem"], row["data"], row["times"]),
                        row["method"],
                        float(row["rate"]),
                        row["edge"] == "True",
                        tuple(map(float, row["seconds"].split())),
                        longest,
                    )
                )

    def add(self, result: Result) -> None:
        """Write a result."""
        self._take(result)
        place, seconds = result.place, " ".join(f"{one:.6g}" for one in result.seconds)
        names = place.problem, place.data, place.times, result.method
        self._append((*names, f"{result.rate:.6g}", result.at_edge, seconds))

    def of(self, problem: str, data: str) -> list[Result]:
        """Return the results of a problem with certain data."""
        key = problem, data
        return [r for r in self.results.values() if (r.place.problem, r.place.data) == key]

    def at(self, place: Place) -> list[Result]:
        """Return the results at a place."""
        return [result for result in self.results.values() if result.place == place]

    def _take(self, result: Result) -> None:
        self.results[result.place, result.method] = result

    def _append(self, row: Iterable[object]) -> None:
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerow(row)


def table(results: list[Result], methods: Iterable[str], columns: list[str]) -> str:
    """Return the medians of a problem, a row for each method and a column for each law."""
    found = {(r.method, r.place.times): str(r) for r in results}
    lines = [f"| method | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for method in methods:
        row = [found.get((method, times), "") for times in columns]
        lines += [f"| {method} | {' | '.join(row)} |"] if any(row) else []
    return "\n".join(lines)


# --- claims ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """Seconds over seconds: geometric mean over the seeds, and its standard error.

    Attributes
    ----------
    above, below
        Whether the ratio is larger, or smaller, because some seeds did not reach the loss.
    """

    value: float
    error: float
    above: bool
    below: bool

    @classmethod
    def of(cls, one: Result, other: Result) -> Ratio:
        """Return the ratio of two results; equal seeds are pairs."""
        both = min(len(one.seconds), len(other.seconds))
        logs = one.logs[:both] - other.logs[:both]
        value, error = math.exp(logs.mean()), float(logs.std(ddof=1) / math.sqrt(both))
        return cls(value, value * error, not one.reached, not other.reached)

    def __str__(self) -> str:
        bound = {(True, False): "more than ", (False, True): "less than "}.get(
            (self.above, self.below), ""
        )
        if self.above and self.below:
            return "neither reaches the loss"
        return f"{bound}{self.value:.3g}" + ("" if bound else f" +- {self.error:.2g}")

    def at_most(self, limit: float) -> str:
        """Return the verdict on the claim that the ratio is at most `limit`."""
        if self.above and self.below:
            return "open"
        if self.above:
            return "contradicted" if self.value > limit else "open"
        if self.value - 2 * self.error <= limit:
            return "reproduced"
        return "open" if self.below else "contradicted"


def compared(
    results: dict[tuple[Place, str], Result], one: tuple[Place, str], other: tuple[Place, str]
) -> Ratio | None:
    """Return the ratio of two results, None if one is missing."""
    return Ratio.of(results[one], results[other]) if {one, other} <= results.keys() else None


# --- figure ---------------------------------------------------------------------------------------


def figure(results: list[Result], methods: list[str], columns: list[str], path: Path) -> None:
    """Draw the median of every method and the range over the seeds, a panel for each problem.

    A hollow mark at the right end: the loss is not reached.
    """
    panels = list(dict.fromkeys((r.place.problem, r.place.data) for r in results))
    wide = min(3, len(panels))
    high = math.ceil(len(panels) / wide)
    size = 4.6 + 5.0 * wide, 1.4 + high * (1.3 + 0.5 * len(methods))
    look = {"font.size": 18, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(look):
        drawn, axes = plt.subplots(
            high,
            wide,
            figsize=size,
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for ax, (problem, data) in zip(axes.flat, panels, strict=False):
            for i, times in enumerate(columns):
                here = [r for r in results if r.place == Place(problem, data, times)]
                _panel(ax, here, methods, 0.2 * (i - (len(columns) - 1) / 2), times, LOOKS[i])
            for line in range(1, len(methods)):
                ax.axhline(line - 0.5, color="#dddddd", lw=1)
            ax.set(xscale="log", title=f"{problem}\n{data}")
            ax.set_xticks(TICKS, [f"{tick}" for tick in TICKS], minor=False)
            ax.minorticks_off()
            ax.tick_params(labelbottom=True)
            ax.grid(axis="x", color="#cccccc", lw=0.8)
            ax.set_axisbelow(True)
        for ax in axes.flat[len(panels) :]:
            ax.set_visible(False)
        axes[0, 0].set_yticks(range(len(methods)), methods)
        axes[0, 0].set_ylim(len(methods) - 0.5, -0.5)
        drawn.supxlabel("virtual seconds to the loss (hollow: not reached)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        drawn.legend(
            handles, labels, loc="outside upper center", ncols=4 if wide > 1 else 2, frameon=False
        )
        drawn.savefig(path, dpi=80)
    plt.close(drawn)


def _panel(
    ax: Axes,
    results: list[Result],
    methods: list[str],
    shift: float,
    label: str,
    look: tuple[str, str],
) -> None:
    mark, colour = look
    for r in results:
        y, seconds = methods.index(r.method) + shift, np.exp(r.logs)
        ax.hlines(y, seconds.min(), seconds.max(), color=colour, lw=2)
        inside = "white" if math.isinf(np.median(r.seconds)) else colour
        ax.plot(np.median(seconds), y, mark, ms=9, color=colour, mfc=inside)
    ax.plot([], [], mark, ms=9, color=colour, label=label)
