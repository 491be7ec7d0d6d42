"""States the verdict on a staleness fit in words."""

from __future__ import annotations

from typing import Literal

from analysis.profile.diagnostics import Shape
from analysis.profile.goodness import ChiSquare
from analysis.profile.law_fit import LawFit
from asgd.staleness.empirical import Empirical
from asgd.staleness.geometric import ConstantPlusGeometric
from asgd.staleness.law import StalenessLaw

Grade = Literal["holds", "close", "rejected", "unclear"]

LEVEL = 0.01  # significance level at which a law counts as rejected
CLOSE = 0.08  # total variation distance below which a rejected geometric law counts as close
FAR = 0.3  # distance above which no law counts as holding, whatever the test says

_PERCENT = f"{100 * LEVEL:.0f} %"
_OPENING = {
    "holds": "The geometric law holds",
    "close": "The geometric law is close but not exact",
    "rejected": "The geometric law does not hold",
    "unclear": "Too few independent updates to say whether the geometric law holds",
}
_WORDS = {
    "geometric": "geometric law",
    "geometric_mixture": "mixture of geometric laws",
    "negative_binomial": "negative binomial law",
    "poisson": "Poisson law",
    "conway_maxwell_poisson": "Conway-Maxwell-Poisson law",
    "constant_plus_geometric": "constant plus geometric law",
    "empirical": "measured law",
}


def in_words(law: StalenessLaw) -> str:
    """Return the phrase for the law."""
    if isinstance(law, ConstantPlusGeometric) and law.mu == 0.0:
        return f"constant law (always {law.offset})"
    return _WORDS[law.name]


def name_in_words(name: str) -> str:
    """Return the phrase for the law of this name."""
    return _WORDS[name]


def finding(
    grade: Grade,
    geometric: LawFit,
    shape: Shape,
    chi_square: ChiSquare,
    workers: float | None,
    rows: str = "updates",
) -> str:
    """Return the start of the verdict: whether the geometric law holds, and the evidence."""
    one = "1/P =" if workers else "the law's"
    evidence = (
        f"{100 * shape.zeros:.1f} % of {rows} have staleness 0 against {one} "
        f"{100 * shape.zeros_geometric:.1f} %, variance {shape.variance:.3g} against "
        f"{shape.variance_geometric:.3g}, total variation distance {geometric.tv:.3f}, "
        f"chi-square {_probability(chi_square.pvalue)}"
    )
    return f"{_OPENING[grade]} ({evidence})"


def recommendation(
    grade: Grade, geometric: LawFit, selected: LawFit, use: str = "predict with"
) -> str:
    """Return the end of the verdict: the law to use, and why."""
    return f"{use} {_advice(grade, geometric, selected)}."


def _advice(grade: Grade, geometric: LawFit, selected: LawFit) -> str:
    if grade == "holds":
        return f"it, mu = {geometric.params['mu']:.4f}"
    name = f"the {in_words(selected.law)}"
    if isinstance(selected.law, Empirical):
        return f"{name}, because every parametric law is rejected at {_PERCENT}"
    if selected.pvalue < LEVEL:
        return f"{name}, the nearest (distance {selected.tv:.3f}): no law fits"
    return (
        f"{name}, which has the lowest AIC of the laws not rejected at {_PERCENT} "
        f"(distance {selected.tv:.3f}, AIC lower by {geometric.aic - selected.aic:.0f})"
    )


def _probability(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
