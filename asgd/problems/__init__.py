"""Problems: a loss, its gradients and its gradient noise, vectorised over paths."""

from __future__ import annotations

from collections.abc import Callable

from asgd.config import LINEAR_KINDS, Configuration, ProblemConfig, as_config
from asgd.problems.base import Problem
from asgd.problems.linear import DATASETS, LeastSquares, Logistic, Softmax
from asgd.problems.scalar import DoubleWell, Quadratic, Quartic

__all__ = [
    "DoubleWell",
    "LeastSquares",
    "Logistic",
    "Problem",
    "Quadratic",
    "Quartic",
    "Softmax",
    "make_problem",
]

_SCALAR: dict[str, Callable[..., Problem]] = {
    "quadratic": Quadratic,
    "quartic": Quartic,
    "double_well": DoubleWell,
}


def make_problem(config: Configuration | ProblemConfig) -> Problem:
    """Return the configured problem.

    Raises
    ------
    InputError
        A plug-in does not import, or its factory does not return a problem.
    """
    if not isinstance(config, ProblemConfig):
        config = as_config(config).problem
    if config.is_plugin:
        from asgd.problems.plugin import load_plugin

        return load_plugin(config.kind, config.options)
    if config.kind in LINEAR_KINDS:
        make_linear = DATASETS[config.dataset or LINEAR_KINDS[config.kind]]
        return make_linear(**_given(l2=config.l2))
    options = _given(curvature=config.curvature, noise=config.noise, initial=config.initial)
    return _SCALAR[config.kind](**options)


def _given(**options: float | None) -> dict[str, float]:
    return {key: value for key, value in options.items() if value is not None}
