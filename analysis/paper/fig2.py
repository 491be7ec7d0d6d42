"""Nonlinear gradients: the convex quartic, and the final well of paths in the double well."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from analysis.models.discrete import asgd_iid
from analysis.models.ensemble import Ensemble
from analysis.models.sme_asgd import sme_asgd
from analysis.models.sme_sgd import sme_sgd
from analysis.paper.claim import Claim, value
from asgd.problems.base import Problem
from asgd.problems.scalar import DoubleWell, Quartic
from asgd.staleness.geometric import Geometric

QUARTIC = {"noise": 1.0, "initial": 1.5}
QUARTIC_RATE, QUARTIC_MU, QUARTIC_UPDATES = 0.05, 0.9, 150
WELL_NOISE, WELL_RATE, WELL_MU, WELL_UPDATES = 3.0, 0.02, 0.98, 300
STARTS = (0.3, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0)
SHOWN_START = 8.0
SUBSTEPS = 16
NATIVE, CONTINUOUS = "SME-ASGD", "SME-ASGD, sub-steps"

Simulate = Callable[..., Ensemble]


def fig2(paths: int = 20_000, seed: int = 0, starts: tuple[float, ...] = STARTS) -> Claim:
    """Compare ASGD, SME-ASGD and SME-SGD on the quartic and on the double well.

    SME-ASGD by its native scheme (S5) and by sub-steps that approach the continuous (S1)-(S3).
    """
    quartic, quartic_errors = _quartic(paths, seed)
    wells = pd.concat([_wells(start, paths, seed) for start in starts], ignore_index=True)
    course = _course(paths, seed)
    shown = wells[wells["initial"] == SHOWN_START]
    numbers = {
        "share_asgd": value(shown, "share", model="ASGD"),
        "low_asgd": value(shown, "low", model="ASGD"),
        "high_asgd": value(shown, "high", model="ASGD"),
        "share_sme_asgd": value(shown, "share", model="SME-ASGD"),
        "share_substeps": value(shown, "share", model=CONTINUOUS),
        "share_sme_sgd": value(shown, "share", model="SME-SGD"),
        "standard_error": _standard_error(value(shown, "share", model="ASGD"), paths),
        "largest_difference_sme_asgd": _largest_difference(wells, NATIVE),
        "largest_z_sme_asgd": _largest_z(wells, NATIVE, paths),
        "largest_difference_substeps": _largest_difference(wells, CONTINUOUS),
        "largest_z_substeps": _largest_z(wells, CONTINUOUS, paths),
        "largest_difference_sme_sgd": _largest_difference(wells, "SME-SGD"),
        **quartic_errors,
    }
    return Claim(
        name="fig2",
        caption=_caption(numbers, paths),
        tables={"quartic": quartic, "wells": wells, "course": course},
        numbers=numbers,
    )


def _models(eta: float, mu: float, updates: int) -> dict[str, Simulate]:
    return {
        "ASGD": lambda problem, *size, **options: asgd_iid(
            problem, eta, Geometric(mu), updates, *size, **options
        ),
        NATIVE: lambda problem, *size, **options: sme_asgd(
            problem, eta, mu, updates, *size, **options
        ),
        CONTINUOUS: lambda problem, *size, **options: sme_asgd(
            problem, eta, mu, updates, *size, substeps=SUBSTEPS, **options
        ),
        "SME-SGD": lambda problem, *size, **options: sme_sgd(
            problem, eta, updates, *size, **options
        ),
    }


def _moments(
    problem: Problem, models: dict[str, Simulate], paths: int, seed: int
) -> dict[str, pd.DataFrame]:
    curves = {}
    for model, simulate in models.items():
        ensemble = simulate(problem, paths, seed, quantile_levels=())
        curves[model] = pd.DataFrame(
            {
                "model": model,
                "update": ensemble.update,
                "mean": ensemble.mean[:, 0],
                "second_moment": ensemble.second_moment[:, 0],
            }
        )
    return curves


def _quartic(paths: int, seed: int) -> tuple[pd.DataFrame, dict[str, float]]:
    models = _models(QUARTIC_RATE, QUARTIC_MU, QUARTIC_UPDATES)
    curves = _moments(Quartic(**QUARTIC), models, paths, seed)
    errors = {}
    for model, label in ((NATIVE, "sme_asgd"), (CONTINUOUS, "substeps"), ("SME-SGD", "sme_sgd")):
        for moment in ("mean", "second_moment"):
            difference = (curves[model][moment] - curves["ASGD"][moment]).abs().max()
            errors[f"quartic_{moment}_{label}"] = float(difference)
    return pd.concat(curves.values(), ignore_index=True), errors


def _course(paths: int, seed: int) -> pd.DataFrame:
    models = _models(WELL_RATE, WELL_MU, WELL_UPDATES)
    curves = _moments(DoubleWell(WELL_NOISE, SHOWN_START), models, paths, seed)
    return pd.concat(curves.values(), ignore_index=True)


def _wells(start: float, paths: int, seed: int) -> pd.DataFrame:
    """Return the share of paths that end at x > 0 with its 95 % Clopper-Pearson interval."""
    rows = []
    problem = DoubleWell(WELL_NOISE, start)
    for model, simulate in _models(WELL_RATE, WELL_MU, WELL_UPDATES).items():
        own = seed + round(1000 * start)  # independent errors of neighbouring starting points
        ensemble = simulate(problem, paths, own, record=[WELL_UPDATES], quantile_levels=())
        right = int(np.count_nonzero(ensemble.final > 0))
        interval = binomtest(right, paths).proportion_ci(0.95)
        rows.append(
            {
                "initial": start,
                "model": model,
                "share": right / paths,
                "low": interval.low,
                "high": interval.high,
            }
        )
    return pd.DataFrame(rows)


def _largest_difference(wells: pd.DataFrame, model: str) -> float:
    share = wells.pivot(index="initial", columns="model", values="share")
    return float((share[model] - share["ASGD"]).abs().max())


def _standard_error(share: float, paths: int) -> float:
    return float(np.sqrt(share * (1 - share) / paths))


def _largest_z(wells: pd.DataFrame, model: str, paths: int) -> float:
    """Return the largest difference from ASGD in standard errors of a pooled share."""
    share = wells.pivot(index="initial", columns="model", values="share")
    pooled = (share[model] + share["ASGD"]) / 2
    error = np.sqrt(2 * pooled * (1 - pooled) / paths)
    return float(((share[model] - share["ASGD"]).abs() / error.where(error > 0, 1)).max())


def _caption(numbers: dict[str, float], paths: int) -> str:
    n = numbers
    return (
        f"Above: f = x^4/4, samples f -+ {QUARTIC['noise']} x, x_0 = {QUARTIC['initial']}, "
        f"eta = {QUARTIC_RATE}, mu = {QUARTIC_MU}. Largest distance to ASGD over "
        f"{QUARTIC_UPDATES} updates: SME-ASGD (one step per update) "
        f"{n['quartic_mean_sme_asgd']:.3f} in E x and "
        f"{n['quartic_second_moment_sme_asgd']:.3f} in E x^2, the continuous equation ({SUBSTEPS} "
        f"sub-steps) {n['quartic_mean_substeps']:.3f} and "
        f"{n['quartic_second_moment_substeps']:.3f}, SME-SGD "
        f"{n['quartic_mean_sme_sgd']:.3f} and {n['quartic_second_moment_sme_sgd']:.3f}. "
        f"Below: f = x^2/2 - 2 log cosh x, two wells at -+1.915, samples f -+ {WELL_NOISE} x, "
        f"eta = {WELL_RATE}, mu = {WELL_MU}: E x from x_0 = {SHOWN_START:g}, and the share of "
        f"paths in the right well after {WELL_UPDATES} updates against x_0, with 95 % binomial "
        f"intervals. Delay acts as inertia: a path that starts far up the right slope runs "
        f"through its well into the other. From x_0 = {SHOWN_START:g} ASGD leaves "
        f"{n['share_asgd']:.1%} in the right well ({n['low_asgd']:.1%} to {n['high_asgd']:.1%}), "
        f"SME-ASGD with one step per update {n['share_sme_asgd']:.1%}, the continuous equation "
        f"{n['share_substeps']:.1%} (standard error of each {n['standard_error']:.2%}), SME-SGD "
        f"{n['share_sme_sgd']:.1%}. Over all starting points the largest difference to ASGD is "
        f"{n['largest_difference_sme_asgd']:.1%} of the paths ({n['largest_z_sme_asgd']:.1f} "
        f"standard errors) for one step per update, {n['largest_difference_substeps']:.1%} "
        f"({n['largest_z_substeps']:.1f}) for the continuous equation, whose distance from ASGD is "
        f"O(dt), and {n['largest_difference_sme_sgd']:.0%} for SME-SGD. i.i.d. geometric "
        f"staleness, {paths} paths per model."
    )
