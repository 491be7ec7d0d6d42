"""The claims of An, Lu, Ying by name."""

from __future__ import annotations

from collections.abc import Callable

from analysis.paper.claim import Claim
from analysis.paper.fig1 import fig1
from analysis.paper.fig2 import fig2
from analysis.paper.fig3 import fig3
from analysis.paper.linear_nonlinear import linear_nonlinear
from analysis.paper.proposition2 import proposition2
from analysis.paper.temperature import temperature
from analysis.paper.theorem3 import theorem3

CLAIMS: dict[str, Callable[[], Claim]] = {
    "fig1": fig1,
    "fig2": fig2,
    "fig3": fig3,
    "theorem3": theorem3,
    "proposition2": proposition2,
    "temperature": temperature,
    "linear_nonlinear": linear_nonlinear,
}
