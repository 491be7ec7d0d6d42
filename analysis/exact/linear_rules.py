"""The update rules that the theory of limits covers."""

from __future__ import annotations

from dataclasses import dataclass

from asgd.rules.base import Rule
from asgd.rules.clipped import Clipped
from asgd.rules.corrected_momentum import CorrectedMomentum
from asgd.rules.heavy_ball import HeavyBall
from asgd.rules.sgd import Sgd
from asgd.rules.staleness_power import StalenessPower


@dataclass(frozen=True)
class LinearRule:
    """v' = beta v - eta g / (1 + tau)^aware, x' = x + v': the rules that limits cover.

    Attributes
    ----------
    momentum
        beta.
    staleness_aware
        Whether the step is divided by 1 + tau.
    """

    momentum: float = 0.0
    staleness_aware: bool = False


def linear_rule(rule: Rule | None, mean_staleness: float) -> LinearRule | None:
    """Return the linear form of a rule (None is SGD); None if limits do not cover the rule.

    Clipping is ignored: a clipped run above the limit of its rule oscillates. Corrected momentum
    is taken at the mean staleness, although its factor varies a little with the staleness.
    """
    match rule:
        case Clipped():
            return linear_rule(rule.rule, mean_staleness)
        case HeavyBall():
            return LinearRule(float(rule.momentum))
        case CorrectedMomentum():
            return LinearRule(rule.explicit(mean_staleness))
        case StalenessPower(exponent=1.0):
            return LinearRule(staleness_aware=True)
        case None | StalenessPower(exponent=0.0):
            return LinearRule()
    return LinearRule() if type(rule) is Sgd else None
