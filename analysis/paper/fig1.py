"""Moments of ASGD, SME-ASGD and SME-SGD on f = x^2 for several staleness parameters."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.exact.moments import Moments, asgd_moments
from analysis.models.discrete import asgd_iid
from analysis.models.ensemble import Ensemble
from analysis.models.sme_asgd import sme_asgd
from analysis.models.sme_sgd import sme_sgd
from analysis.paper.claim import Claim, value
from asgd.problems.scalar import Quadratic
from asgd.staleness.geometric import Geometric

LEARNING_RATE = 0.05
MUS = (0.5, 0.75, 0.9)
UPDATES = 80
SUBSTEPS = 16


def fig1(paths: int = 20_000, seed: int = 0) -> Claim:
    """Compare first and second moments over time with the exact ones of ASGD.

    Models: ASGD with i.i.d. geometric staleness (A1), SME-ASGD by its native scheme (S5) and by
    sub-steps that approach the continuous (S1)-(S3), and SME-SGD (S6).
    """
    curves, errors = [], []
    for mu in MUS:
        exact = asgd_moments(Quadratic(), LEARNING_RATE, mu, UPDATES)
        curves.append(_exact_curve(mu, exact))
        for model, ensemble in _ensembles(mu, paths, seed).items():
            curves.append(_curve(mu, model, ensemble))
            errors.append(_errors(mu, model, ensemble, exact))
    table = pd.DataFrame(errors)
    numbers = _ratios(table)
    return Claim(
        name="fig1",
        caption=_caption(table, numbers, paths),
        tables={"curves": pd.concat(curves, ignore_index=True), "errors": table},
        numbers=numbers,
    )


def _ensembles(mu: float, paths: int, seed: int) -> dict[str, Ensemble]:
    problem, eta = Quadratic(), LEARNING_RATE
    law = Geometric(mu)
    return {
        "ASGD": asgd_iid(problem, eta, law, UPDATES, paths, seed, quantile_levels=()),
        "SME-ASGD": sme_asgd(problem, eta, mu, UPDATES, paths, seed, quantile_levels=()),
        "SME-ASGD, sub-steps": sme_asgd(
            problem, eta, mu, UPDATES, paths, seed, substeps=SUBSTEPS, quantile_levels=()
        ),
        "SME-SGD": sme_sgd(problem, eta, UPDATES, paths, seed, quantile_levels=()),
    }


def _exact_curve(mu: float, exact: Moments) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "mu": mu,
            "model": "exact",
            "update": np.arange(UPDATES + 1),
            "mean": exact.mean[:, 0],
            "second_moment": exact.second_moment[:, 0, 0],
        }
    )


def _curve(mu: float, model: str, ensemble: Ensemble) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "mu": mu,
            "model": model,
            "update": ensemble.update,
            "mean": ensemble.mean[:, 0],
            "second_moment": ensemble.second_moment[:, 0],
        }
    )


def _errors(mu: float, model: str, ensemble: Ensemble, exact: Moments) -> dict[str, object]:
    mean_error = np.abs(ensemble.mean - exact.mean)[:, 0]
    second_error = np.abs(ensemble.second_moment - exact.second_moment[:, :, 0])[:, 0]
    variance = (exact.second_moment[:, :, 0] - exact.mean**2)[:, 0]
    return {
        "mu": mu,
        "model": model,
        "max_error_mean": mean_error.max(),
        "max_error_second_moment": second_error.max(),
        "max_standard_error_mean": np.sqrt(variance.max() / ensemble.paths),
        # on this problem f = x^2, so the spread of the loss is that of x^2
        "max_standard_error_second_moment": ensemble.loss_std.max() / np.sqrt(ensemble.paths),
    }


def _ratios(errors: pd.DataFrame) -> dict[str, float]:
    """Return the error of SME-SGD over that of the continuous equation at each mu.

    `low MU` and `high MU`: the smaller and the larger of the ratios of E x and of E x^2.
    """
    numbers: dict[str, float] = {}
    for mu in MUS:
        ratios = [
            value(errors, column, model="SME-SGD", mu=mu)
            / value(errors, column, model="SME-ASGD, sub-steps", mu=mu)
            for column in ("max_error_mean", "max_error_second_moment")
        ]
        numbers |= {f"low {mu}": min(ratios), f"high {mu}": max(ratios)}
    return numbers


def _caption(errors: pd.DataFrame, numbers: dict[str, float], paths: int) -> str:
    def triple(column: str, mu: float) -> str:
        models = ("SME-ASGD, sub-steps", "SME-ASGD", "SME-SGD")
        return ", ".join(f"{value(errors, column, model=model, mu=mu):.4f}" for model in models)

    rows = "; ".join(
        f"mu = {mu}: E x {triple('max_error_mean', mu)}, E x^2 "
        f"{triple('max_error_second_moment', mu)}"
        for mu in MUS
    )
    closer = ", ".join(
        f"{numbers[f'low {mu}']:.1f} to {numbers[f'high {mu}']:.1f} at mu = {mu}" for mu in MUS
    )
    return (
        f"First and second moment of x_k on f = x^2 with samples (x -+ 1)^2 - 1, x_0 = 1, "
        f"eta = {LEARNING_RATE}, i.i.d. geometric staleness of parameter mu. ASGD, SME-ASGD and "
        f"SME-SGD: {paths} paths each; black: the exact moments of ASGD. SME-ASGD follows the "
        f"oscillations that a longer delay causes, SME-SGD does not. Largest errors over {UPDATES} "
        f"updates of the continuous SME-ASGD ({SUBSTEPS} sub-steps per update), of SME-ASGD in one "
        f"step per update, and of SME-SGD: {rows}. The continuous equation is closer than SME-SGD "
        f"by these factors, the smaller of both moments and the larger: {closer}; what is left is "
        f"O(dt). One step per update has the moments of ASGD itself: its error is that of {paths} "
        f"paths."
    )
