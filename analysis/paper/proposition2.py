"""Proposition 2: ASGD compared with momentum SGD of zeta = mu, eta' = (1 - mu) eta."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
from scipy.stats import ks_2samp

from analysis.models.blocks import Block
from analysis.models.descent import Descent
from analysis.models.discrete import AsgdIid, MomentumSgd
from analysis.models.ensemble import run_ensemble
from analysis.paper.claim import Claim, pvalue_text, value
from analysis.paper.stationary import ExpectedReadPaths, decay_updates, thinned_samples
from asgd.arrays import Array
from asgd.problems.scalar import Quadratic
from asgd.staleness.geometric import Geometric
from asgd.streams import stream

SMALL, LARGE = (0.02, 0.75), (0.1, 0.9)  # eta and mu
COURSE = {SMALL: 60, LARGE: 80}
SAMPLES = 10
PROBLEM = Quadratic()


def proposition2(paths: int = 20_000, thinned_paths: int = 5_000, seed: int = 0) -> Claim:
    """Compare friction, temperature, stationary law and transient."""
    stationary, quantiles, courses = [], [], []
    for eta, mu in (SMALL, LARGE):
        samples = _thinned(eta, mu, thinned_paths, seed)
        stationary.append(_compare(eta, mu, samples, thinned_paths))
        quantiles.append(_quantiles(eta, mu, samples))
        courses.append(_course(eta, mu, paths, seed))
    table = pd.concat(stationary, ignore_index=True)
    numbers = _numbers(table, courses)
    return Claim(
        name="proposition2",
        caption=_caption(numbers, paths, thinned_paths),
        tables={
            "formulas": _formulas(),
            "stationary": table,
            "quantiles": pd.concat(quantiles, ignore_index=True),
            "course": pd.concat(courses, ignore_index=True),
        },
        numbers=numbers,
    )


def _formulas() -> pd.DataFrame:
    """Return time step, friction and temperature of (L1) and of (L4) under the correspondence."""
    s2 = PROBLEM.noise**2
    rows = []
    for eta, mu in (SMALL, LARGE):
        rate, zeta = (1.0 - mu) * eta, mu
        asgd = np.sqrt(eta * (1.0 - mu)), np.sqrt((1.0 - mu) / eta), eta * s2 / 2.0
        msgd = np.sqrt(rate), (1.0 - zeta) / np.sqrt(rate), rate * s2 / (2.0 * (1.0 - zeta))
        for model, (dt, friction, heat) in (("ASGD (L1)", asgd), ("momentum SGD (L4)", msgd)):
            rows.append(
                {
                    "eta": eta,
                    "mu": mu,
                    "model": model,
                    "time_step": dt,
                    "friction": friction,
                    "temperature": heat,
                }
            )
    return pd.DataFrame(rows)


def _asgd(eta: float, mu: float, updates: int, x: Array, rng: np.random.Generator) -> AsgdIid:
    length = min(Geometric(mu).support_length(1e-9), updates + 1)
    ones = np.ones(updates)
    return AsgdIid(Descent(PROBLEM, eta * ones, ones), Geometric(mu), length, x, rng)


def _read(
    eta: float, mu: float, updates: int, x: Array, rng: np.random.Generator
) -> ExpectedReadPaths:
    return ExpectedReadPaths(_asgd(eta, mu, updates, x, rng), mu)


def _momentum(
    eta: float, mu: float, updates: int, x: Array, rng: np.random.Generator
) -> MomentumSgd:
    ones = np.ones(updates)
    return MomentumSgd(Descent(PROBLEM, (1.0 - mu) * eta * ones, ones), mu, x, rng)


MakeBlock = Callable[[float, float, int, Array, np.random.Generator], Block]

MODELS: dict[str, MakeBlock] = {
    "momentum SGD": _momentum,
    "ASGD, expected read M": _read,
    "ASGD, iterate X": _asgd,
}


def _thinned(eta: float, mu: float, paths: int, seed: int) -> dict[str, Array]:
    """Return nearly independent stationary samples of each model, shape (SAMPLES, paths)."""
    time = decay_updates(PROBLEM.curvature, eta, mu)
    burn_in, spacing = round(8 * time), round(5 * time)
    updates = burn_in + spacing * SAMPLES
    samples = {}
    for model, make in MODELS.items():
        rng = stream(seed, f"proposition2/{model}/{eta}")
        block = make(eta, mu, updates, np.zeros((paths, 1)), rng)
        samples[model] = thinned_samples(block, burn_in, spacing, SAMPLES)[..., 0]
    return samples


def _compare(eta: float, mu: float, samples: dict[str, Array], paths: int) -> pd.DataFrame:
    reference = samples["momentum SGD"].ravel()
    rows = []
    for model, values in samples.items():
        each = (values**2).mean(axis=0)
        row = {
            "eta": eta,
            "mu": mu,
            "model": model,
            "variance": each.mean(),
            "standard_error": each.std(ddof=1) / np.sqrt(paths),
            "ks_statistic": np.nan,
            "ks_pvalue": np.nan,
        }
        if model != "momentum SGD":
            test = ks_2samp(values.ravel(), reference)
            row |= {"ks_statistic": test.statistic, "ks_pvalue": test.pvalue}
        rows.append(row)
    return pd.DataFrame(rows)


def _quantiles(eta: float, mu: float, samples: dict[str, Array]) -> pd.DataFrame:
    levels = np.arange(1, 200) / 200.0
    columns = {model: np.quantile(values, levels) for model, values in samples.items()}
    return pd.DataFrame({"eta": eta, "mu": mu, "level": levels, **columns})


def _course(eta: float, mu: float, paths: int, seed: int) -> pd.DataFrame:
    curves = []
    for model, make in MODELS.items():
        updates = COURSE[eta, mu]
        block = partial(make, eta, mu, updates)
        name = f"proposition2/{model}/course"
        ensemble = run_ensemble(
            block, PROBLEM, updates, paths, seed, name, updates, quantile_levels=()
        )
        mean = ensemble.mean[:, 0]
        variance = ensemble.second_moment[:, 0] - mean**2
        columns = {"eta": eta, "mu": mu, "model": model, "update": ensemble.update}
        curves.append(pd.DataFrame({**columns, "mean": mean, "variance": variance}))
    return pd.concat(curves, ignore_index=True)


def _numbers(table: pd.DataFrame, courses: list[pd.DataFrame]) -> dict[str, float]:
    numbers = {}
    momentum, read, iterate = MODELS
    for size, (eta, _), course in zip(("small", "large"), (SMALL, LARGE), courses, strict=True):
        rest = table[table["eta"] == eta]
        mean = course.pivot(index="update", columns="model", values="mean")
        variance = course.pivot(index="update", columns="model", values="variance")
        for model, label in ((read, "read"), (iterate, "iterate")):
            numbers[f"{size}_{label}_pvalue"] = value(rest, "ks_pvalue", model=model)
            numbers[f"{size}_{label}_mean"] = float((mean[model] - mean[momentum]).abs().max())
            numbers[f"{size}_{label}_peak"] = float(variance[model].max())
        for model, label in ((momentum, "momentum"), (read, "read"), (iterate, "iterate")):
            numbers[f"{size}_{label}_variance"] = value(rest, "variance", model=model)
            error = value(rest, "standard_error", model=model)
            numbers[f"{size}_{label}_standard_error"] = error
        numbers[f"{size}_momentum_peak"] = float(variance[momentum].max())
    return numbers


def _caption(n: dict[str, float], paths: int, thinned: int) -> str:
    def rest(size: str) -> str:
        return (
            f"momentum {n[f'{size}_momentum_variance']:.4f}, M {n[f'{size}_read_variance']:.4f}, "
            f"X {n[f'{size}_iterate_variance']:.4f} (standard error of M "
            f"{n[f'{size}_read_standard_error']:.4f}); Kolmogorov-Smirnov against momentum: M "
            f"p {pvalue_text(n[f'{size}_read_pvalue'])}, "
            f"X p {pvalue_text(n[f'{size}_iterate_pvalue'])}"
        )

    return (
        f"ASGD with (eta, mu) against momentum SGD with zeta = mu and eta' = (1 - mu) eta on "
        f"f = x^2, samples f -+ 2x; time step, friction and temperature are equal by the "
        f"formulas. Above eta, mu = {SMALL[0]}, {SMALL[1]}, below {LARGE[0]}, {LARGE[1]}. Left and "
        f"middle: mean and variance from x_0 = 1, {paths} paths. The expected read M and the "
        f"momentum iterate have one mean at every update (they differ by at most "
        f"{n['small_read_mean']:.4f} and {n['large_read_mean']:.4f}); the ASGD iterate X runs "
        f"ahead, by up to {n['small_iterate_mean']:.3f} and {n['large_iterate_mean']:.3f}, and the "
        f"random lags add variance while the path moves. Right: stationary quantiles, {thinned} "
        f"paths x {SAMPLES} samples 5 decay times apart. Variance at rest, above: "
        f"{rest('small')}. Below: {rest('large')}. What is left between M and momentum at rest "
        f"is the noise of the random lags, of relative size mu (eta a)^2/(1 - mu^2); with that "
        f"noise left out their moments are equal, update by update."
    )
