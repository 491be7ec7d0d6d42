"""Makes the problem of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from asgd.arrays import Array, converted
from asgd.config.make import Configuration, as_config
from asgd.config.tables import LINEAR_KINDS, ProblemConfig
from asgd.errors import InputError
from asgd.parameter_files import read_arrays
from asgd.problems.base import Problem
from asgd.problems.linear import DATASETS
from asgd.problems.scalar import DoubleWell, Quadratic, Quartic

_SCALAR: dict[str, Callable[..., Problem]] = {
    "quadratic": Quadratic,
    "quartic": Quartic,
    "double_well": DoubleWell,
}


def make_problem(config: Configuration | ProblemConfig, *, tried: bool = False) -> Problem:
    """Return the configured problem.

    >>> problem = asgd.make_problem({"problem": {"kind": "quadratic"}})
    >>> problem.dim, problem.gradient(np.array([2.0])).shape
    (1, (1,))

    Parameters
    ----------
    config
        A configuration, nested mappings or a file; its table `problem` is used.
    tried
        Another process has already tried the problem, and x_0 is not needed: skip the trial of a
        plug-in, which takes the memory of ten vectors, and `initial_from`.

    Raises
    ------
    InputError
        A plug-in cannot be imported, its factory does not return a problem, or `initial_from`
        does not fit the problem.
    """
    if not isinstance(config, ProblemConfig):
        config = as_config(config).problem
    problem = _make(config, tried)
    if config.initial_from is not None and not tried:
        problem.start = _start_from(config.initial_from, problem)
    return problem


def _start_from(file: str, problem: Problem) -> Array:
    """Return the parameters in an exported file, shape (d,).

    Raises
    ------
    InputError
        The file cannot be read, or its arrays are not those of the problem.
    """
    where = f"problem.initial_from = {file!r}"
    arrays = read_arrays(Path(file), where)
    try:
        x = converted(problem.flatten(arrays), problem.dtype)
    except KeyError as error:
        has = ", ".join(arrays) or "nothing"
        raise InputError(f"{where}: has {has}: expected {error} too") from None
    if x.shape != (problem.dim,):
        raise InputError(f"{where}: has {x.size} parameters: expected {problem.dim}")
    if not np.isfinite(x).all():
        raise InputError(f"{where}: has parameters that are not finite")
    return x


def _make(config: ProblemConfig, tried: bool) -> Problem:
    if config.is_plugin:
        from asgd.problems.plugin import load_plugin

        return load_plugin(config.kind, config.options, tried=tried)
    if config.kind in LINEAR_KINDS:
        make_linear = DATASETS[config.dataset or LINEAR_KINDS[config.kind]]
        return make_linear(**_given(l2=config.l2))
    options = _given(curvature=config.curvature, noise=config.noise, initial=config.initial)
    return _SCALAR[config.kind](**options)


def _given(**options: float | None) -> dict[str, float]:
    return {key: value for key, value in options.items() if value is not None}
