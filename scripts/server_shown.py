"""The table and the figure of `bench_server.py`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

LOOP, TRANSPORTS = "Ray loop", ("ray", "tcp", "shm")


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw the medians: updates/s against d, against the workers, and with work to do."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    loop = table[(table["section"] == "loop") & (table["dtype"] == "float64")]
    scaling = table[table["section"] == "scaling"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axes, along, label, fixed in (
        (left, "dim", "parameters d", ("workers", 4)),
        (middle, "workers", "workers", ("dim", 1000)),
    ):
        name, value = fixed
        median = loop[loop[name] == value].groupby(["system", along])["value"].median()
        for system in (LOOP, *TRANSPORTS):
            if system in median.index:
                line = median[system]
                axes.loglog(line.index, line.to_numpy(), "o-", ms=4, label=system)
        what = f"{value} workers" if name == "workers" else f"d = {value}"
        axes.set(xlabel=label, ylabel="updates per second", title=f"{what}, no work")
        axes.legend(fontsize=8)
    for mean, line in scaling.groupby("compute"):
        (drawn,) = right.loglog(
            line["workers"], line["value"], "o-", ms=4, label=f"{mean * 1e3:.0f} ms"
        )
        right.loglog(line["workers"], line["workers"] / mean, ":", color=drawn.get_color(), lw=1)
    right.set(xlabel="workers", ylabel="updates per second", title="gradients that take time")
    if len(scaling):
        right.legend(fontsize=8, title="compute time, dotted: ideal", title_fontsize=8)
    for axes, part in ((middle, loop), (right, scaling)):
        ticks = sorted(set(part["workers"].astype(int)))
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
    figure.savefig(path)
    plt.close(figure)


def markdown(table: pd.DataFrame) -> str:
    """Return the table of section loop with 4 workers: updates/s and their ratio to Ray's loop."""
    loop = table[(table["section"] == "loop") & (table["workers"] == 4)]
    median = loop.groupby(["dim", "dtype", "system"])["value"].median().unstack("system")
    systems = [name for name in TRANSPORTS if name in median]
    lines = [f"| d | numbers | {LOOP} | " + " | ".join(systems) + " |"]
    lines.append("|---|---|" + "---|" * (1 + len(systems)))
    for (dim, dtype), row in median.sort_index(ascending=[True, False]).iterrows():
        cells = [
            f"{row[name]:,.0f} (x {row[name] / row[LOOP]:.1f})" if row[name] > 0 else ""
            for name in systems
        ]
        lines.append(f"| {dim:,} | {dtype} | {row[LOOP]:,.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
