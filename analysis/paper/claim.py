"""The result of reproducing one claim of the paper."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Claim:
    """Tables and numbers behind one figure.

    Attributes
    ----------
    name
        Name of the figure; stem of its files.
    caption
        The experiment with every constant, and its result in numbers.
    tables
        Data by name.
    numbers
        Numbers for tests and for the caption.
    """

    name: str
    caption: str
    tables: dict[str, pd.DataFrame]
    numbers: dict[str, float]


def value(table: pd.DataFrame, column: str, **labels: object) -> float:
    """Return the number in `column` of the one row with these labels."""
    rows = np.logical_and.reduce(
        [(table[key] == label).to_numpy() for key, label in labels.items()]
    )
    return float(table.loc[rows, column].to_numpy(dtype=float).item())


def pvalue_text(p: float) -> str:
    """Return `= 0.42`, `= 3e-05` or `< 1e-10`."""
    if p < 1e-10:
        return "< 1e-10"
    return f"= {p:.2f}" if p >= 0.01 else f"= {p:.0e}"
