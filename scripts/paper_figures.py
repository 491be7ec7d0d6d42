#!/usr/bin/env python3
"""Reproduce the claims of An, Lu, Ying: figures (PNG, SVG), data (CSV) and captions (text).

.venv/bin/python scripts/paper_figures.py NAME ... | all [--out figures]
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from analysis.paper.claim import Claim
from analysis.paper.claims import CLAIMS

# Okabe and Ito's palette
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"

MODEL = {
    "exact": {"color": BLACK, "lw": 1.2, "label": "ASGD, exact"},
    "ASGD": {"color": SKY, "lw": 5.0, "label": "ASGD", "solid_capstyle": "butt"},
    "SME-ASGD": {"color": VERMILLION, "lw": 2.2, "ls": (0, (4, 1.6)), "label": "SME-ASGD"},
    "SME-ASGD, sub-steps": {
        "color": BLUE,
        "lw": 1.6,
        "ls": (0, (6, 1.5, 1, 1.5)),
        "label": "SME-ASGD, continuous",
    },
    "SME-SGD": {"color": GREEN, "lw": 2.0, "ls": (0, (1, 1.3)), "label": "SME-SGD"},
}
RC = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "svg.hashsalt": "paper",
    "savefig.bbox": "tight",
    "savefig.dpi": 110,
}


def draw_fig1(claim: Claim) -> Figure:
    curves = claim.tables["curves"]
    mus = sorted(curves["mu"].unique())
    figure, axes = plt.subplots(2, len(mus), figsize=(11, 6), sharex=True, sharey="row")
    for column, mu in enumerate(mus):
        here = curves[curves["mu"] == mu]
        for row, moment in enumerate(("mean", "second_moment")):
            ax: Axes = axes[row, column]
            ax.axhline(0, color=GREY, lw=0.6)
            for model, line in here.groupby("model", sort=False):
                if model == "ASGD":
                    some = line.iloc[::4]
                    ax.plot(some["update"], some[moment], "o", color=BLACK, ms=4, mfc="white")
                else:
                    ax.plot(line["update"], line[moment], **MODEL[str(model)])
        axes[0, column].set_title(f"$\\mu$ = {mu}")
        axes[1, column].set_xlabel("update $k$")
    axes[0, 0].set_ylabel("$E\\,x_k$")
    axes[1, 0].set_ylabel("$E\\,x_k^2$")
    axes[1, 0].set_ylim(0, 0.32)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    handles.insert(0, Line2D([], [], marker="o", color=BLACK, mfc="white", ls="", ms=4))
    _legend_below(figure, handles, ["ASGD, simulated", *labels])
    return figure


def draw_fig2(claim: Claim) -> Figure:
    layout = [["mean"] * 3 + ["second"] * 3, ["course"] * 2 + ["share"] * 2 + ["difference"] * 2]
    figure, axes = plt.subplot_mosaic(layout, figsize=(12, 7.6))
    panels = (
        ("mean", "quartic", "mean", "$E\\,x_k$", "$f = x^4/4$: mean"),
        ("second", "quartic", "second_moment", "$E\\,x_k^2$", "$f = x^4/4$: second moment"),
        ("course", "course", "mean", "$E\\,x_k$", "double well, from $x_0 = 8$"),
    )
    for name, table, moment, label, title in panels:
        for model, line in claim.tables[table].groupby("model", sort=False):
            axes[name].plot(line["update"], line[moment], **MODEL[str(model)])
        axes[name].set(xlabel="update $k$", ylabel=label, title=title)
    for well in (-1.915, 1.915):
        axes["course"].axhline(well, color=GREY, lw=0.8)
    _draw_wells(axes["share"], axes["difference"], claim.tables["wells"])
    _legend_below(figure, *axes["mean"].get_legend_handles_labels())
    return figure


def _draw_wells(left: Axes, right: Axes, wells: pd.DataFrame) -> None:
    """Draw the shares, and on another scale the differences from ASGD of the models near it."""
    reference = wells[wells["model"] == "ASGD"]["share"].to_numpy()
    right.axhline(0, color=GREY, lw=0.8)
    for offset, marker, (model, rows) in zip(
        (-0.2, 0.0, 0.2, 0.0), "os^o", wells.groupby("model", sort=False), strict=True
    ):
        style = MODEL[str(model)]
        left.plot(rows["initial"], rows["share"], **style)
        if model != "SME-SGD":
            bars = 100 * np.array([rows["share"] - rows["low"], rows["high"] - rows["share"]])
            above = 100 * (rows["share"].to_numpy() - reference)
            right.errorbar(
                rows["initial"] + offset,
                above,
                bars,
                color=style["color"],
                fmt=marker,
                ms=5,
                lw=1.6,
                capsize=2,
            )
    left.set(xlabel="$x_0$", ylabel="share of paths", title="ends in the right well")
    right.set(xlabel="$x_0$", ylabel="% of paths", title="the same, less that of ASGD")


SCHEDULE = {
    "batch one": {"color": GREY, "lw": 1.6, "ls": (0, (1, 1.2))},
    "uniform": {"color": GREEN, "lw": 4.0, "alpha": 0.6},
    "closed form (B4)": {"color": BLUE, "lw": 2.2, "ls": (0, (3, 1.4)), "zorder": 4},
    "optimum of the moments": {"color": VERMILLION, "lw": 1.3, "zorder": 3},
}


def draw_fig3(claim: Claim) -> Figure:
    curves, schedules = claim.tables["curves"], claim.tables["schedules"]
    settings = list(curves["setting"].unique())
    figure, axes = plt.subplots(len(settings), 2, figsize=(11, 3.1 * len(settings) + 0.7))
    for row, setting in enumerate(settings):
        left, right = axes[row]
        for name, style in SCHEDULE.items():
            line = curves[(curves["setting"] == setting) & (curves["schedule"] == name)]
            left.semilogy(line["gradients"], line["expected_loss"], **style, label=name)
            dots = line.dropna(subset=["simulated_loss"])
            left.plot(dots["gradients"], dots["simulated_loss"], "o", color=style["color"], ms=3.5)
            batch = schedules[(schedules["setting"] == setting) & (schedules["schedule"] == name)]
            if name != "batch one":
                right.step(batch["update"], batch["batch_size"], where="post", **style)
        left.set(title=f"{setting}: loss", ylabel="$E f(x_k) - f^*$")
        right.set(title=f"{setting}: schedules", ylabel="batch size $b_k$")
    axes[-1, 0].set_xlabel("gradients computed")
    axes[-1, 1].set_xlabel("update $k$")
    _legend_below(figure, *axes[0, 0].get_legend_handles_labels())
    return figure


def draw_theorem3(claim: Claim) -> Figure:
    errors, slopes = claim.tables["errors"], claim.tables["slopes"]
    styles = {
        "gaussian": ("Gaussian noise", VERMILLION, "o", "-"),
        "own lags and samples": ("own lags and samples", BLUE, "x", "--"),
        "signs": ("two-point, coupled by sign", GREEN, "s", ":"),
        "no noise": ("no noise", GREY, "+", "-"),
    }
    problems, scalings = errors["problem"].unique(), errors["scaling"].unique()
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), sharex=True, sharey=True)
    for ax, (scaling, problem) in zip(
        axes.flat, [(s, p) for s in scalings for p in problems], strict=True
    ):
        for coupling, (label, color, marker, dash) in styles.items():
            here, fit = (
                t[
                    (t["problem"] == problem)
                    & (t["scaling"] == scaling)
                    & (t["coupling"] == coupling)
                ]
                for t in (errors, slopes)
            )
            ax.loglog(
                here["dt"],
                here["error"],
                dash,
                marker=marker,
                color=color,
                ms=7,
                lw=1.6,
                label=f"{label}: slope {fit['slope'].iloc[0]:.2f}",
            )
        dt = np.array([here["dt"].min(), here["dt"].max()])
        ax.loglog(dt, 0.9 * (dt / dt[1]) ** 2, color=BLACK, lw=0.9, label="claimed: slope 2")
        title = f"{problem}; {scaling}".replace("x^2", "$x^2$").replace(" mu", " $\\mu$")
        ax.set(title=title, ylim=(1e-17, 10))
        ax.legend(loc="lower right")
    for ax in axes[1]:
        ax.set_xlabel("$\\Delta t$")
    for ax in axes[:, 0]:
        ax.set_ylabel("$\\max_k E|x_k - X_{k\\Delta t}|^2$")
    figure.tight_layout()
    return figure


def draw_proposition2(claim: Claim) -> Figure:
    styles = {
        "momentum SGD": {"color": BLUE, "lw": 2.6},
        "ASGD, expected read M": {"color": VERMILLION, "lw": 1.8, "ls": (0, (4, 1.6))},
        "ASGD, iterate X": {"color": BLACK, "lw": 1.6, "ls": (0, (1, 1.2))},
    }
    course, quantiles = claim.tables["course"], claim.tables["quantiles"]
    figure, axes = plt.subplots(2, 3, figsize=(12.5, 7.4))
    for row, eta in zip(axes, course["eta"].unique(), strict=True):
        here = course[course["eta"] == eta]
        mu = here["mu"].iloc[0]
        for model, style in styles.items():
            line = here[here["model"] == model]
            row[0].plot(line["update"], line["mean"], **style, label=model)
            row[1].plot(line["update"], line["variance"], **style)
        rest = quantiles[quantiles["eta"] == eta]
        reference = rest["momentum SGD"]
        for model, style in list(styles.items())[1:]:
            row[2].plot(reference, rest[model], **style)
        row[2].plot(reference, reference, color=BLUE, lw=0.9)
        row[0].set(title=f"$\\eta$ = {eta}, $\\mu$ = {mu}", ylabel="mean", xlabel="update $k$")
        row[1].set(title="on the way to rest", ylabel="variance", xlabel="update $k$")
        row[2].set(title="at rest", xlabel="quantile, momentum SGD", ylabel="quantile, ASGD")
    _legend_below(figure, *axes[0, 0].get_legend_handles_labels())
    return figure


def draw_temperature(claim: Claim) -> Figure:
    table, theory = claim.tables["variance"], claim.tables["theory"]
    mus = sorted(table["mu"].unique())
    styles = dict(zip(mus, zip((BLACK, BLUE, GREEN, VERMILLION), "os^D", strict=True), strict=True))
    figure, axes = plt.subplots(1, 3, figsize=(13, 5.2))
    panels = (
        ("expected_read", "expected_read_L2", {"expected_read_L2": "--"}),
        ("iterate", "expected_read_L2", {"iterate_L3": "--", "iterate_B3": ":"}),
        ("iterate", "iterate_L3", {"iterate_first_order": "--"}),
    )
    titles = ("expected read $M$ over $T/a$", "iterate $X$ over $T/a$", "iterate $X$ over (L3)")
    for ax, (name, base, dashes), title in zip(axes, panels, titles, strict=True):
        for mu, (color, marker) in styles.items():
            lines, dots = theory[theory["mu"] == mu], table[table["mu"] == mu]
            ax.plot(
                lines["eta"], lines[f"{name}_exact"] / lines[base], color=color, lw=3, alpha=0.45
            )
            for column, dash in dashes.items():
                ax.plot(lines["eta"], lines[column] / lines[base], dash, color=color, lw=1.5)
            bars = 2 * dots[f"{name}_error"] / dots[base]
            ax.errorbar(
                dots["eta"],
                dots[name] / dots[base],
                bars,
                color=color,
                fmt=marker,
                ms=5,
                mfc="white",
                capsize=4,
                zorder=5,
            )
        ticks = list(table["eta"].unique())
        ax.set(xscale="log", xlabel="$\\eta$", title=title)
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
    axes[0].set_ylabel("ratio of stationary variances")
    handles = [
        Line2D([], [], color=c, marker=m, ms=6, mfc="white", lw=2, label=f"$\\mu$ = {mu:g}")
        for mu, (c, m) in styles.items()
    ]
    handles += [
        Line2D([], [], color=GREY, marker="o", ms=5, mfc="white", ls="", label="ASGD, simulated"),
        Line2D([], [], color=GREY, lw=3, alpha=0.45, label="exact"),
        Line2D([], [], color=GREY, ls="--", lw=1.5, label="(L2), (L3), first order"),
        Line2D([], [], color=GREY, ls=":", lw=1.5, label="(B3)"),
    ]
    _legend_below(figure, handles, [str(h.get_label()) for h in handles], columns=8)
    return figure


def draw_linear_nonlinear(claim: Claim) -> Figure:
    curves = claim.tables["curves"]
    names = list(curves["forms"].unique())
    figure, axes = plt.subplots(2, len(names), figsize=(11.5, 6), sharex=True, sharey="row")
    styles = {
        "nonlinear": {"color": BLUE, "lw": 2.6, "label": "nonlinear form (S1)-(S3)"},
        "linear": {
            "color": VERMILLION,
            "lw": 1.8,
            "ls": (0, (4, 1.6)),
            "label": "linear form (L1)",
        },
    }
    for column, name in enumerate(names):
        here = curves[curves["forms"] == name]
        for row, moment in enumerate(("mean", "second_moment")):
            for form, style in styles.items():
                line = here[here["form"] == form]
                axes[row, column].plot(line["update"], line[moment], **style)
        title = name.replace("X = M + r Q/kappa", "$X = M + r\\,Q/\\kappa$")
        axes[0, column].set_title(title.replace("X by", "$X$ by"))
        axes[1, column].set_xlabel("update $k$")
    axes[0, 0].set_ylabel("$E\\,X$")
    axes[1, 0].set_ylabel("$E\\,X^2$")
    axes[1, 0].set_ylim(0, 0.4)
    _legend_below(figure, *axes[0, 0].get_legend_handles_labels())
    return figure


def _legend_below(
    figure: Figure, handles: Sequence[Artist], labels: list[str], columns: int = 5
) -> None:
    figure.tight_layout(rect=(0, 0.45 / figure.get_figheight(), 1, 1))
    figure.legend(
        handles,
        labels,
        loc="lower center",
        ncols=min(len(labels), columns),
        columnspacing=1.4,
        handletextpad=0.6,
    )


DRAW: dict[str, Callable[[Claim], Figure]] = {
    "fig1": draw_fig1,
    "fig2": draw_fig2,
    "fig3": draw_fig3,
    "theorem3": draw_theorem3,
    "proposition2": draw_proposition2,
    "temperature": draw_temperature,
    "linear_nonlinear": draw_linear_nonlinear,
}


def write(claim: Claim, folder: Path) -> None:
    """Write NAME.png, NAME.svg, NAME.txt and NAME.TABLE.csv into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(RC):
        figure = DRAW[claim.name](claim)
        figure.savefig(folder / f"{claim.name}.png")
        _use_few_colours(folder / f"{claim.name}.png")
        figure.savefig(folder / f"{claim.name}.svg", metadata={"Date": None})
        plt.close(figure)
    (folder / f"{claim.name}.txt").write_text(textwrap.fill(claim.caption, 100) + "\n")
    for name, table in claim.tables.items():
        _write_table(table, folder / f"{claim.name}.{name}.csv")


def _use_few_colours(path: Path) -> None:
    """Store a PNG with a palette, in a third of the bytes; lines stay the same."""
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(48, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def _write_table(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, float_format="%.8g")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=[*CLAIMS, "all"], metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    arguments = parser.parse_args()
    names = list(CLAIMS) if "all" in arguments.names else arguments.names
    for name in names:
        start = time.perf_counter()
        claim = CLAIMS[name]()
        write(claim, arguments.out)
        print(f"{name}: {time.perf_counter() - start:.0f} s, {arguments.out / name}.png\n")
        print(textwrap.fill(claim.caption, 100), end="\n\n")


if __name__ == "__main__":
    main()
